package cache_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

// TestANo: who hears it first, and what the agent hears when it asks for
// itself.
func TestANo(t *testing.T) {
	hear := map[string]func(*rig){
		"from a fill": func(r *rig) {
			_, _, err := r.decrypt(99)
			refused(r.t, err, errNo)
		},
		"from a confirmation": func(r *rig) {
			_, _, err := r.decrypt(1, func(req *cache.DecryptRequest) { req.MaxStale = stale(0) })
			refused(r.t, err, errNo)
		},
		"from elsewhere": func(r *rig) { r.Observe(unwraps, cache.No, nil, r.Now()) },
	}
	probes := []struct {
		name  string
		say   error
		after error // what a request for the cached data key hears then
		kept  uint64
	}{
		{"lifted", nil, nil, 1},
		{"confirmed", errNo, cache.ErrRevoked, 0},
		{"inconclusive", errDown, cache.ErrSuspended, 1},
		{"something else", errOther, cache.ErrSuspended, 1},
	}
	for how, hear := range hear {
		for _, p := range probes {
			t.Run(how+", "+p.name, func(t *testing.T) {
				bubble(t, func(r *rig) {
					f, n, err := r.decrypt(1)
					served(t, f, n, err)
					f, n, err = r.encrypt()
					served(t, f, n, err)
					time.Sleep(time.Second)
					r.up.say(errNo, p.say)
					if how == "from a confirmation" {
						r.up.sayOnce(errNo)
					}
					hear(r)
					synctest.Wait()
					if err := r.Recheck(unwraps); (err == nil) != (p.after == nil) {
						t.Errorf("Recheck = %v, want %v", err, p.after)
					} else {
						refused(t, err, p.after)
					}
					if s := r.Stats(); s.DecryptionKeys != p.kept {
						t.Errorf("%d data keys are left, want %d", s.DecryptionKeys, p.kept)
					}
					if p.kept == 1 {
						_, _, err = r.decrypt(1)
						refused(t, err, p.after)
					}
					// Exactly the one authority: the other direction knows nothing.
					f, n, err = r.encrypt()
					if f = served(t, f, n, err); f.Source != cache.Cached {
						t.Errorf("the other direction: %v, want cached", f.Source)
					}
					refused(t, r.Recheck(wraps), nil)
				})
			})
		}
	}
}

// sayOnce has the next confirmation hear something else.
func (u *upstream) sayOnce(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.once = err
}

// TestALaterYes clears: from a probe, from the caller's own fill after a
// revocation, from traffic elsewhere.
func TestALaterYes(t *testing.T) {
	hear := map[string]func(*rig){
		"from a probe": func(r *rig) {
			r.up.say(errDown, nil)
			f, n, err := r.decrypt(1)
			served(r.t, f, n, err)
		},
		"from elsewhere": func(r *rig) { r.Observe(unwraps, cache.Yes, nil, r.Now()) },
		"from a fill": func(r *rig) {
			r.up.say(nil, errDown)
			f, n, err := r.decrypt(2)
			served(r.t, f, n, err)
		},
		"from the sweep": func(r *rig) {
			r.up.say(errDown, nil)
			stop := r.run()
			time.Sleep(15 * time.Second)
			stop()
		},
	}
	for how, hear := range hear {
		t.Run(how, func(t *testing.T) {
			bubble(t, func(r *rig) {
				f, n, err := r.decrypt(1)
				served(t, f, n, err)
				time.Sleep(time.Minute)
				r.up.say(errNo, errDown)
				r.Observe(unwraps, cache.No, nil, r.Now())
				synctest.Wait()
				time.Sleep(time.Minute)
				refused(t, r.Recheck(unwraps), cache.ErrSuspended)
				hear(r)
				refused(t, r.Recheck(unwraps), nil)
				f, n, err = r.decrypt(1)
				served(t, f, n, err)
			})
		})
	}
}

// TestRevokedThenYes: with nothing cached the caller's own question is the
// probe, once a second for each caller; one yes and all are served.
func TestRevokedThenYes(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.say(errNo, errNo)
		_, _, err := r.decrypt(1)
		refused(t, err, errNo)
		r.wantCalls(1, 1)
		bob := func(req *cache.DecryptRequest) { req.Caller = "bob" }
		for range 10 {
			for _, caller := range []func(*cache.DecryptRequest){func(*cache.DecryptRequest) {}, bob} {
				_, _, err = r.decrypt(1, caller)
				refused(t, err, errNo)
			}
		}
		r.wantCalls(3, 1) // each caller tried for itself
		time.Sleep(time.Second)
		_, _, err = r.decrypt(1)
		refused(t, err, errNo)
		r.wantCalls(4, 2) // its no was made sure of again
		_, _, err = r.decrypt(1)
		refused(t, err, cache.ErrRevoked)
		refused(t, err, errNo)
		time.Sleep(time.Second)
		r.up.say(nil, errDown)
		f, n, err := r.decrypt(1, bob)
		served(t, f, n, err)
		f, n, err = r.decrypt(1)
		served(t, f, n, err)
	})
}

