package cache_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/kms-agent/kms-agent/cache"
)

// TestProperty drives a cache with random requests, pauses, answers from
// upstream and evictions, and holds every answer against a plain account of
// what upstream has said: never served what the table forbids, never refused
// what it allows, no data key used past its limits.
func TestProperty(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		steps := rapid.SliceOfN(rapid.Custom(drawStep), 1, 60).Draw(rt, "steps")
		jitter := rapid.Float64Range(0, 0.99).Draw(rt, "jitter")
		var faults []string
		synctest.Test(t, func(t *testing.T) { faults = play(t, steps, jitter) })
		if len(faults) > 0 {
			rt.Fatalf("%d faults, first: %s", len(faults), faults[0])
		}
	})
}

// The limits of every request of the property test: small, to be met often.
var small = cache.Limits{
	MaxAge: 10 * time.Second, MaxLifetime: time.Minute, MaxIdle: 30 * time.Second, MaxMessages: 5, MaxBytes: 1000,
}

// step is one thing that happens.
type step struct {
	Do            string
	Wait          time.Duration
	Version       string
	Place         int
	Caller        string
	Size          uint64
	MaxStale      *time.Duration
	Fill, Confirm cache.Verdict
	Delay         time.Duration
	Reserve       bool
}

func drawStep(t *rapid.T) step {
	return step{
		Do: rapid.SampledFrom([]string{
			"encrypt", "encrypt", "encrypt", "decrypt", "decrypt", "decrypt", "burst", "say", "say", "say", "observe", "evict key",
			"evict authority", "evict all",
		}).Draw(t, "do"),
		Wait: rapid.SampledFrom([]time.Duration{
			0, 0, 0, time.Millisecond, time.Second, 1500 * time.Millisecond, 5 * time.Second, 9 * time.Second, 10 * time.Second,
			10*time.Second + 1, 31 * time.Second,
		}).Draw(t, "wait"),
		Version:  rapid.SampledFrom([]string{"1", "1", "2"}).Draw(t, "version"),
		Place:    rapid.IntRange(0, 1).Draw(t, "place"),
		Caller:   rapid.SampledFrom([]string{"alice", "bob"}).Draw(t, "caller"),
		Size:     rapid.SampledFrom([]uint64{0, 1, 300, 999, 1000, 1001}).Draw(t, "size"),
		MaxStale: rapid.SampledFrom([]*time.Duration{nil, nil, nil, stale(0), stale(3 * time.Second), stale(time.Hour)}).Draw(t, "maxStale"),
		Fill:     rapid.SampledFrom([]cache.Verdict{cache.Yes, cache.Yes, cache.Unreachable, cache.No, cache.Other}).Draw(t, "fill"),
		Confirm:  rapid.SampledFrom([]cache.Verdict{cache.Yes, cache.Yes, cache.Unreachable, cache.No, cache.Other}).Draw(t, "confirm"),
		Reserve:  rapid.Bool().Draw(t, "reserve"),
		Delay:    rapid.SampledFrom([]time.Duration{time.Microsecond, time.Microsecond, 50 * time.Millisecond, 2 * time.Second}).Draw(t, "delay"),
	}
}

// event is one definite word from upstream.
type event struct {
	authority    cache.Authority
	verdict      cache.Verdict
	began, heard time.Duration
}

// account is what the test knows of one data key.
type account struct {
	authority       cache.Authority
	place           int
	created, used   time.Duration
	messages, bytes uint64
	at              int // how many events there were when it came
	gone            bool
}

// world is upstream, and the account of all that it said.
type world struct {
	*cache.Cache
	t     *testing.T
	start time.Time

	mu       sync.Mutex // guards what follows
	says     map[string]step
	events   []event
	keys     map[int]*account
	inFlight int
	fills    int
	lastAsk  time.Duration
	faults   []string
}

func (w *world) now() time.Duration { return time.Hour + time.Since(w.start) }

func (w *world) faultLocked(format string, a ...any) {
	w.faults = append(w.faults, fmt.Sprintf("at %v: ", w.now()-time.Hour)+fmt.Sprintf(format, a...))
}

var errorOf = map[cache.Verdict]error{cache.Unreachable: errDown, cache.No: errNo, cache.Other: errOther}

