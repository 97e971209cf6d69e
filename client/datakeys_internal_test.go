package client

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
)

// maker counts and keeps the data keys that it makes.
type maker struct {
	mu        sync.Mutex
	made      []*dataKey // mu guards made
	takes     time.Duration
	until     time.Duration
	life      time.Duration
	freshness Freshness
	err       error
}

func (m *maker) want(name string) want {
	id := identify(nil, name)
	return want{id: id, fetch: func(ctx context.Context) (*dataKey, error) {
		asked := time.Now()
		select {
		case <-time.After(m.takes):
		case <-ctx.Done():
			return nil, ended(ctx)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.err != nil {
			return nil, m.err
		}
		k := &dataKey{id: id, key: bytes.Repeat([]byte{7}, 32), asked: asked, until: asked.Round(0).Add(m.until), life: m.life, freshness: m.freshness}
		m.made = append(m.made, k)
		return k, nil
	}}
}

func (m *maker) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.made)
}

func (m *maker) cleared(i int) bool { return bytes.Equal(m.made[i].key, make([]byte, 32)) }

func newMaker() *maker {
	return &maker{until: time.Minute, life: time.Hour, freshness: Freshness{Source: SourceUpstream}}
}

func limited(t *testing.T, l CacheLimits) *dataKeys {
	t.Helper()
	l, err := l.complete()
	if err != nil {
		t.Fatal(err)
	}
	d := newDataKeys(l)
	t.Cleanup(d.close)
	return d
}

// use is one use of a data key.
func use(t *testing.T, d *dataKeys, w want) Freshness {
	t.Helper()
	k, freshness, err := d.acquire(t.Context(), w)
	if err != nil {
		t.Fatal(err)
	}
	if k.key[0] != 7 {
		t.Error("a cleared key was given out")
	}
	d.release(k)
	return freshness
}

func TestUseUntil(t *testing.T) {
	for name, c := range map[string]struct {
		maker *maker
		lasts time.Duration
	}{
		"use_until":  {&maker{until: time.Minute, life: time.Hour}, time.Minute},
		"MaxAge":     {&maker{until: time.Hour, life: time.Minute}, time.Minute},
		"grace":      {&maker{until: time.Hour, life: time.Hour, freshness: Freshness{Source: SourceGrace, GraceLeft: time.Minute}}, time.Minute},
		"slow agent": {&maker{until: time.Minute, life: time.Hour, takes: 20 * time.Second}, 40 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := limited(t, CacheLimits{})
				use(t, d, c.maker.want("a"))
				time.Sleep(c.lasts - 1)
				use(t, d, c.maker.want("a"))
				if c.maker.count() != 1 || c.maker.cleared(0) {
					t.Fatalf("%d keys were made before the end, want 1, in use", c.maker.count())
				}
				time.Sleep(time.Nanosecond)
				synctest.Wait()
				if !c.maker.cleared(0) || d.stats().Entries != 0 {
					t.Error("the key is not cleared by itself when its time is over")
				}
				use(t, d, c.maker.want("a"))
				if c.maker.count() != 2 {
					t.Errorf("%d keys were made, want 2", c.maker.count())
				}
			})
		})
	}
}

// What may not be kept serves once, and is cleared then.
func TestUseUntilIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, d := newMaker(), limited(t, CacheLimits{})
		m.until = 0
		use(t, d, m.want("a"))
		use(t, d, m.want("a"))
		if m.count() != 2 || !m.cleared(0) || !m.cleared(1) || d.stats().Entries != 0 {
			t.Errorf("%d keys were made, %d kept, want 2, each for one use", m.count(), d.stats().Entries)
		}
	})
}

func TestBoundsOfUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, d := newMaker(), limited(t, CacheLimits{MaxMessages: 3})
		for range 7 {
			use(t, d, m.want("a"))
		}
		if m.count() != 3 || !m.cleared(0) || !m.cleared(1) || m.cleared(2) {
			t.Errorf("7 messages of 3 for each key: %d keys", m.count())
		}
		m, d = newMaker(), limited(t, CacheLimits{MaxBytes: 100 << 20})
		for range 5 {
			w := m.want("a")
			w.bytes = 40 << 20
			use(t, d, w)
		}
		if m.count() != 3 {
			t.Errorf("5 times 40 MiB, 100 MiB for each key: %d keys, want 3", m.count())
		}
	})
}

func TestEvictionOfTheUnused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, d := newMaker(), limited(t, CacheLimits{MaxEntries: 2})
		use(t, d, m.want("a"))
		use(t, d, m.want("b"))
		held, _, err := d.acquire(t.Context(), m.want("a"))
		if err != nil {
			t.Fatal(err)
		}
		use(t, d, m.want("c"))
		if !m.cleared(1) || m.cleared(0) {
			t.Error("not the key unused for longest was cleared")
		}
		use(t, d, m.want("b"))
		if m.cleared(0) {
			t.Error("a key in use was cleared")
		}
		if d.release(held); !m.cleared(0) {
			t.Error("an evicted key was not cleared when its use ended")
		}
		held, _, err = d.acquire(t.Context(), m.want("b"))
		if err != nil {
			t.Fatal(err)
		}
		d.close()
		if !m.cleared(2) || m.cleared(3) {
			t.Error("close clears what is not in use, and only that")
		}
		if d.release(held); !m.cleared(3) {
			t.Error("a key was not cleared after close")
		}
		if _, _, err := d.acquire(t.Context(), m.want("b")); !errors.Is(err, errClosed) {
			t.Errorf("after close: %v", err)
		}
	})
}

func TestSingleFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, d := newMaker(), limited(t, CacheLimits{})
		m.takes = time.Second
		// The first one gives up; that must not be the others' failure.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, _, err := d.acquire(ctx, m.want("a")); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("the one who gave up: %v", err)
			}
		})
		synctest.Wait()
		for range 100 {
			wg.Go(func() { use(t, d, m.want("a")) })
		}
		wg.Wait()
		if m.count() != 1 {
			t.Errorf("%d keys were made for 100 at once, want 1", m.count())
		}
		// The agent's no is everybody's.
		m.err = failed(codes.PermissionDenied, ErrAccessDenied, "b", "no")
		for range 100 {
			wg.Go(func() {
				if _, _, err := d.acquire(t.Context(), m.want("b")); !errors.Is(err, ErrAccessDenied) {
					t.Errorf("got %v", err)
				}
			})
		}
		wg.Wait()
		if misses := d.stats().Misses; misses != 3 {
			t.Errorf("%d calls, want 3", misses)
		}
		// Closed while it is on its way.
		m.err = nil
		wg.Go(func() {
			if _, _, err := d.acquire(t.Context(), m.want("c")); !errors.Is(err, errClosed) {
				t.Errorf("closed meanwhile: %v", err)
			}
		})
		synctest.Wait()
		d.close()
		wg.Wait()
		if !m.cleared(1) {
			t.Error("a key that came too late was not cleared")
		}
	})
}

func TestMaxStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, d := newMaker(), limited(t, CacheLimits{})
		m.freshness = Freshness{Source: SourceCached, Age: 10 * time.Second}
		stale := func(age time.Duration) want { w := m.want("a"); w.maxStale = &age; return w }
		use(t, d, m.want("a"))
		time.Sleep(5 * time.Second)
		if got, want := use(t, d, stale(15*time.Second)), (Freshness{Source: SourceCached, Age: 15 * time.Second}); got != want || m.count() != 1 {
			t.Errorf("within the bound: %+v of %d keys, want %+v of 1", got, m.count(), want)
		}
		m.freshness = Freshness{Source: SourceUpstream}
		if got := use(t, d, stale(14*time.Second)); got != m.freshness || m.count() != 2 || !m.cleared(0) {
			t.Errorf("beyond the bound: %+v of %d keys", got, m.count())
		}
		if use(t, d, stale(0)); m.count() != 3 {
			t.Errorf("zero: %d keys, want 3", m.count())
		}
		// Zero does not join a call that began before.
		m.takes = time.Second
		var wg sync.WaitGroup
		wg.Go(func() { use(t, d, m.want("b")) })
		synctest.Wait()
		w := m.want("b")
		w.maxStale = new(time.Duration)
		wg.Go(func() { use(t, d, w) })
		wg.Wait()
		if m.count() != 5 {
			t.Errorf("%d keys, want 5", m.count())
		}
	})
}

// A no takes away what is cached; no answer does not.
func TestRefusalEvicts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, d := newMaker(), limited(t, CacheLimits{})
		use(t, d, m.want("a"))
		fresh := m.want("a")
		fresh.maxStale = new(time.Duration)
		m.err = failed(codes.Unavailable, ErrBackendUnavailable, "a", "down")
		if _, _, err := d.acquire(t.Context(), fresh); !errors.Is(err, ErrBackendUnavailable) {
			t.Fatal(err)
		}
		if use(t, d, m.want("a")); m.count() != 1 {
			t.Error("an outage took the cached key away")
		}
		m.err = failed(codes.FailedPrecondition, ErrKeyUnusable, "a", "disabled")
		if _, _, err := d.acquire(t.Context(), fresh); !errors.Is(err, ErrKeyUnusable) || !m.cleared(0) {
			t.Fatalf("got %v, cleared %v; want the key cleared", err, m.cleared(0))
		}
		if _, _, err := d.acquire(t.Context(), m.want("a")); !errors.Is(err, ErrKeyUnusable) {
			t.Errorf("afterwards: %v", err)
		}
	})
}

func TestIdentify(t *testing.T) {
	seen := map[keyID]string{}
	for name, id := range map[string]keyID{
		"ab":          identify(nil, "ab"),
		"a b":         identify(nil, "a", "b"),
		"a=b":         identify(map[string]string{"a": "b"}),
		"x a=b":       identify(map[string]string{"a": "b"}, "x"),
		"x a=bc":      identify(map[string]string{"a": "bc"}, "x"),
		"x ab=c":      identify(map[string]string{"ab": "c"}, "x"),
		"x a=b, c=d":  identify(map[string]string{"a": "b", "c": "d"}, "x"),
		"x a=b, c=dd": identify(map[string]string{"a": "b", "c": "dd"}, "x"),
	} {
		if other, twice := seen[id]; twice {
			t.Errorf("%q and %q have one identity", name, other)
		}
		seen[id] = name
	}
	if identify(map[string]string{"a": "b", "c": "d"}, "x") != identify(map[string]string{"c": "d", "a": "b"}, "x") {
		t.Error("the order of a map matters")
	}
}

func TestCacheLimits(t *testing.T) {
	for name, l := range map[string]CacheLimits{
		"entries": {MaxEntries: -1}, "age": {MaxAge: -1}, "messages": {MaxMessages: 1<<32 + 1}, "bytes": {MaxBytes: 1 << 20},
	} {
		if _, err := (&Client{}).InProcess(l); err == nil {
			t.Errorf("%s: %+v was taken", name, l)
		}
	}
}
