package hsm_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
)

// A token that opens nothing is attached again, and refuses nothing, though a test of its one
// key has come off while its canary did not.
func TestSickTokenIsAttachedAgain(t *testing.T) {
	r, fault := newFaultyRig(t, hasty)
	v := r.key("orders", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(v, m)
	r.logOut()
	fault.Set("C_Decrypt rv=0x6 count=1", "C_Decrypt skip=1 rv=0x6") // one test of the key comes off, then nothing does
	kinds := map[string]int{}
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		_, err := r.Unwrap(bounded(t), v, nil, wrapped, bound)
		kinds[hsm.KindOf(err).String()]++
		_, err = r.Wrap(bounded(t), v, nil, m, bound)
		kinds["wrap "+hsm.KindOf(err).String()]++
	}
	if r.attached() < 2 || kinds["key unusable"] > 0 {
		t.Errorf("a token that opens nothing for 4 s: %d connections, %v", r.attached(), kinds)
	}
}

// That a key opened what it wrapped for a test once does not make a definite no of its outage.
func TestOldTrial(t *testing.T) {
	r, fault := newFaultyRig(t)
	bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	wrappedBad, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
	r.logOut()
	r.opens(good, wrappedGood, m)
	fault.Set("C_Decrypt rv=0x6 count=1", "C_Decrypt skip=2 rv=0x5 count=1")
	_, _ = r.Unwrap(bounded(t), bad, nil, wrappedBad, bound) // it stumbles
	fault.Set("ill /bad/")                                   // from now on the key does nothing at all
	time.Sleep(1100 * time.Millisecond)                      // it is looked at again then
	if _, err := r.Unwrap(bounded(t), bad, nil, wrappedBad, bound); !hsm.OfVersion(err) {
		t.Errorf("an ill key that neither wraps nor opens: kind %v: %v", hsm.KindOf(err), err)
	}
}

// Wraps by an ill key use up few of those of the key beside it, however many want them.
func TestIllWrapsWearNoOtherKey(t *testing.T) {
	for _, callers := range []int{1, 32} {
		t.Run(fmt.Sprint(callers), func(t *testing.T) {
			var c *hsm.Counter
			r, fault := newFaultyRig(t, counted(&c, 1<<20))
			bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
			m := material(32)
			_, _ = r.wrap(bad, m), r.wrap(good, m)
			before, _, _ := c.Used(good)
			fault.Set("ill-wraps /bad/")
			many := newCrowd(3 * time.Second)
			many.add(callers, 5*time.Millisecond, func() { _ = r.wraps(bad) })
			many.wg.Wait()
			after, _, _ := c.Used(good)
			if after-before > 8 {
				t.Errorf("the ill key used up %d wraps of the healthy one in 3 s", after-before)
			}
		})
	}
}

// An ill key is left alone for a second, also where its code is a session's.
func TestIllKeyIsLeftAloneWithAnyCode(t *testing.T) {
	r, fault := newFaultyRig(t, func(_ *rig, c *hsm.Config) { c.Stay = true })
	bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	wb, wg := r.wrap(bad, m), r.wrap(good, m)
	r.opens(good, wg, m)
	fault.Set("ill /bad/", "ill-code 0x91")
	for range 2 {
		fault.Calls()
		began := time.Now()
		for range 100 {
			if _, err := r.Unwrap(bounded(t), bad, nil, wb, bound); !hsm.OfVersion(err) {
				t.Errorf("%v: %v", hsm.KindOf(err), err)
			}
		}
		took := time.Since(began)
		total, calls := 0, fault.Calls()
		for _, n := range calls {
			total += n
		}
		if looks := 1 + int(took/time.Second); total > 100*looks {
			t.Errorf("100 reads of an ill key took %d calls of the module", total)
		}
	}
}

// Whatever the code is with which wraps fail, few are used up in vain.
func TestWrapsInVainWearLittleWithAnyCode(t *testing.T) {
	for _, code := range []string{"0x5", "0x7", "0x20", "0x21", "0x30", "0x60", "0x91", "0x101"} {
		t.Run(code, func(t *testing.T) {
			var c *hsm.Counter
			r, fault := newFaultyRig(t, counted(&c, 1<<20), hasty)
			v := r.key("orders", hsm.GCM)
			m := material(32)
			r.wrap(v, m)
			for i := range 3 {
				o := r.key(fmt.Sprintf("o%d", i), hsm.GCM)
				r.wrap(o, m)
			}
			fault.Set("C_Encrypt rv=" + code)
			fault.Calls()
			began := time.Now()
			n := 0
			for n < 50 && time.Since(began) < 4*time.Second {
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
				_, _ = r.Wrap(ctx, v, nil, m, bound)
				cancel()
				n++
			}
			took := time.Since(began)
			calls := fault.Calls()
			if looks := 1 + int(took/time.Second); calls["C_Encrypt"] > 12*looks {
				t.Errorf("worn: %d", calls["C_Encrypt"])
			}
		})
	}
}
