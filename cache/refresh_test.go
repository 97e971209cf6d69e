package cache_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

// TestRefreshAhead: only what is in use is renewed, from 80 % of max_age on,
// and requests never wait for it.
func TestRefreshAhead(t *testing.T) {
	bubble(t, func(r *rig) {
		defer r.run()()
		f, n, err := r.encrypt()
		served(t, f, n, err)
		time.Sleep(240 * time.Second)
		synctest.Wait()
		if _, asks := r.up.counts(); asks > 1 {
			t.Errorf("%d refreshes before 80 %% of max_age", asks)
		}
		time.Sleep(2 * time.Second)
		r.wantCalls(1, 1)
		f, n, err = r.encrypt()
		if f = served(t, f, n, err); f.Source != cache.Cached || f.Age > 3*time.Second {
			t.Errorf("freshness = %+v, want cached and young", f)
		}
		time.Sleep(250 * time.Second)
		r.wantCalls(1, 2) // it was used once more
		time.Sleep(time.Hour)
		r.wantCalls(1, 2) // and then no more
	})
}

// TestRefreshOnlyAfterUse: a use that the last refresh has answered for is not
// a reason for another.
func TestRefreshOnlyAfterUse(t *testing.T) {
	bubble(t, func(r *rig) {
		defer r.run()()
		for range 2 {
			f, n, err := r.encrypt()
			served(t, f, n, err)
			time.Sleep(230 * time.Second)
		}
		time.Sleep(time.Hour)
		r.wantCalls(1, 1)
	})
}

// TestRefreshFollowsTheLimit: a max_age that was made longer is not refreshed
// at the pace of the old one.
func TestRefreshFollowsTheLimit(t *testing.T) {
	bubble(t, func(r *rig) {
		defer r.run()()
		for _, maxAge := range []time.Duration{time.Minute, 20 * time.Minute, 20 * time.Minute} {
			f, n, err := r.encrypt(func(req *cache.EncryptRequest) { req.Limits.MaxAge = maxAge })
			served(t, f, n, err)
			time.Sleep(5 * time.Minute)
		}
		r.wantCalls(1, 1)
		time.Sleep(5 * time.Minute)
		r.wantCalls(1, 2)
	})
}

// TestRefreshJitter: what was confirmed together is not refreshed together.
func TestRefreshJitter(t *testing.T) {
	var numbers int
	random := func() float64 { numbers++; return float64(numbers%10) / 10 }
	bubble(t, func(r *rig) {
		defer r.run()()
		versions := r.manyAuthorities(10)
		seen := map[int]bool{}
		last := 0
		for range 300 {
			time.Sleep(time.Second)
			synctest.Wait()
			if _, asks := r.up.counts(); asks != last {
				seen[asks-last], last = true, asks
			}
		}
		if last != versions || len(seen) != 1 || !seen[1] {
			t.Errorf("%d refreshes in bursts of %v, want %d one by one", last, seen, versions)
		}
	}, func(cfg *cache.Config) { cfg.Rand = random })
}

func (r *rig) manyAuthorities(n int) int {
	for i := range n {
		f, k, err := r.decrypt(i, func(req *cache.DecryptRequest) { req.Authority.Version = string(rune('a' + i)) })
		served(r.t, f, k, err)
	}
	return n
}

// TestRefreshesAreBounded: a backend that hangs has a few in flight, and does
// not keep another from its own.
func TestRefreshesAreBounded(t *testing.T) {
	var mu sync.Mutex
	inFlight, most := map[string]int{}, map[string]int{}
	bubble(t, func(r *rig) {
		defer r.run()()
		for _, backend := range []string{"hangs", "works"} {
			for i := range 40 {
				f, k, err := r.decrypt(i, func(req *cache.DecryptRequest) {
					req.Authority.Backend, req.Authority.Version, req.Key = backend, string(rune('a'+i)), backend
				})
				served(t, f, k, err)
			}
		}
		time.Sleep(299 * time.Second)
		mu.Lock()
		defer mu.Unlock()
		if most["hangs"] == 0 || most["hangs"] > 8 {
			t.Errorf("%d refreshes in flight to the backend that hangs, want 1 to 8", most["hangs"])
		}
		old := 0
		for i := range 40 {
			a := unwraps
			a.Backend, a.Version = "works", string(rune('a'+i))
			if age, _ := r.Confirmed(a); age > 100*time.Second {
				old++
			}
		}
		if old > 0 {
			t.Errorf("%d of 40 confirmations of the backend that works were not renewed", old)
		}
	}, func(cfg *cache.Config) {
		cfg.Confirm = func(ctx context.Context, a cache.Authority, _ any) error {
			mu.Lock()
			inFlight[a.Backend]++
			most[a.Backend] = max(most[a.Backend], inFlight[a.Backend])
			mu.Unlock()
			defer func() { mu.Lock(); inFlight[a.Backend]--; mu.Unlock() }()
			if a.Backend == "works" {
				return nil
			}
			<-ctx.Done()
			return ctx.Err()
		}
	})
}

// TestRefreshInAnOutage: it is tried again, with pauses, as long as the data
// key is served; the first answer renews it, and nobody has noticed.
func TestRefreshInAnOutage(t *testing.T) {
	bubble(t, func(r *rig) {
		defer r.run()()
		f, n, err := r.encrypt()
		served(t, f, n, err)
		r.up.say(errDown, errDown)
		time.Sleep(270 * time.Second)
		synctest.Wait()
		_, asks := r.up.counts()
		if asks < 3 || asks > 10 {
			t.Errorf("%d refreshes in 30 s of outage, want some", asks)
		}
		r.up.say(nil, nil)
		time.Sleep(20 * time.Second)
		r.wantCalls(1, asks+1)
		time.Sleep(200 * time.Second)
		f, n, err = r.encrypt()
		if f = served(t, f, n, err); f.Source != cache.Cached {
			t.Errorf("source = %v, want cached", f.Source)
		}
	})
}

// TestRefreshStopsInALongOutage: nobody is served any more, so nobody is asked.
func TestRefreshStopsInALongOutage(t *testing.T) {
	bubble(t, func(r *rig) {
		defer r.run()()
		f, n, err := r.encrypt()
		served(t, f, n, err)
		r.up.say(errDown, errDown)
		time.Sleep(10 * time.Minute)
		_, before := r.up.counts()
		time.Sleep(time.Hour)
		r.wantCalls(1, before)
	})
}
