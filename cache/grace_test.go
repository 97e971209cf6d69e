package cache_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

const grace = time.Hour

// withGrace gives requests of both directions grace.
func graceful(r *cache.EncryptRequest)  { r.Limits.Grace = grace }
func graceful2(r *cache.DecryptRequest) { r.Limits.Grace = grace }

// both runs a test for each direction; use asks for the one data key.
func both(t *testing.T, test func(r *rig, a cache.Authority, use func() (cache.Freshness, error)), change ...func(*cache.Config)) {
	t.Helper()
	for _, d := range []cache.Direction{cache.Encrypt, cache.Decrypt} {
		t.Run(d.String(), func(t *testing.T) {
			bubble(t, func(r *rig) {
				if d == cache.Encrypt {
					test(r, wraps, func() (cache.Freshness, error) { f, _, err := r.encrypt(graceful); return f, err })
					return
				}
				test(r, unwraps, func() (cache.Freshness, error) { f, _, err := r.decrypt(1, graceful2); return f, err })
			}, change...)
		})
	}
}

func (r *rig) wantSource(what string, f cache.Freshness, err error, want cache.Source) {
	r.t.Helper()
	if err != nil || f.Source != want {
		r.t.Errorf("%s: source %v, %v; want %v", what, f.Source, err, want)
	}
}

func (r *rig) wantRefused(what string, f cache.Freshness, err, want error) {
	r.t.Helper()
	if err == nil {
		r.t.Errorf("%s: served (%v), want refused", what, f.Source)
		return
	}
	refused(r.t, err, want)
}

// TestGrace is the table of what is served while upstream does not answer, minute by
// minute: within max_age, in grace, after it.
func TestGrace(t *testing.T) {
	both(t, func(r *rig, _ cache.Authority, use func() (cache.Freshness, error)) {
		f, err := use()
		r.wantSource("at first", f, err, cache.Upstream)
		r.up.say(errDown, errDown)
		time.Sleep(5 * time.Minute)
		f, err = use()
		r.wantSource("at max_age", f, err, cache.Cached)
		time.Sleep(time.Nanosecond)
		f, err = use()
		r.wantSource("older", f, err, cache.Grace) // nobody had asked: this is the first failed call
		if f.Age != 5*time.Minute+1 || f.GraceLeft != grace-1 {
			t.Errorf("freshness %+v, want an age of 5m0.000000001s and an hour of grace since max_age", f)
		}
		time.Sleep(grace - 2)
		f, err = use()
		r.wantSource("at the end of grace", f, err, cache.Grace)
		if f.GraceLeft != 1 {
			t.Errorf("grace left %v, want 1ns", f.GraceLeft)
		}
		time.Sleep(time.Nanosecond)
		f, err = use()
		r.wantRefused("after grace", f, err, errDown)
		r.up.say(nil, nil)
		f, err = use()
		r.wantSource("back", f, err, cache.Upstream)
	})
}

// TestGraceFromTheFirstFailedCall: the clock of an outage begins when the first call
// fails, also when the confirmation is still good then.
func TestGraceFromTheFirstFailedCall(t *testing.T) {
	both(t, func(r *rig, _ cache.Authority, use func() (cache.Freshness, error)) {
		_, _ = use()
		stop := r.run()
		r.up.say(errDown, errDown)
		time.Sleep(5 * time.Minute) // the refresh ahead fails at 80 % of max_age
		f, err := use()
		r.wantSource("at max_age", f, err, cache.Cached)
		time.Sleep(time.Second)
		f, err = use()
		r.wantSource("in grace", f, err, cache.Grace)
		stop()
		if want := 4*time.Minute + grace - 5*time.Minute - time.Second; f.GraceLeft < want-2*time.Second || f.GraceLeft > want+2*time.Second {
			t.Errorf("grace left %v, want %v: from the first failed refresh at 4m", f.GraceLeft, want)
		}
	})
}

// TestNoGrace: without grace, or for who wants fresher keys than that.
func TestNoGrace(t *testing.T) {
	bubble(t, func(r *rig) {
		_, _, _ = r.encrypt(graceful)
		r.up.say(errDown, errDown)
		time.Sleep(6 * time.Minute)
		f, _, err := r.encrypt()
		r.wantRefused("a key without grace", f, err, errDown)
		f, _, err = r.encrypt(graceful)
		r.wantSource("a key with grace", f, err, cache.Grace)
		for _, bound := range []time.Duration{0, time.Minute, 6*time.Minute - 1} {
			f, _, err = r.encrypt(graceful, func(q *cache.EncryptRequest) { q.MaxStale = stale(bound) })
			r.wantRefused(fmt.Sprintf("max_stale %v", bound), f, err, errDown)
		}
		f, _, err = r.encrypt(graceful, func(q *cache.EncryptRequest) { q.MaxStale = stale(6 * time.Minute) })
		r.wantSource("max_stale 6m", f, err, cache.Grace)
	})
}

