package cache_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

// TestTable is the table of what is served: what upstream says, against how
// old its last confirmation is.
func TestTable(t *testing.T) {
	const (
		fresh  = time.Minute
		older  = 6 * time.Minute
		absent = -1
	)
	cases := []struct {
		name          string
		say           error
		age           time.Duration
		want          error // nil: served
		source        cache.Source
		fills, asks   int // after the first fill
		suspendsAfter bool
	}{
		{name: "yes, within max_age", age: fresh, source: cache.Cached},
		{name: "yes, older", age: older, source: cache.Upstream, asks: 1},
		{name: "yes, nothing cached", age: absent, source: cache.Upstream, fills: 1},
		{name: "unreachable, within max_age", say: errDown, age: fresh, source: cache.Cached},
		{name: "unreachable, older", say: errDown, age: older, want: errDown, asks: 1},
		{name: "unreachable, nothing cached", say: errDown, age: absent, want: errDown, fills: 1},
		// A no is learned of by asking: an entry within max_age asks nobody. Here
		// other traffic has heard it; TestObserve has more of that.
		{name: "no, older", say: errNo, age: older, want: errNo, asks: 2, suspendsAfter: true},
		{name: "no, nothing cached", say: errNo, age: absent, want: errNo, fills: 1, asks: 1, suspendsAfter: true},
		{name: "other, within max_age", say: errOther, age: fresh, source: cache.Cached},
		{name: "other, older", say: errOther, age: older, want: errOther, asks: 1},
		{name: "other, nothing cached", say: errOther, age: absent, want: errOther, fills: 1},
	}
	for _, tc := range cases {
		for _, direction := range []cache.Direction{cache.Encrypt, cache.Decrypt} {
			t.Run(direction.String()+": "+tc.name, func(t *testing.T) {
				bubble(t, func(r *rig) {
					use := func() (cache.Freshness, int, error) { return r.encrypt() }
					a := wraps
					if direction == cache.Decrypt {
						use, a = func() (cache.Freshness, int, error) { return r.decrypt(1) }, unwraps
					}
					fills := tc.fills
					if tc.age != absent {
						f, _, err := use()
						served(t, f, 0, err)
						time.Sleep(tc.age)
						fills++
					}
					r.up.say(tc.say, tc.say)
					f, _, err := use()
					if tc.want != nil {
						refused(t, err, tc.want)
					} else if served(t, f, 0, err); f.Source != tc.source {
						t.Errorf("source = %v, want %v", f.Source, tc.source)
					}
					r.wantCalls(fills, tc.asks)
					if got := r.Recheck(a) != nil; got != tc.suspendsAfter {
						t.Errorf("Recheck = %v, want suspended %v", r.Recheck(a), tc.suspendsAfter)
					}
				})
			})
		}
	}
}

// TestRefusedWithinMaxAge: a no that anything else hears suspends what was
// confirmed just now.
func TestRefusedWithinMaxAge(t *testing.T) {
	bubble(t, func(r *rig) {
		f, n, err := r.decrypt(1)
		served(t, f, n, err)
		r.up.say(errNo, errDown)
		_, _, err = r.decrypt(2)
		refused(t, err, errNo)
		synctest.Wait()
		_, _, err = r.decrypt(1)
		refused(t, err, cache.ErrSuspended)
		refused(t, err, errNo)
	})
}

// TestOneConfirmation: one call renews everything that it covers, and nothing
// else.
func TestOneConfirmation(t *testing.T) {
	bubble(t, func(r *rig) {
		const n = 50
		for id := range n {
			f, k, err := r.decrypt(id)
			served(t, f, k, err)
		}
		f, k, err := r.encrypt()
		served(t, f, k, err)
		time.Sleep(6 * time.Minute)
		for id := range n {
			f, k, err := r.decrypt(id)
			if f = served(t, f, k, err); id > 0 && f.Source != cache.Cached {
				t.Errorf("source of the %dth = %v, want cached", id, f.Source)
			}
		}
		r.wantCalls(n+1, 1)
		if r.up.asked[0] != unwraps {
			t.Errorf("asked for %v, want %v", r.up.asked[0], unwraps)
		}
		if sample, _ := r.up.samples[0].(int); sample < 1 || sample > n {
			t.Errorf("sample = %v, want the origin of a covered data key", r.up.samples[0])
		}
		if age, ok := r.Confirmed(wraps); !ok || age != 6*time.Minute {
			t.Errorf("Confirmed(encrypt) = %v, %v; want 6m: the other direction was not asked for", age, ok)
		}
		if age, ok := r.Confirmed(unwraps); !ok || age != 0 {
			t.Errorf("Confirmed(decrypt) = %v, %v; want 0", age, ok)
		}
	})
}