// TestNobodyTakesTheProbe: a caller that floods a suspended key with what can
// only fail does not keep the others from hearing that it is good again.
func TestNobodyTakesTheProbe(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.say(errNo, errDown) // no means of the agent's own
		_, _, err := r.decrypt(1)
		refused(t, err, errNo)
		time.Sleep(time.Minute)
		r.up.say(nil, errDown)
		for i := range 100 {
			_, _, err = r.decrypt(1000+i, func(req *cache.DecryptRequest) {
				req.Caller, req.Fill = "mallory", given(nil, errOther)
			})
			if i == 0 {
				refused(t, err, errOther) // upstream's word on the request itself
			} else {
				refused(t, err, cache.ErrSuspended)
			}
		}
		f, n, err := r.decrypt(1)
		served(t, f, n, err)
	})
}

// TestEarlierYes: one that began before the no was heard proves nothing.
func TestEarlierYes(t *testing.T) {
	t.Run("observed", func(t *testing.T) {
		bubble(t, func(r *rig) {
			f, n, err := r.decrypt(1)
			served(t, f, n, err)
			r.up.say(errDown, errDown)
			began := r.Now()
			time.Sleep(time.Second)
			r.Observe(unwraps, cache.No, nil, r.Now())
			r.Observe(unwraps, cache.Yes, nil, began)
			refused(t, r.Recheck(unwraps), cache.ErrSuspended)
		})
	})
	t.Run("before the last no", func(t *testing.T) {
		bubble(t, func(r *rig) {
			r.up.say(errDown, errDown)
			r.Observe(unwraps, cache.No, nil, r.Now())
			time.Sleep(time.Second)
			began := r.Now()
			time.Sleep(time.Second)
			r.Observe(unwraps, cache.No, nil, r.Now())
			r.Observe(unwraps, cache.Yes, nil, began)
			refused(t, r.Recheck(unwraps), cache.ErrSuspended)
		})
	})
	t.Run("a refresh", func(t *testing.T) {
		bubble(t, func(r *rig) {
			f, n, err := r.decrypt(1)
			served(t, f, n, err)
			time.Sleep(6 * time.Minute)
			r.up.takes(time.Second)
			var wg sync.WaitGroup
			wg.Go(func() { // its refresh says yes, but began before the no; the probe says no twice
				_, _, err := r.decrypt(1)
				refused(t, err, errNo)
			})
			time.Sleep(time.Millisecond)
			r.up.say(errNo, errNo)
			r.Observe(unwraps, cache.No, nil, r.Now())
			wg.Wait()
			refused(t, r.Recheck(unwraps), cache.ErrRevoked)
			r.wantCalls(1, 2)
		})
	})
	t.Run("a fill", func(t *testing.T) {
		bubble(t, func(r *rig) {
			r.up.takes(time.Second)
			var wg sync.WaitGroup
			wg.Go(func() {
				_, _, err := r.decrypt(1)
				refused(t, err, errNo)
			})
			time.Sleep(500 * time.Millisecond)
			r.up.say(errNo, errNo)
			r.up.takes(0)
			r.Observe(unwraps, cache.No, nil, r.Now())
			synctest.Wait()
			refused(t, r.Recheck(unwraps), cache.ErrRevoked)
			wg.Wait()
			if s := r.Stats(); s.DecryptionKeys != 0 {
				t.Error("a data key from before the revocation is kept")
			}
		})
	})
}

// TestQuestionFromBeforeTheNo: the answer to a refresh that was under way when
// the no was heard makes sure of nothing. The question is asked again.
func TestQuestionFromBeforeTheNo(t *testing.T) {
	cases := []struct {
		name           string
		refresh, probe error
		want           error
	}{
		{"no, then no answer", errNo, errDown, cache.ErrSuspended},
		{"no, then yes", errNo, nil, nil},
		{"no, then no", errNo, errNo, cache.ErrRevoked},
		{"no answer, then yes", errDown, nil, nil},
		{"no answer, then no", errDown, errNo, cache.ErrRevoked},
		{"yes, then no answer", nil, errDown, cache.ErrSuspended},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, func(r *rig) {
				f, n, err := r.decrypt(1)
				served(t, f, n, err)
				time.Sleep(6 * time.Minute)
				r.up.takes(time.Second)
				r.up.say(nil, tc.refresh)
				ctx, cancel := context.WithTimeout(r.t.Context(), 100*time.Millisecond)
				defer cancel()
				_, err = r.Decrypt(ctx, r.decryption(1)) // begins the refresh and leaves
				refused(t, err, context.DeadlineExceeded)
				time.Sleep(400 * time.Millisecond)
				r.up.say(nil, tc.probe)
				r.Observe(unwraps, cache.No, nil, r.Now())
				time.Sleep(time.Minute)
				r.wantCalls(1, 2)
				refused(t, r.Recheck(unwraps), tc.want)
			})
		})
	}
}