// TestNothingCachedInAnOutage: a data key that is not there is not conjured up.
func TestNothingCachedInAnOutage(t *testing.T) {
	bubble(t, func(r *rig) {
		_, _, _ = r.decrypt(1, graceful2)
		r.up.say(errDown, errDown)
		began := time.Now()
		f, _, err := r.decrypt(2, graceful2)
		r.wantRefused("another data key", f, err, errDown)
		if d := time.Since(began); d != 0 {
			t.Errorf("refused after %v, want at once", d)
		}
	})
}

// TestFlappingAddsNoTime: however often an upstream comes and goes, nothing serves
// longer than its grace after it was confirmed last.
func TestFlappingAddsNoTime(t *testing.T) {
	bubble(t, func(r *rig) {
		other := func(q *cache.EncryptRequest) { q.Slot.Partition, q.Slot.Authority.Version = "bob", "2" }
		_, _, _ = r.encrypt(graceful)
		_, _, _ = r.encrypt(graceful, other)
		last := time.Now()
		for time.Since(last) < 5*time.Minute+grace-time.Minute {
			// Version 2 is confirmed now and then, version 1 never again.
			r.up.say(nil, nil)
			if _, _, err := r.encrypt(graceful, other, func(q *cache.EncryptRequest) { q.MaxStale = stale(0) }); err != nil {
				t.Fatal(err)
			}
			r.up.say(errDown, errDown)
			time.Sleep(time.Minute)
			f, _, err := r.encrypt(graceful)
			want := cache.Grace
			if time.Since(last) <= 5*time.Minute {
				want = cache.Cached
			}
			r.wantSource(time.Since(last).String(), f, err, want)
		}
		time.Sleep(time.Minute)
		f, _, err := r.encrypt(graceful)
		r.wantRefused("an hour after max_age", f, err, errDown)
	})
}

