package hsm_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
)

// A token that fails slowly is attached again soon, however many keys there are to be
// asked: that may be all that it needs.
func TestSlowFailureIsAttachedAgain(t *testing.T) {
	for _, c := range []struct{ keys, sleep int }{{3, 120}, {18, 120}, {18, 700}} {
		t.Run(fmt.Sprintf("%d keys, %d ms", c.keys, c.sleep), func(t *testing.T) {
			r, fault := newFaultyRig(t)
			m := material(32)
			var v *hsm.Version
			var wrapped []byte
			for i := range c.keys {
				v = r.key(fmt.Sprintf("k%d", i), hsm.GCM)
				wrapped = r.wrap(v, m)
			}
			fault.Set(fmt.Sprintf("C_DecryptInit rv=0x6 sleep_ms=%d", c.sleep))
			fault.Calls()
			var last error
			for i := range 6 { // each has the time that the agent gives
				ctx, cancel := context.WithTimeout(t.Context(), 1800*time.Millisecond)
				if i%2 == 0 {
					_, last = r.Unwrap(ctx, v, nil, wrapped, bound)
				} else {
					last = r.Check(ctx)
				}
				cancel()
				if fault.Calls()["C_Initialize"] > 0 {
					return
				}
			}
			t.Errorf("6 calls, and the connection was never made anew: %v", last)
		})
	}
}

// Whatever a token answers for one ill key, it is an outage of that key.
func TestIllKeyWithAnyCode(t *testing.T) {
	for _, code := range []string{"0x7", "0x30", "0x31", "0x60", "0x82", "0x91", "0x101"} {
		t.Run(code, func(t *testing.T) {
			r, fault := newFaultyRig(t, hasty)
			bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
			m := material(32)
			wrappedBad, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
			fault.Set("ill /bad/", "ill-code "+code)
			for range 5 {
				r.ofVersion(bad, wrappedBad)
				r.opens(good, wrappedGood, m)
			}
			if err := r.Verify(bounded(t), bad); !hsm.OfVersion(err) {
				t.Errorf("Verify: %v, want an outage of this version", err)
			}
			if err := errors.Join(r.Verify(bounded(t), good), r.Check(bounded(t))); err != nil {
				t.Errorf("of the key beside it, and of the token: %v", err)
			}
			r.keepsConnection()
			fault.Set()
			r.isWell(bad, wrappedBad, m)
		})
	}
}

// So it is with few sessions, and for many callers at once: what one of them finds out
// about sessions, handles and logins takes nothing from the others.
func TestIllKeyOfManyCallersWithFewSessions(t *testing.T) {
	for _, sessions := range []int{1, 2} {
		for _, code := range []string{"0x91", "0x101"} {
			t.Run(fmt.Sprint(sessions, " ", code), func(t *testing.T) {
				r, fault := newFaultyRig(t, func(_ *rig, c *hsm.Config) { c.Sessions, c.Stay = sessions, true })
				bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
				m := material(32)
				wrappedBad, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
				r.opens(good, wrappedGood, m)
				fault.Set("ill /bad/", "ill-code "+code)
				callers := newCrowd(1500 * time.Millisecond) // it is looked at twice
				callers.add(8, 0, func() {
					if _, err := r.Unwrap(bounded(t), bad, nil, wrappedBad, bound); !hsm.OfVersion(err) {
						t.Errorf("%v, want an outage of this version", err)
					}
				})
				callers.add(1, 0, func() {
					if _, err := r.Unwrap(bounded(t), good, nil, wrappedGood, bound); err != nil {
						t.Errorf("the key beside it: %v", err)
					}
				})
				callers.wg.Wait()
				r.keepsConnection()
			})
		}
	}
}

// Whatever a token answers to the wraps of one ill key, it is an outage of those.
func TestIllWrapsWithAnyCode(t *testing.T) {
	for _, code := range []string{"0x7", "0x20", "0x21", "0x30", "0x60", "0x91", "0x101"} {
		t.Run(code, func(t *testing.T) {
			r, fault := newFaultyRig(t, hasty)
			bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
			m := material(32)
			wrapped := r.wrap(bad, m)
			r.wrap(good, m)
			fault.Set("ill-wraps /bad/", "ill-code "+code)
			for range 3 {
				r.wrapsNot(bad)
				r.wrap(good, m)
				r.opens(bad, wrapped, m)
			}
			r.keepsConnection()
		})
	}
}

// wrapsNot fails a test where a wrap is not told as an outage of this version alone.
func (r *rig) wrapsNot(v *hsm.Version) {
	r.t.Helper()
	if _, err := r.Wrap(bounded(r.t), v, nil, material(32), bound); !hsm.OfVersion(err) {
		r.t.Errorf("Wrap: kind %v, %v; want an outage of this version", hsm.KindOf(err), err)
	}
}

