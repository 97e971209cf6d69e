package random_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/kms-agent/kms-agent/agent/random"
	"github.com/kms-agent/kms-agent/plugins"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// source is a backend whose random is the same byte again and again.
type source struct {
	mu       sync.Mutex // guards what follows
	calls    int
	underWay int
	most     int // under way at once
	takes    time.Duration
	err      error
}

func (s *source) Random(ctx context.Context, dst []byte) error {
	s.mu.Lock()
	s.calls++
	s.underWay++
	s.most = max(s.most, s.underWay)
	takes, err := s.takes, s.err
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.underWay--
		s.mu.Unlock()
	}()
	select {
	case <-time.After(takes):
	case <-ctx.Done():
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	copy(dst, bytes.Repeat([]byte{0xc5}, len(dst)))
	return nil
}

func (s *source) say(err error, takes time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err, s.takes = err, takes
}

// since returns how many calls there were since it was last asked, and how many of them
// at once.
func (s *source) since() (calls, most int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	calls, most = s.calls, s.most
	s.calls, s.most = 0, 0
	return calls, most
}

// newPool is a Pool that is full.
func newPool(t *testing.T, s plugins.RandomSource) *random.Pool {
	t.Helper()
	p := random.New(nil)
	use(t, p, "hsm", s)
	t.Cleanup(p.Close)
	time.Sleep(10 * time.Second)
	return p
}

func use(t *testing.T, p *random.Pool, backend string, s plugins.RandomSource) {
	t.Helper()
	if err := p.Use(backend, s); err != nil {
		t.Fatal(err)
	}
}

var errAway = plugins.Errorf(plugins.Unavailable, "connection refused")

// take draws random of n bytes for a use and tells whether it was mixed.
func take(t *testing.T, p *random.Pool, n int, u random.Use) bool {
	t.Helper()
	before := p.Stats().Counts[u]
	p.Fill(make([]byte, n), u)
	after := p.Stats().Counts[u]
	mixed, unmixed := after.Mixed-before.Mixed, after.Unmixed-before.Unmixed
	if mixed+unmixed != 1 || after.MixedBytes-before.MixedBytes != mixed*uint64(n) || after.UnmixedBytes-before.UnmixedBytes != unmixed*uint64(n) {
		t.Errorf("counts of one draw of %d bytes: %+v, then %+v", n, before, after)
	}
	return mixed == 1
}

// drain takes what is there for data keys.
func drain(t *testing.T, p *random.Pool) {
	t.Helper()
	for take(t, p, 32, random.DataKey) {
	}
}

func TestWithoutABackend(t *testing.T) {
	closed := random.New(nil)
	closed.Close()
	closed.Close()
	for name, p := range map[string]*random.Pool{"nil": nil, "new": random.New(nil), "closed": closed} {
		a, b := make([]byte, 32), make([]byte, 32)
		p.Fill(a, random.DataKey)
		p.Fill(b, random.GenerateRandom)
		if bytes.Equal(a, b) || bytes.Equal(a, make([]byte, 32)) || bytes.Equal(b, make([]byte, 32)) {
			t.Errorf("%s: %x and %x", name, a, b)
		}
		if p != nil && (p.Stats().Backend != "" || p.Stats().Counts != [2]random.Count{}) {
			t.Errorf("%s: %+v, want nothing counted", name, p.Stats())
		}
	}
}

// A backend that gives the same byte for ever does no harm.
func TestNeverTheBackendAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPool(t, &source{})
		seen := map[string]bool{}
		for range 100 {
			b := make([]byte, 32)
			p.Fill(b, random.DataKey)
			if seen[string(b)] || bytes.Contains(b, bytes.Repeat([]byte{0xc5}, 8)) {
				t.Fatalf("%x", b)
			}
			seen[string(b)] = true
		}
		if c := p.Stats().Counts[random.DataKey]; c.Mixed != 100 || c.MixedBytes != 3200 || c.Unmixed != 0 {
			t.Errorf("counts: %+v", c)
		}
	})
}

// Who wants nothing costs nothing, and the pool is filled again below its mark.
func TestFetchesFollowUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{takes: time.Millisecond}
		p := newPool(t, s)
		calls, _ := s.since()
		if stats := p.Stats(); stats.Held != stats.Size || calls != stats.Size/plugins.MaxRandomSize {
			t.Errorf("%d calls for %+v", calls, stats)
		}
		time.Sleep(24 * time.Hour)
		take(t, p, 32, random.DataKey)
		time.Sleep(24 * time.Hour)
		if calls, _ := s.since(); calls != 0 {
			t.Errorf("%d calls while there was enough", calls)
		}
		drain(t, p)
		time.Sleep(10 * time.Second)
		if calls, most := s.since(); p.Stats().Held != p.Stats().Size || calls != p.Stats().Size/plugins.MaxRandomSize || most != 1 {
			t.Errorf("%d calls, %d at once, for %+v", calls, most, p.Stats())
		}
	})
}

// However much is drawn, random has at most one session of an HSM, and a tenth of that.
func TestFetchesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, c := range []struct {
			takes time.Duration
			most  int // calls in a second
		}{{0, 200}, {time.Millisecond, 100}, {10 * time.Millisecond, 10}, {100 * time.Millisecond, 1}} {
			s := &source{}
			p := newPool(t, s)
			s.say(nil, c.takes)
			s.since()
			for range 10000 { // ten seconds
				take(t, p, 512, random.DataKey)
				time.Sleep(time.Millisecond)
			}
			if calls, most := s.since(); calls < 9*c.most || calls > 10*c.most+2 || most != 1 {
				t.Errorf("calls of %v: %d in ten seconds, %d at once; want about %d", c.takes, calls, most, 10*c.most)
			}
		}
	})
}