// TestNoOutageByCallers: neither a caller's end nor an error that is its own affair
// begins an outage.
func TestNoOutageByCallers(t *testing.T) {
	both(t, func(r *rig, a cache.Authority, use func() (cache.Freshness, error)) {
		_, _ = use()
		time.Sleep(6 * time.Minute)
		r.up.takes(500 * time.Millisecond)
		ctx, cancel := context.WithTimeout(r.t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := r.Renew(ctx, a, cache.Limits{MaxAge: time.Minute, Grace: grace}, nil)
		refused(r.t, err, context.DeadlineExceeded)
		r.up.say(errOther, errOther)
		time.Sleep(6 * time.Minute) // meanwhile the answer has come that nobody waited for
		if _, err := use(); err == nil {
			t.Error("served by an answer that says nothing")
		}
		if o := r.Outages(); len(o) != 0 {
			t.Errorf("outages %+v, want none", o)
		}
		if s := r.Standing(a, cache.Limits{MaxAge: time.Minute, Grace: grace}); s.Down {
			t.Errorf("standing %+v, want that upstream is not down", s)
		}
	})
}

// TestRevokedInGrace: a no ends grace at once, also where the answer takes its time,
// and what it covers is destroyed.
func TestRevokedInGrace(t *testing.T) {
	both(t, func(r *rig, a cache.Authority, use func() (cache.Freshness, error)) {
		_, _ = use()
		r.up.say(errDown, errDown)
		time.Sleep(10 * time.Minute)
		f, err := use()
		r.wantSource("in grace", f, err, cache.Grace)
		stop := r.run()
		r.up.say(errNo, errNo)
		time.Sleep(5 * time.Minute) // as long as two refreshes may be apart
		synctest.Wait()
		stop()
		f, err = use()
		r.wantRefused("revoked", f, err, errNo)
		synctest.Wait() // what made sure of that has its answer
		r.up.say(errDown, errDown)
		f, err = use()
		r.wantRefused("away again: a no stays a no", f, err, cache.ErrRevoked)
		if s := r.Stats(); s.EncryptionKeys+s.DecryptionKeys != 0 {
			t.Errorf("%d data keys survived the revocation", s.EncryptionKeys+s.DecryptionKeys)
		}
	})
}

// TestSlowUpstream: a confirmation that does not come makes nobody wait for longer
// than their patience, and the grace of what it is asked for begins.
func TestSlowUpstream(t *testing.T) {
	both(t, func(r *rig, a cache.Authority, use func() (cache.Freshness, error)) {
		_, _ = use()
		time.Sleep(6 * time.Minute)
		r.up.takes(5 * time.Second)
		began := time.Now()
		f, err := use()
		r.wantSource("slow", f, err, cache.Grace)
		if d := time.Since(began); d != time.Second {
			t.Errorf("waited %v, want 1s", d)
		}
		f, err = use()
		r.wantSource("slow, again", f, err, cache.Grace)
		if d := time.Since(began); d != time.Second {
			t.Errorf("the next waited too: %v", d)
		}
		time.Sleep(4 * time.Second)
		synctest.Wait()
		f, err = use()
		r.wantSource("the answer has come", f, err, cache.Cached)
		if s := r.Standing(a, limits()); s.Down {
			t.Error("upstream is still taken to be away")
		}
	})
}

// TestSuspendedHost: time goes on while the host sleeps.
func TestSuspendedHost(t *testing.T) {
	var asleep time.Duration
	both(t, func(r *rig, _ cache.Authority, use func() (cache.Freshness, error)) {
		asleep = 0
		_, _ = use()
		r.up.say(errDown, errDown)
		time.Sleep(6 * time.Minute)
		f, err := use()
		r.wantSource("in grace", f, err, cache.Grace)
		asleep = grace
		f, err = use()
		r.wantRefused("after a night", f, err, errDown)
	}, func(c *cache.Config) {
		now := c.Now
		c.Now = func() time.Duration { return now() + asleep }
	})
}

// TestIdleInAnOutage: max_idle does not count while upstream is away.
func TestIdleInAnOutage(t *testing.T) {
	bubble(t, func(r *rig) {
		defer r.run()()
		idle := func(q *cache.DecryptRequest) { q.Limits.MaxIdle, q.Limits.Grace = 10*time.Minute, grace }
		_, _, _ = r.decrypt(1, idle)
		_, _, _ = r.decrypt(2, idle)
		r.up.say(errDown, errDown)
		for range 8 { // the second is in use
			time.Sleep(5 * time.Minute)
			_, _, _ = r.decrypt(2, idle)
		}
		f, _, err := r.decrypt(1, idle)
		r.wantSource("idle for 40m", f, err, cache.Grace)
		r.up.say(nil, nil)
		time.Sleep(15 * time.Minute)
		synctest.Wait()
		if s := r.Stats(); s.DecryptionKeys > 1 {
			t.Errorf("%d data keys, want that the idle ones have gone after the outage", s.DecryptionKeys)
		}
	})
}

// TestOutagesAreTold: once when one has lasted, and once when it is over, with what
// it cost; a call that fails now and then is none.
func TestOutagesAreTold(t *testing.T) {
	var told []cache.Outage
	bubble(t, func(r *rig) {
		defer r.run()()
		_, _, _ = r.encrypt(graceful)
		r.up.say(errDown, errDown)
		_, _, _ = r.decrypt(1)
		r.up.say(nil, nil)
		_, _, _ = r.decrypt(1)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if len(told) != 0 {
			t.Fatalf("told of %+v", told)
		}
		r.up.say(errDown, errDown)
		time.Sleep(6 * time.Minute)
		for range 3 {
			f, _, err := r.encrypt(graceful)
			r.wantSource("in grace", f, err, cache.Grace)
		}
		f, _, err := r.decrypt(7, graceful2)
		r.wantRefused("nothing cached", f, err, errDown)
		r.up.say(nil, nil)
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if len(told) != 2 || told[0].Over || !told[1].Over {
			t.Fatalf("told of %+v, want a beginning and an end", told)
		}
		if o := told[1]; o.Backend != "b" || o.Grace != 3 || o.Refused != 1 || o.Err == nil || o.Lasts < 2*time.Minute {
			t.Errorf("the end: %+v, want 3 served in grace, 1 refused", o)
		}
	}, func(c *cache.Config) { c.OnOutage = func(o cache.Outage) { told = append(told, o) } })
}

// TestReached: an outage of which nothing is left ends when the backend is heard of.
func TestReached(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.say(errDown, errDown)
		_, _, _ = r.decrypt(1)
		if len(r.Outages()) != 1 {
			t.Fatal("no outage")
		}
		r.Reached("b")
		if o := r.Outages(); len(o) != 0 {
			t.Errorf("outages %+v, want none", o)
		}
	})
}