// Reads of a key that wraps and does not open use up no more of its wraps than one test.
func TestReadsWearNextToNothing(t *testing.T) {
	var c *hsm.Counter
	r, fault := newFaultyRig(t, counted(&c, 4096))
	bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	wrappedBad, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
	before, _, err := c.Used(bad)
	if err != nil {
		t.Fatal(err)
	}
	fault.Set("ill-opens /bad/")
	for range 10 {
		r.logOut() // so that it is looked at anew
		r.opens(good, wrappedGood, m)
		r.ofVersion(bad, wrappedBad)
	}
	if after, limit, err := c.Used(bad); err != nil || after > before+2 {
		t.Errorf("10 reads: %d wraps are counted of %d, and were %d: %v", after, limit, before, err)
	}
	fault.Set()
	r.isWell(bad, wrappedBad, m)
}

// A token that stumbles twice tells no other key by it.
func TestTokenThatStumblesIsNoRefusal(t *testing.T) {
	for _, skip := range []int{1, 2, 3} {
		t.Run(fmt.Sprint(skip), func(t *testing.T) {
			r, fault := newFaultyRig(t)
			v, _ := r.key("orders", hsm.GCM), r.key("other", hsm.GCM)
			m := material(32)
			wrapped := r.wrap(v, m)
			r.logOut()
			fault.Set("C_Decrypt rv=0x6 count=1", fmt.Sprintf("C_Decrypt skip=%d rv=0x6 count=1", skip))
			r.opens(v, wrapped, m)
		})
	}
}

// Pairs, whose public keys may be spoiled, do not speak for secret keys: one of those is found.
func TestWitnessBesidePairs(t *testing.T) {
	r, fault := newFaultyRig(t)
	bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	_, _ = r.wrap(bad, m), r.wrap(good, m)
	for i := range 4 {
		pair := r.key(fmt.Sprintf("pair%d", i), hsm.OAEPSHA1)
		r.opens(pair, r.wrap(pair, m), m)
	}
	fault.Set("ill-wraps /bad/")
	r.wrapsNot(bad)
	r.wrap(good, m)
}

// Older versions of an ill key are no witnesses against the token.
func TestWitnessBesideOldVersions(t *testing.T) {
	r, fault := newFaultyRig(t)
	bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	r.wrap(good, m)
	for range 4 {
		r.opens(bad, r.wrap(bad, m), m)
		k, err := r.Rotate(bounded(t), "bad", hsm.GCM)
		if err != nil {
			t.Fatal(err)
		}
		bad = k.Versions[len(k.Versions)-1]
	}
	fault.Set("ill-wraps /bad/")
	r.wrapsNot(bad)
	r.wrap(good, m)
}