// TestMaxStale: absent, zero and a value, against the age of the confirmation.
func TestMaxStale(t *testing.T) {
	cases := []struct {
		name     string
		maxStale *time.Duration
		age      time.Duration
		asks     int
	}{
		{"absent", nil, 5 * time.Minute, 0},
		{"zero", stale(0), time.Nanosecond, 1},
		{"negative", stale(-time.Hour), time.Nanosecond, 1},
		{"a minute, at it", stale(time.Minute), time.Minute, 0},
		{"a minute, past it", stale(time.Minute), time.Minute + 1, 1},
		{"an hour, past max_age", stale(time.Hour), 5*time.Minute + 1, 1},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, func(r *rig) {
				f, n, err := r.encrypt()
				served(t, f, n, err)
				time.Sleep(tc.age)
				f, n, err = r.encrypt(func(req *cache.EncryptRequest) { req.MaxStale, req.Arrived = tc.maxStale, r.Now() })
				served(t, f, n, err)
				r.wantCalls(1, tc.asks)
			})
		})
	}
}

// TestMaxStaleIsEnforcedInAnOutage: the request's bound is not the key's.
func TestMaxStaleIsEnforcedInAnOutage(t *testing.T) {
	bubble(t, func(r *rig) {
		f, n, err := r.encrypt()
		served(t, f, n, err)
		time.Sleep(time.Minute)
		r.up.say(errDown, errDown)
		_, _, err = r.encrypt(func(req *cache.EncryptRequest) { req.MaxStale = stale(0) })
		refused(t, err, errDown)
		f, n, err = r.encrypt()
		served(t, f, n, err)
		r.wantCalls(1, 1)
	})
}

// TestConfirmationUnderWayIsTooOld: for max_stale 0 an answer to a question
// that was under way when the request arrived does not do; one more does.
func TestConfirmationUnderWayIsTooOld(t *testing.T) {
	bubble(t, func(r *rig) {
		f, n, err := r.encrypt()
		served(t, f, n, err)
		r.up.takes(time.Second)
		time.Sleep(6 * time.Minute)
		go func() { _, _, _ = r.encrypt() }()
		time.Sleep(time.Millisecond)
		began := r.Now()
		f, n, err = r.encrypt(func(req *cache.EncryptRequest) { req.MaxStale, req.Arrived = stale(0), began })
		f = served(t, f, n, err)
		if confirmed := r.Now() - f.Age; confirmed < began {
			t.Errorf("confirmed %v before the request arrived", began-confirmed)
		}
		r.wantCalls(1, 2)
	})
}

// TestFillUnderWayIsTooOld is the same with nothing cached: the fill is
// followed by a confirmation, and an outage then ends the request.
func TestFillUnderWayIsTooOld(t *testing.T) {
	for _, say := range []error{nil, errDown, errNo} {
		bubble(t, func(r *rig) {
			r.up.takes(time.Second)
			go func() { _, _, _ = r.encrypt() }()
			time.Sleep(time.Millisecond)
			r.up.say(nil, say)
			_, _, err := r.encrypt(func(req *cache.EncryptRequest) { req.MaxStale, req.Arrived = stale(0), r.Now() })
			if !errors.Is(err, say) {
				t.Errorf("error = %v, want %v", err, say)
			}
			asks := 1
			if errors.Is(say, errNo) {
				asks = 2
			}
			time.Sleep(time.Minute)
			r.wantCalls(1, asks)
		})
	}
}

// TestSlowUpstreamIsNotAskedForEver: an answer slower than max_age, or a
// max_age of zero, serves the requests that waited for it.
func TestSlowUpstreamIsNotAskedForEver(t *testing.T) {
	for _, maxAge := range []time.Duration{0, time.Millisecond} {
		bubble(t, func(r *rig) {
			r.up.takes(time.Second)
			shorten := func(req *cache.EncryptRequest) { req.Limits.MaxAge = maxAge }
			ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
			defer cancel()
			for i := range 3 {
				u, err := r.Encrypt(ctx, r.encryption(shorten))
				f, n, err := r.finish(u, err)
				served(t, f, n, err)
				r.wantCalls(1, i)
				time.Sleep(time.Second)
			}
		})
	}
}