// answer is what upstream says, some time after it was asked.
func (w *world) answer(ctx context.Context, a cache.Authority, fill bool) error {
	w.mu.Lock()
	says, ok := w.says[a.Version]
	if !ok {
		says = step{Fill: cache.Yes, Confirm: cache.Yes, Delay: time.Microsecond}
	}
	verdict := says.Confirm
	if fill {
		verdict = says.Fill
	}
	w.inFlight++
	began := w.now()
	w.mu.Unlock()
	err := errorOf[verdict]
	select {
	case <-time.After(says.Delay):
	case <-ctx.Done():
		verdict, err = cache.Unreachable, ctx.Err()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inFlight--
	w.lastAsk = w.now()
	if verdict == cache.Yes || verdict == cache.No {
		w.events = append(w.events, event{a, verdict, began, w.now()})
	}
	return err
}

func (w *world) fill(a cache.Authority, place int) cache.Fill {
	return func(ctx context.Context) (cache.Material, error) {
		if err := w.answer(ctx, a, true); err != nil {
			return cache.Material{}, err
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.fills++
		w.keys[w.fills] = &account{authority: a, place: place, created: w.now(), used: w.now(), at: len(w.events)}
		return cache.Material{DataKey: dataKey(w.fills), Origin: w.fills}, nil
	}
}

// play runs the steps and returns what was wrong.
func play(t *testing.T, steps []step, jitter float64) []string {
	w := &world{t: t, start: time.Now(), says: map[string]step{}, keys: map[int]*account{}}
	c, err := cache.New(cache.Config{
		Now: w.now, MaxEntries: 100, Classify: classify, Rand: func() float64 { return jitter },
		Confirm: func(ctx context.Context, a cache.Authority, _ any) error { return w.answer(ctx, a, false) },
	})
	if err != nil {
		t.Fatal(err)
	}
	w.Cache = c
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = c.Run(ctx) })
	defer wg.Wait()
	defer cancel()
	for _, s := range steps {
		time.Sleep(s.Wait + 13) // no two steps at the same time
		synctest.Wait()
		w.take(s)
		if len(w.faults) > 0 {
			break
		}
	}
	return w.faults
}

func (s step) authority(d cache.Direction) cache.Authority {
	return cache.Authority{Backend: "b", WrappingKey: "kek", Version: s.Version, Direction: d}
}

func (w *world) take(s step) {
	switch s.Do {
	case "say":
		w.mu.Lock()
		w.says[s.Version] = s
		w.mu.Unlock()
	case "observe":
		a := s.authority(cache.Direction(s.Place) + cache.Encrypt)
		w.mu.Lock()
		if s.Fill == cache.Yes || s.Fill == cache.No {
			w.events = append(w.events, event{a, s.Fill, w.now(), w.now()})
		}
		w.lastAsk = w.now()
		w.mu.Unlock()
		w.Observe(a, s.Fill, nil, w.now())
	case "evict key":
		w.EvictKey("orders")
		w.forget(func(*account) bool { return true })
	case "evict authority":
		w.EvictAuthority(s.authority(cache.Encrypt))
		w.forget(func(k *account) bool { return k.authority == s.authority(cache.Encrypt) })
	case "evict all":
		w.EvictAll()
		w.forget(func(*account) bool { return true })
	case "burst":
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() { w.request(s, cache.Encrypt, false) })
			wg.Go(func() { w.request(s, cache.Decrypt, false) })
		}
		wg.Wait()
	case "encrypt":
		w.request(s, cache.Encrypt, true)
	case "decrypt":
		w.request(s, cache.Decrypt, true)
	}
}

func (w *world) forget(match func(*account) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, k := range w.keys {
		k.gone = k.gone || match(k)
	}
}

// request makes one, and judges the answer. Alone means that nothing else asks
// at the same time, so that a refusal can be judged too.
func (w *world) request(s step, d cache.Direction, alone bool) {
	a, began := s.authority(d), w.now()
	w.mu.Lock()
	events, fills := len(w.events), w.fills
	must := ""
	if alone {
		must = w.mustServeLocked(s, a, began)
	}
	w.mu.Unlock()
	use, err := w.ask(s, a)
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case d == cache.Encrypt && s.Size > small.MaxBytes:
		if err == nil {
			w.faultLocked("served more than max_bytes")
		}
	case err == nil:
		w.servedLocked(use, s, a, began, events)
		if must == cached && (w.fills != fills || use.Freshness().Source != cache.Cached) {
			w.faultLocked("%v: upstream was asked for what was cached and fresh", a)
		}
		if d == cache.Decrypt && use.Freshness().GraceLeft != 0 {
			w.faultLocked("grace out of nowhere")
		}
	case must != "":
		w.faultLocked("%v refused (%v), though it is %s", a, err, must)
	}
	if use == nil {
		return
	}
	if n, _ := use.Origin().(int); s.Reserve && d == cache.Encrypt {
		w.GiveBack(use, s.Size/2)
		w.keys[n].bytes -= s.Size / 2
	}
	use.Release()
}