// TestReachedAfterGrace: so does one of data keys that serve nobody any more, for each
// wrapping key and whatever others have heard; in grace their refresh tells. None of them
// serves again because of that.
func TestReachedAfterGrace(t *testing.T) {
	for name, tc := range map[string]struct {
		grace, away time.Duration
		over        bool
	}{
		"no grace":        {0, 6 * time.Minute, true},
		"in grace":        {grace, 6 * time.Minute, false},
		"grace just over": {grace, grace + 4*time.Minute, false}, // an outage that began later would have some left
		"grace is over":   {grace, grace + 6*time.Minute, true},
	} {
		t.Run(name, func(t *testing.T) {
			both(t, func(r *rig, a cache.Authority, _ func() (cache.Freshness, error)) {
				l := limits()
				l.Grace = tc.grace
				use := func() error {
					if a.Direction == cache.Encrypt {
						_, _, err := r.encrypt(func(q *cache.EncryptRequest) { q.Limits = l })
						return err
					}
					_, _, err := r.decrypt(1, func(q *cache.DecryptRequest) { q.Limits = l })
					return err
				}
				if err := use(); err != nil {
					t.Fatal(err)
				}
				r.up.say(errDown, errDown)
				r.Observe(a, cache.Unreachable, errDown, r.Now())
				time.Sleep(tc.away)
				before := use()
				other := a
				other.WrappingKey = "another"
				r.Observe(other, cache.Yes, nil, r.Now()) // ends the outage of the backend, not of this key
				if !r.Standing(a, l).Down {
					t.Fatal("no outage")
				}
				r.Reached("b")
				if s := r.Standing(a, l); s.Down == tc.over {
					t.Errorf("standing %+v, want that the outage is over: %v", s, tc.over)
				}
				if after := use(); (after == nil) != (before == nil) {
					t.Errorf("used: %v before, %v after", before, after)
				}
			})
		})
	}
}

// TestRevisit: what nobody else asks about is asked about once, where it is not well.
func TestRevisit(t *testing.T) {
	for name, tc := range map[string]struct {
		makes func(r *rig)
		asks  int
		heals bool
	}{
		"unknown": {func(*rig) {}, 0, false},
		"well":    {func(r *rig) { _, _, _ = r.encrypt(graceful) }, 0, true},
		"revoked": {func(r *rig) {
			_, _, _ = r.encrypt(graceful)
			r.up.say(errNo, errNo)
			r.Observe(wraps, cache.No, errNo, r.Now())
			synctest.Wait()
		}, 1, true},
		"in grace": {func(r *rig) {
			_, _, _ = r.encrypt(graceful)
			r.Observe(wraps, cache.Unreachable, errDown, r.Now())
		}, 0, false},
		"after grace": {func(r *rig) {
			_, _, _ = r.encrypt(graceful)
			r.Observe(wraps, cache.Unreachable, errDown, r.Now())
			time.Sleep(2 * grace)
		}, 1, true},
		"evicted in an outage": {func(r *rig) {
			_, _, _ = r.encrypt(graceful)
			r.Observe(wraps, cache.Unreachable, errDown, r.Now())
			r.EvictKey("orders")
		}, 1, true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(r *rig) {
				tc.makes(r)
				_, before := r.up.counts()
				r.up.say(nil, nil)
				r.up.takes(time.Second)
				for range 3 {
					r.Revisit(wraps)
				}
				time.Sleep(2 * time.Second)
				_, after := r.up.counts()
				if after-before != tc.asks {
					t.Errorf("%d questions, want %d", after-before, tc.asks)
				}
				s := r.Standing(wraps, limits())
				if heals := s.Confirmed && !s.Down && s.Refused == nil; heals != tc.heals {
					t.Errorf("standing %+v, want that it is well: %v", s, tc.heals)
				}
			})
		})
	}
}

// TestOwnRequestsAreNoCost: what the agent itself holds ready is nobody's request, served
// or not.
func TestOwnRequestsAreNoCost(t *testing.T) {
	bubble(t, func(r *rig) {
		held := func(q *cache.DecryptRequest) { q.Caller, q.Hold = "", true }
		_, _, _ = r.decrypt(1, graceful2, held)
		r.up.say(errDown, errDown)
		time.Sleep(6 * time.Minute)
		for range 5 {
			f, _, err := r.decrypt(1, graceful2, held)
			r.wantSource("held", f, err, cache.Grace)
			f, _, err = r.decrypt(2, graceful2, held)
			r.wantRefused("not there", f, err, errDown)
		}
		if s := r.Stats(); s.InGrace != 0 || s.Unserved != 0 {
			t.Errorf("%d served in grace and %d not served, want none", s.InGrace, s.Unserved)
		}
		if o := r.Outages(); len(o) != 1 || o[0].Grace != 0 || o[0].Refused != 0 {
			t.Errorf("outages %+v, want one that has cost nothing", o)
		}
	})
}

// TestForgottenBackends: one that is not configured any more has no outage.
func TestForgottenBackends(t *testing.T) {
	bubble(t, func(r *rig) {
		_, _, _ = r.encrypt(graceful)
		r.up.say(errDown, errDown)
		time.Sleep(6 * time.Minute)
		_, _, _ = r.encrypt(graceful)
		if len(r.Outages()) != 1 {
			t.Fatal("no outage")
		}
		r.EvictKey("orders")
		r.Forget("b")
		if o := r.Outages(); len(o) != 0 {
			t.Errorf("outages %+v of what is not configured any more", o)
		}
	})
}