// Callers who ask for much random leave some to data keys.
func TestDataKeysHaveAReserve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{}
		p := newPool(t, s)
		s.say(errAway, 0)
		if take(t, p, random.MaxMixed+1, random.GenerateRandom) {
			t.Errorf("%d bytes were mixed", random.MaxMixed+1)
		}
		if !take(t, p, random.MaxMixed, random.GenerateRandom) || take(t, p, 1, random.GenerateRandom) {
			t.Errorf("want %d bytes mixed for others than data keys, and no more", random.MaxMixed)
		}
		left := p.Stats().Held
		for range left / 32 {
			if !take(t, p, 32, random.DataKey) {
				t.Fatal("a data key was not mixed")
			}
		}
		if take(t, p, 32, random.DataKey) || left < 100*32 {
			t.Errorf("%d bytes were left to data keys", left)
		}
	})
}

// told is what a Pool says of its backend.
type told struct{ errs []error }

func (o *told) changed(_ string, err error) { o.errs = append(o.errs, err) }

// An outage holds nobody up, is asked about ever more rarely, and ends by itself.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, o := &source{err: errAway}, &told{}
		p := random.New(o.changed)
		defer p.Close()
		use(t, p, "hsm", s)
		time.Sleep(time.Hour)
		if calls, _ := s.since(); calls < 60 || calls > 130 {
			t.Errorf("%d calls in an hour's outage", calls)
		}
		began := time.Now()
		if take(t, p, 32, random.DataKey) || time.Since(began) != 0 {
			t.Errorf("mixed, or waited %v", time.Since(began))
		}
		if p.Stats().LastError == nil || len(o.errs) != 1 {
			t.Errorf("status %v, told %v", p.Stats().LastError, o.errs)
		}
		s.say(nil, 0)
		time.Sleep(2 * time.Minute)
		if !take(t, p, 32, random.DataKey) || p.Stats().LastError != nil || len(o.errs) != 2 || o.errs[1] != nil {
			t.Errorf("after the outage: %+v, told %v", p.Stats(), o.errs)
		}
	})
}

// A backend that hangs is a backend in an outage.
func TestHangingBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{takes: 24 * time.Hour}
		p := newPool(t, s)
		time.Sleep(time.Minute)
		if take(t, p, 32, random.DataKey) || !errors.Is(p.Stats().LastError, context.DeadlineExceeded) {
			t.Errorf("%+v", p.Stats())
		}
		if calls, most := s.since(); calls > 8 || most != 1 {
			t.Errorf("%d calls, %d at once", calls, most)
		}
	})
}

// Who says that something is wrong is left alone longer: it would look like a process
// to be replaced, which would cost wraps.
func TestFaultyBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, class := range []plugins.Class{plugins.Internal, plugins.Invalid, plugins.Denied} {
			s := &source{err: plugins.Errorf(class, "zeros")}
			p := newPool(t, s)
			time.Sleep(time.Hour)
			if calls, _ := s.since(); calls < 12 || calls > 25 {
				t.Errorf("%s: %d calls in an hour", class, calls)
			}
			p.Close()
		}
	})
}

// Nothing of a backend is used once another one, or none, is configured.
func TestChangeOfBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := &source{}, &source{err: errAway}
		p := newPool(t, first)
		use(t, p, "hsm", first)
		if p.Stats().Held == 0 {
			t.Error("the same again cost what was held")
		}
		drain(t, p)
		first.say(nil, time.Second)
		time.Sleep(500 * time.Millisecond) // a call is under way
		use(t, p, "other", second)
		time.Sleep(time.Minute)
		if _, most := first.since(); take(t, p, 32, random.DataKey) || p.Stats().Backend != "other" || most > 1 {
			t.Errorf("%+v", p.Stats())
		}
		second.say(nil, 0)
		time.Sleep(2 * time.Minute)
		if !take(t, p, 32, random.DataKey) {
			t.Errorf("%+v", p.Stats())
		}
		before := p.Stats().Counts
		use(t, p, "", nil)
		second.since()
		p.Fill(make([]byte, 32), random.DataKey)
		time.Sleep(time.Hour)
		if calls, _ := second.since(); calls != 0 || p.Stats().Backend != "" || p.Stats().Held != 0 || p.Stats().Counts != before {
			t.Errorf("without a backend: %d calls, %+v", calls, p.Stats())
		}
	})
}

// Draws from everywhere while the pool is filled, changed and closed.
func TestConcurrency(t *testing.T) {
	p, s := random.New(nil), &source{}
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := map[[32]byte]bool{}
	for range 8 {
		wg.Go(func() {
			for range 2000 {
				var b [32]byte
				p.Fill(b[:], random.DataKey)
				mu.Lock()
				if seen[b] {
					t.Error("the same twice")
				}
				seen[b] = true
				mu.Unlock()
			}
		})
	}
	for range 50 {
		use(t, p, "hsm", s)
		p.Stats()
		use(t, p, "", nil)
	}
	use(t, p, "hsm", s)
	wg.Wait()
	p.Close()
}