func (w *world) ask(s step, a cache.Authority) (*cache.Use, error) {
	if a.Direction == cache.Encrypt {
		return w.Encrypt(w.t.Context(), cache.EncryptRequest{
			Caller: s.Caller, Slot: cache.Slot{Key: "orders", Authority: a, Partition: fmt.Sprint(s.Place)}, Limits: small,
			Bytes: s.Size, Reserve: s.Reserve, MaxStale: s.MaxStale, Arrived: w.now(), Fill: w.fill(a, s.Place),
		})
	}
	return w.Decrypt(w.t.Context(), cache.DecryptRequest{
		Caller: s.Caller, Key: "orders", Authority: a, ID: decryptID(s.Place), Limits: small,
		MaxStale: s.MaxStale, Arrived: w.now(), Fill: w.fill(a, s.Place),
	})
}

// standsLocked tells whether each no among the events is followed by a yes to
// a question from after it.
func standsLocked(events []event, a cache.Authority, all []event) bool {
	for i, no := range events {
		if no.authority != a || no.verdict != cache.No {
			continue
		}
		lifted := slices.ContainsFunc(all[i+1:], func(yes event) bool {
			return yes.authority == a && yes.verdict == cache.Yes && yes.began >= no.heard
		})
		if !lifted {
			return false
		}
	}
	return true
}

const (
	cached     = "cached and fresh"
	answerable = "what upstream says yes to"
	lifted     = "what upstream says yes to again"
)

// mustServeLocked tells why a request cannot be refused, if it cannot.
func (w *world) mustServeLocked(s step, a cache.Authority, now time.Duration) string {
	stands := standsLocked(w.events, a, w.events)
	says, said := w.says[s.Version]
	yes := !said || says.Fill == cache.Yes && says.Confirm == cache.Yes
	switch {
	case stands && w.cachedLocked(s, a, now) && w.freshLocked(s, a, now):
		return cached
	case w.inFlight > 0 || !yes:
		return ""
	case stands:
		return answerable
	case now-w.lastAsk > time.Second:
		return lifted
	}
	return ""
}

func (w *world) freshLocked(s step, a cache.Authority, now time.Duration) bool {
	return slices.ContainsFunc(w.events, func(e event) bool {
		return e.authority == a && e.verdict == cache.Yes && e.began >= now-small.MaxAge &&
			(s.MaxStale == nil || e.began >= now-*s.MaxStale)
	})
}

// cachedLocked tells whether the last data key that came for the place must be
// there still. A no at any time since may have destroyed it.
func (w *world) cachedLocked(s step, a cache.Authority, now time.Duration) bool {
	for n := w.fills; n > 0; n-- {
		k := w.keys[n]
		if k.authority != a || k.place != s.Place {
			continue
		}
		if k.gone || now-k.used > small.MaxIdle || slices.ContainsFunc(w.events[k.at-1:], func(e event) bool {
			return e.authority == a && e.verdict == cache.No
		}) {
			return false
		}
		return a.Direction == cache.Decrypt ||
			now-k.created < small.MaxLifetime && k.messages < small.MaxMessages && k.bytes < small.MaxBytes && s.Size <= small.MaxBytes-k.bytes
	}
	return false
}

// servedLocked holds a data key that was handed out against the table.
func (w *world) servedLocked(use *cache.Use, s step, a cache.Authority, began time.Duration, before int) {
	now := w.now()
	n, _ := use.Origin().(int)
	k := w.keys[n]
	if k == nil || string(use.DataKey()) != string(dataKey(n)) || k.authority != a || k.place != s.Place {
		w.faultLocked("%v: not the data key of that place: %+v", a, k)
		return
	}
	confirmed := now - use.Freshness().Age
	if !slices.ContainsFunc(w.events, func(e event) bool { return e.authority == a && e.verdict == cache.Yes && e.began == confirmed }) {
		w.faultLocked("%v: nobody said yes at %v", a, confirmed-time.Hour)
	}
	if confirmed < min(now-small.MaxAge, began) {
		w.faultLocked("%v: confirmed %v ago", a, use.Freshness().Age)
	}
	if s.MaxStale != nil && confirmed < began-*s.MaxStale {
		w.faultLocked("%v: confirmed %v before the request, max_stale is %v", a, began-confirmed, *s.MaxStale)
	}
	if !standsLocked(w.events[:before], a, w.events) {
		w.faultLocked("%v: served after a no", a)
	}
	if now-k.used > small.MaxIdle {
		w.faultLocked("%v: unused for %v", a, now-k.used)
	}
	k.used = now
	if a.Direction == cache.Decrypt {
		return
	}
	k.messages++
	k.bytes += s.Size
	if k.messages > small.MaxMessages || k.bytes > small.MaxBytes {
		w.faultLocked("%v: %d messages of %d bytes under one data key", a, k.messages, k.bytes)
	}
	if now-k.created >= small.MaxLifetime {
		w.faultLocked("%v: encrypts with a data key %v old", a, now-k.created)
	}
}