// Keys whose wraps must not be made, as nobody can count them, say nothing of the token's.
func TestWitnessesThatCannotBeCounted(t *testing.T) {
	var count *hsm.Counter
	r, fault := newFaultyRig(t, hasty, func(r *rig, cfg *hsm.Config) {
		var err error
		if count, err = hsm.OpenCounter(r.path(""), (1<<32)/16, nil); err != nil {
			t.Fatal(err)
		}
		cfg.Wraps = count
	})
	bad, good := r.key("bad", hsm.CBCHMAC), r.key("good", hsm.GCM)
	m := material(32)
	_, wrapped := r.wrap(bad, m), r.wrap(good, m)
	_ = count.Close() // gives back what is reserved
	if err := os.WriteFile(r.path("wraps.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	fault.Set("ill-wraps /bad/")
	r.wrapsNot(bad)
	r.opens(good, wrapped, m)
}

// wrapsNothing waits until it is told that the token wraps nothing: as long as another key
// has just wrapped, it is said of one alone.
func (r *rig) wrapsNothing(v *hsm.Version) {
	r.t.Helper()
	eventually(r.t, "told that the token is broken", func() error {
		_, err := r.Wrap(bounded(r.t), v, nil, material(32), bound)
		if hsm.KindOf(err) == hsm.Broken {
			return nil
		}
		return fmt.Errorf("Wrap: %w", err)
	})
}

// A pair that is too ill to wrap is an outage of its wraps, and left alone for a while.
// Where no key wraps it is the token, with pairs as with secret keys.
func TestPairThatIsTooIllToWrap(t *testing.T) {
	r, fault := newFaultyRig(t)
	m := material(32)
	pairs := make([]*hsm.Version, 3)
	for i := range pairs {
		pairs[i] = r.key(fmt.Sprintf("pair%d", i), hsm.OAEPSHA1)
		r.opens(pairs[i], r.wrap(pairs[i], m), m)
	}
	fault.Set("ill-wraps /pair0/")
	r.logOut()
	fault.Calls()
	for range 20 {
		r.wrapsNot(pairs[0])
	}
	if n := fault.Calls()["C_EncryptInit"]; n > 10 {
		t.Errorf("20 wraps in vain had the token begin %d", n)
	}
	fault.Set("C_EncryptInit rv=0x80000017")
	r.logOut()
	for _, v := range pairs[1:] {
		r.wrapsNothing(v)
	}
}

// A lost connection is found at once beside other keys, by the first call.
func TestLostConnectionBesideOtherKeys(t *testing.T) {
	for _, rule := range []string{"dead", "C_DecryptInit rv=0x30", "C_Decrypt rv=0x5"} {
		t.Run(rule, func(t *testing.T) {
			r, fault := newFaultyRig(t, hasty)
			m := material(32)
			var v *hsm.Version
			var wrapped []byte
			for i := range 6 {
				v = r.key(fmt.Sprintf("k%d", i), hsm.GCM)
				wrapped = r.wrap(v, m)
			}
			fault.Set(rule)
			if err := r.fails(v, wrapped, hsm.Unavailable); hsm.OfVersion(err) {
				t.Errorf("it is told as an outage of one version: %v", err)
			}
			fault.Set()
			r.isWell(v, wrapped, m)
			if n := r.attached(); n < 2 {
				t.Error("the connection was not made anew")
			}
		})
	}
}

// Callers of an ill key who leave early end no connection.
func TestImpatientCallersOfAnIllKey(t *testing.T) {
	r, fault := newFaultyRig(t)
	bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	wrappedBad, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
	fault.Set("ill /bad/", "* sleep_ms=1")
	for i := range 20 {
		r.logOut() // so that it is looked at anew
		r.opens(good, wrappedGood, m)
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*2*time.Millisecond)
		if _, err := r.Unwrap(ctx, bad, nil, wrappedBad, bound); err == nil {
			t.Error("an ill key opens")
		}
		cancel()
	}
	r.keepsConnection()
}

// A token that wraps nothing any more has few wraps of its keys used up to find that out.
func TestWrapsInVainWearLittle(t *testing.T) {
	var c *hsm.Counter
	r, fault := newFaultyRig(t, counted(&c, 1<<20))
	v, other := r.key("orders", hsm.GCM), r.key("other", hsm.GCM)
	m := material(32)
	_, _ = r.wrap(v, m), r.wrap(other, m)
	fault.Set("C_Encrypt rv=0x5")
	fault.Calls()
	for range 50 {
		if _, err := r.Wrap(bounded(t), v, nil, m, bound); err == nil {
			t.Fatal("it wraps")
		}
	}
	if n := fault.Calls()["C_Encrypt"]; n > 10 {
		t.Errorf("50 wraps in vain had the token make %d", n)
	}
	r.wrapsNothing(v)
	fault.Set()
	eventually(t, "it wraps again", func() error {
		_, err := r.Wrap(t.Context(), v, nil, m, bound)
		return err
	})
}

// A key that fails slowly while many callers want it, and so hold all sessions, is an
// outage of this key, and soon told as that: the token is asked beside them, by the calls
// and by Check, and those that still wait do not call.
func TestSlowlyIllKeyOfManyCallers(t *testing.T) {
	for _, c := range []struct{ ill, code string }{
		{"ill", "0x80000017"}, {"ill", "0x30"}, {"ill", "0x7"}, {"ill-wraps", "0x80000017"}, {"ill-wraps", "0x30"}, {"ill-wraps", "0x7"},
		{"ill", "0x101"}, {"ill-wraps", "0x101"},
	} {
		t.Run(c.ill+" "+c.code, func(t *testing.T) {
			r, fault := newFaultyRig(t, func(_ *rig, c *hsm.Config) { c.Stay = true })
			bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
			m := material(32)
			wrappedBad, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
			r.opens(good, wrappedGood, m)
			function := map[string]string{"ill": "C_DecryptInit", "ill-wraps": "C_EncryptInit"}[c.ill]
			fault.Set(c.ill+" /bad/", "ill-sleep 700", "ill-code "+c.code)
			fault.Calls()
			ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
			defer cancel()
			var callers sync.WaitGroup
			for range 24 {
				callers.Go(func() {
					var err error
					if c.ill == "ill" {
						_, err = r.Unwrap(ctx, bad, nil, wrappedBad, bound)
					} else {
						_, err = r.Wrap(ctx, bad, nil, m, bound)
					}
					if !hsm.OfVersion(err) {
						t.Errorf("%v, want an outage of this version", err)
					}
				})
			}
			begun := 0
			eventually(t, "all sessions are held", func() error {
				if begun += fault.Calls()[function]; begun < 8 {
					return fmt.Errorf("%d calls have begun", begun)
				}
				return nil
			})
			check, stop := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer stop()
			if err := r.Check(check); err != nil {
				t.Errorf("Check, while all sessions are held: %v", err)
			}
			callers.Wait()
			r.opens(good, wrappedGood, m)
			r.keepsConnection()
		})
	}
}