// TestRequestsWaitForTheProbe: while the agent makes sure of a no, requests for
// what is cached wait, and are served when it is lifted.
func TestRequestsWaitForTheProbe(t *testing.T) {
	bubble(t, func(r *rig) {
		f, n, err := r.decrypt(1)
		served(t, f, n, err)
		r.up.takes(time.Second)
		r.Observe(unwraps, cache.No, nil, r.Now())
		refused(t, r.Recheck(unwraps), cache.ErrSuspended)
		f, n, err = r.decrypt(1)
		served(t, f, n, err)
		r.wantCalls(1, 1)
	})
}

// TestProbesAreBounded: a thousand nos at once are made sure of a few at a time.
func TestProbesAreBounded(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.takes(time.Second)
		for i := range 1000 {
			a := unwraps
			a.Version = string(rune(i))
			r.Observe(a, cache.No, nil, r.Now())
			r.Observe(a, cache.No, nil, r.Now())
		}
		r.wantCalls(0, 8)
	})
}

// TestSuspendedInAnOutage: a suspended authority stays so, and is asked about
// now and then, by requests and by the sweep.
func TestSuspendedInAnOutage(t *testing.T) {
	bubble(t, func(r *rig) {
		f, n, err := r.decrypt(1)
		served(t, f, n, err)
		r.up.say(errDown, errDown)
		r.Observe(unwraps, cache.No, nil, r.Now())
		for range 100 {
			synctest.Wait()
			_, _, err = r.decrypt(1)
			refused(t, err, cache.ErrSuspended)
		}
		r.wantCalls(1, 1)
		for range 10 {
			time.Sleep(time.Second)
			_, _, err = r.decrypt(1)
			refused(t, err, cache.ErrSuspended)
		}
		r.wantCalls(1, 11)
		defer r.run()()
		time.Sleep(101 * time.Second)
		if _, asks := r.up.counts(); asks < 19 || asks > 23 {
			t.Errorf("%d confirmations in 100 s of sweeps, want about 10", asks-11)
		}
	})
}

// TestStreamsKeepASuspension: as long as somebody asks about it, it is not
// forgotten.
func TestStreamsKeepASuspension(t *testing.T) {
	bubble(t, func(r *rig) {
		defer r.run()()
		r.up.say(errNo, errNo)
		_, _, err := r.decrypt(1)
		refused(t, err, errNo)
		for range 24 {
			time.Sleep(30 * time.Minute)
			refused(t, r.Recheck(unwraps), cache.ErrRevoked)
		}
		time.Sleep(2 * time.Hour)
		if s := r.Stats(); s.Authorities != 0 {
			t.Errorf("%d authorities are remembered after two hours without a question", s.Authorities)
		}
	})
}

// TestReasonIsKept: a no without a reason does not hide the one that had one.
func TestReasonIsKept(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.say(errNo, errDown)
		_, _, err := r.decrypt(1)
		refused(t, err, errNo)
		r.Observe(unwraps, cache.No, nil, r.Now())
		refused(t, r.Recheck(unwraps), errNo)
	})
	bubble(t, func(r *rig) { // nor is that of a call past the cache lost
		r.up.say(errDown, errDown)
		r.Observe(unwraps, cache.No, errNo, r.Now())
		r.Observe(unwraps, cache.No, nil, r.Now())
		refused(t, r.Recheck(unwraps), errNo)
		r.Withhold(wraps, errNo)
		refused(t, r.Recheck(wraps), errNo)
	})
}

func TestObserve(t *testing.T) {
	bubble(t, func(r *rig) {
		if _, ok := r.Confirmed(wraps); ok {
			t.Error("confirmed from the start")
		}
		r.Observe(wraps, cache.Unreachable, nil, r.Now())
		r.Observe(wraps, cache.Other, nil, r.Now())
		if s := r.Stats(); s.Authorities != 0 {
			t.Error("what says nothing is remembered")
		}
		r.Observe(wraps, cache.Yes, nil, r.Now())
		time.Sleep(time.Minute)
		if age, ok := r.Confirmed(wraps); !ok || age != time.Minute {
			t.Errorf("Confirmed = %v, %v; want 1m", age, ok)
		}
		r.Observe(wraps, cache.Yes, nil, r.Now()-2*time.Minute) // an older one changes nothing
		if age, _ := r.Confirmed(wraps); age != time.Minute {
			t.Errorf("Confirmed = %v, want 1m", age)
		}
		// A yes from elsewhere renews what is cached.
		f, n, err := r.encrypt()
		served(t, f, n, err)
		time.Sleep(6 * time.Minute)
		r.Observe(wraps, cache.Yes, nil, r.Now()-time.Minute)
		f, n, err = r.encrypt()
		if f = served(t, f, n, err); f.Source != cache.Cached || f.Age != time.Minute {
			t.Errorf("freshness = %+v, want cached, 1m", f)
		}
		r.wantCalls(1, 0)
	})
}
