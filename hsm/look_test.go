package hsm_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// staying is how the agent's plugin has it, and agentTime what it gives each call.
func staying(_ *rig, c *hsm.Config) { c.Stay = true }

const agentTime = 1800 * time.Millisecond

// unwraps unwraps as the agent does.
func (r *rig) unwraps(v *hsm.Version, wrapped []byte) error {
	ctx, cancel := context.WithTimeout(r.t.Context(), agentTime)
	defer cancel()
	_, err := r.Unwrap(ctx, v, nil, wrapped, bound)
	return err
}

// wraps wraps as the agent does.
func (r *rig) wraps(v *hsm.Version) error {
	ctx, cancel := context.WithTimeout(r.t.Context(), agentTime)
	defer cancel()
	_, err := r.Wrap(ctx, v, nil, material(32), bound)
	return err
}

// A guess is made where it takes long to find out what ails a key. It hides no definite no,
// neither from callers nor from who looks for himself.
func TestGuessHidesNoDefiniteNo(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	v, good := r.key("orders", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	wrapped, wrappedGood := r.wrap(v, m), r.wrap(good, m)
	r.opens(good, wrappedGood, m)
	r.substitute(v)
	r.logOut()
	r.opens(good, wrappedGood, m)
	fault.Set("* sleep_ms=40")
	eventually(t, "it is told that the key is another", func() error {
		if err := r.unwraps(v, wrapped); hsm.KindOf(err) != hsm.KeyUnusable {
			return fmt.Errorf("want that it must not be used: %w", err)
		}
		return nil
	})
	for range 3 {
		if err := r.unwraps(v, wrapped); hsm.KindOf(err) != hsm.KeyUnusable {
			t.Errorf("Unwrap: %v, want that the key must not be used", err)
		}
		if err := r.Verify(bounded(t), v); hsm.KindOf(err) != hsm.KeyUnusable {
			t.Errorf("Verify: %v, want that the key must not be used", err)
		}
	}
}

// A key that was replaced is a definite no also where its canary first fails as those of
// lost connections do; what it does not open is not damaged.
func TestReplacedKeyAndOneDeviceError(t *testing.T) {
	for suite, function := range map[hsm.Suite]string{hsm.GCM: "C_DecryptInit", hsm.CBCHMAC: "C_SignInit"} {
		t.Run(suite.String(), func(t *testing.T) {
			r, fault := newFaultyRig(t)
			v, good := r.key("orders", suite), r.key("good", hsm.GCM)
			m := material(32)
			wrapped, wrappedGood := r.wrap(v, m), r.wrap(good, m)
			r.substitute(v)
			r.logOut()
			r.opens(good, wrappedGood, m)
			fault.Set(function + " rv=0x30 count=1")
			_ = r.fails(v, wrapped, hsm.KeyUnusable)
		})
	}
}

// Wraps and unwraps of a slowly ill key are told alike what is known of it, while it is
// looked at again, too.
func TestSlowlyIllKeyOfAllKindsOfCallers(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	wrapped, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
	r.opens(good, wrappedGood, m)
	fault.Set("ill /bad/", "ill-sleep 400")
	callers := newCrowd(6 * time.Second)
	for _, use := range []func() error{func() error { return r.unwraps(bad, wrapped) }, func() error { return r.wraps(bad) }} {
		callers.add(4, time.Millisecond, func() {
			if err := use(); !hsm.OfVersion(err) {
				t.Errorf("%v, want an outage of this version", err)
			}
		})
	}
	callers.wg.Wait()
	r.keepsConnection()
}

// A key that stumbles once, slowly, and then passes its test is well.
func TestGuessDoesNotStay(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	v, good := r.key("orders", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	r.wrap(good, m)
	wrapped := r.wrap(v, m)
	r.logOut()
	r.opens(v, wrapped, m) // not tested for wraps
	r.wrap(good, m)
	fault.Set("C_Encrypt rv=0x5 count=1 sleep_ms=300")
	if err := r.wraps(v); err != nil && !hsm.OfVersion(err) {
		t.Errorf("Wrap: %v", err)
	}
	began := time.Now()
	eventually(t, "the key wraps", func() error { return r.wraps(v) })
	if took := time.Since(began); took > 500*time.Millisecond {
		t.Errorf("it was told as ill for %v", took)
	}
}

// Two wraps that fail while tests and other keys come off are no reason not to let others wrap.
func TestTwoWrapsFail(t *testing.T) {
	r, fault := newFaultyRig(t)
	v, good := r.key("orders", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	_, _ = r.wrap(v, m), r.wrap(good, m)
	fault.Set("C_Encrypt rv=0x5 count=1", "C_Encrypt skip=2 rv=0x5 count=1") // two are made for a test between them
	r.wrapsNot(v)
	r.wrap(v, m)
	r.keepsConnection()
}

// One canary that fails once costs no connection, also where there is no other key.
func TestOneCanaryFails(t *testing.T) {
	r, fault := newFaultyRig(t)
	v := r.key("orders", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(v, m)
	r.opens(v, wrapped, m)
	for _, code := range []string{"0x6", "0x101"} {
		for _, bound := range []bool{true, false} {
			if !bound {
				r.logOut()
				if _, err := r.Keys(bounded(t)); err != nil { // logs in again
					t.Fatal(err)
				}
			}
			fault.Set("C_Decrypt rv=" + code + " count=1")
			if err := r.Check(bounded(t)); err != nil {
				t.Errorf("Check: %v", err)
			}
			r.opens(v, wrapped, m)
		}
	}
	r.keepsConnection()
}

// Where all wraps fail as on a lost connection, and canaries open, another connection is tried
// once; then those who open keep the one that there is.
func TestWrapsFailAsOnALostConnection(t *testing.T) {
	r, fault := newFaultyRig(t)
	m := material(32)
	v, other := r.key("orders", hsm.GCM), r.key("other", hsm.GCM)
	wrapped, wrappedOther := r.wrap(v, m), r.wrap(other, m)
	r.opens(other, wrappedOther, m)
	fault.Set("C_EncryptInit rv=0x30")
	r.wrapsNothing(v)
	n := r.attached()
	for range 50 {
		if err := r.wraps(v); hsm.KindOf(err) != hsm.Broken {
			t.Errorf("Wrap: %v, want that the token is broken", err)
		}
		r.opens(v, wrapped, m)
	}
	if got := r.attached(); n > 2 || got != n {
		t.Errorf("it took %d connections, and then %d, want 2 at most", n, got)
	}
}

// A session that a look had is one for callers where they have none.
func TestSpareSessionForCallers(t *testing.T) {
	r, fault := newFaultyRig(t, staying, func(_ *rig, c *hsm.Config) { c.Sessions = 2 })
	v, other := r.key("orders", hsm.GCM), r.key("other", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(v, m)
	r.wrap(other, m)
	// Callers hold both places, and a look a spare session; then their sessions are lost, and no other is to be had.
	fault.Set("C_Decrypt sleep_ms=500 rv=0xb3 count=2", "C_Decrypt sleep_ms=1200 count=1", "C_OpenSession skip=2 rv=0xb1")
	fault.Calls()
	var callers sync.WaitGroup
	for range 2 {
		callers.Go(func() { _ = r.unwraps(v, wrapped) })
	}
	begun := 0
	eventually(t, "both places are held", func() error {
		if begun += fault.Calls()["C_Decrypt"]; begun < 2 {
			return errors.New("not yet")
		}
		return nil
	})
	if err := r.Verify(bounded(t), other); err != nil {
		t.Errorf("Verify: %v", err)
	}
	callers.Wait()
	for range 5 {
		if err := r.unwraps(v, wrapped); err != nil {
			t.Errorf("a session is idle: %v", err)
		}
	}
}

// A key that was ill, is well again and slow wraps: a guess that has been told and was wrong is
// nobody's answer.
func TestIllKeyIsWellAgainAndSlow(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	wrapped, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
	r.opens(good, wrappedGood, m)
	fault.Set("ill /bad/")
	r.ofVersion(bad, wrapped)
	fault.Set("* sleep_ms=120")
	callers := newCrowd(5 * time.Second)
	callers.add(3, 20*time.Millisecond, func() {
		if err := r.wraps(bad); err != nil && !hsm.OfVersion(err) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Wrap: %v", err)
		}
	})
	callers.wg.Wait()
	if err := r.wraps(bad); err != nil {
		t.Errorf("Wrap by a key that is well: %v", err)
	}
}

// One slow canary of a key that is well does not make what ails it later a secret for long.
func TestOneSlowCanary(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	wrapped, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
	r.logOut()
	fault.Set("C_Decrypt sleep_ms=1500 count=1")
	r.opens(bad, wrapped, m)
	r.opens(good, wrappedGood, m)
	fault.Set("ill /bad/", "ill-sleep 400")
	if err := r.unwraps(bad, wrapped); !hsm.OfVersion(err) {
		t.Errorf("Unwrap: %v, want an outage of this version", err)
	}
	if err := r.unwraps(bad, wrapped); !hsm.OfVersion(err) {
		t.Errorf("Unwrap: %v, want an outage of this version", err)
	}
}

// A key that may not open any more is that on a slow token, too.
func TestPolicyOfASlowToken(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	v := r.key("orders", hsm.GCM)
	wrapped := r.wrap(v, material(32))
	r.logOut()
	fault.Set("C_DecryptInit rv=0x68 sleep_ms=100", "* sleep_ms=100")
	told := 0
	for range 10 {
		switch err := r.unwraps(v, wrapped); {
		case hsm.KindOf(err) == hsm.KeyUnusable:
			told++
		case !errors.Is(err, context.DeadlineExceeded):
			t.Errorf("Unwrap: %v, want that the key must not be used", err)
		}
	}
	if told < 8 {
		t.Errorf("%d of 10 callers were told, want all but the first", told)
	}
}

// One wrap that fails, with whatever code, is made again; others go on.
func TestOneWrapFails(t *testing.T) {
	for _, code := range []string{"0x5", "0x7", "0x21", "0x30", "0x40"} {
		t.Run(code, func(t *testing.T) {
			r, fault := newFaultyRig(t)
			v := r.key("orders", hsm.GCM)
			r.wrap(v, material(32))
			fault.Set("C_Encrypt count=1 rv=" + code)
			for range 3 {
				r.wrap(v, material(32))
			}
		})
	}
}

// Callers of a version that must not be used have its record read once in a while at most.
func TestRefusalsCostLittle(t *testing.T) {
	r, fault := newFaultyRig(t, staying)
	v, good := r.key("orders", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	wrapped, wrappedGood := r.wrap(v, m), r.wrap(good, m)
	r.substitute(v)
	r.logOut()
	r.opens(good, wrappedGood, m)
	_ = r.fails(v, wrapped, hsm.KeyUnusable)
	fault.Calls()
	before := r.searchesOf(fault, func() { _ = r.fails(v, wrapped, hsm.KeyUnusable) })
	if all := r.searchesOf(fault, func() {
		for range 20 {
			_ = r.fails(v, wrapped, hsm.KeyUnusable)
		}
	}); all > 20*before+2 || before > 1 {
		t.Errorf("one refusal takes %d searches, 20 take %d: the record is read each time", before, all)
	}
}

// searchesOf counts the searches of a module.
func (r *rig) searchesOf(fault *hsmtest.Fault, do func()) int {
	r.t.Helper()
	fault.Calls()
	do()
	return fault.Calls()["C_FindObjectsInit"]
}

// A connection that is lost between the canary and the first wrap is made anew.
func TestLostBetweenCanaryAndWrap(t *testing.T) {
	r, fault := newFaultyRig(t)
	v := r.key("orders", hsm.GCM)
	m := material(32)
	r.wrap(v, m)
	fault.Set("dead")
	_ = r.Check(bounded(t))
	fault.Set()
	if err := r.Check(bounded(t)); err != nil { // by another connection, which has not wrapped yet
		t.Fatal(err)
	}
	n := r.attached()
	fault.Set("dead")
	if _, err := r.Wrap(bounded(t), v, nil, m, bound); hsm.KindOf(err) != hsm.Unavailable {
		t.Errorf("Wrap: kind %v, %v; want an outage", hsm.KindOf(err), err)
	}
	fault.Set()
	eventually(t, "it wraps", func() error { return r.wraps(v) })
	if r.attached() <= n {
		t.Error("the connection was not made anew")
	}
}
