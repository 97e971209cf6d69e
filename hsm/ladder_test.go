package hsm_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// application is another part of this process that uses SoftHSM: to the library it is
// the same application, whose login and sessions are those of the rig.
func (r *rig) application() (library *pkcs11.Ctx, slot uint) {
	r.t.Helper()
	library = pkcs11.New(softHSM)
	r.t.Cleanup(library.Destroy)
	info, err := r.Info(bounded(r.t))
	if err != nil {
		r.t.Fatal(err)
	}
	return library, info.Slot
}

// logOut ends the login, of all sessions.
func (r *rig) logOut() {
	r.t.Helper()
	library, slot := r.application()
	hsmtest.LogOut(r.t, library, slot)
}

// closeSessions ends all sessions, and the login with them.
func (r *rig) closeSessions() {
	r.t.Helper()
	library, slot := r.application()
	if err := library.CloseAllSessions(slot); err != nil {
		r.t.Fatal(err)
	}
}

// ladderUses are what is done with a key after something was lost: all of it works as if
// nothing had been.
func ladderUses(v *hsm.Version, m, wrapped []byte) map[string]func(r *rig) {
	return map[string]func(r *rig){
		"unwrap": func(r *rig) { r.opens(v, wrapped, m) },
		"wrap":   func(r *rig) { r.wrap(v, m) },
		"health": func(r *rig) {
			if err := r.Check(bounded(r.t)); err != nil {
				r.t.Errorf("Check: %v", err)
			}
		},
		"all keys": func(r *rig) {
			if keys, err := r.Keys(bounded(r.t)); err != nil || len(keys) != 1 {
				r.t.Errorf("%d keys, %v; want one", len(keys), err)
			}
		},
		"a version": func(r *rig) { // one that is not known has the catalogue read
			if _, err := r.Version(bounded(r.t), "orders", 2); hsm.KindOf(err) != hsm.KeyNotFound {
				r.t.Errorf("version 2: %v", err)
			}
			if _, err := r.Version(bounded(r.t), "orders", 1); err != nil {
				r.t.Errorf("version 1: %v", err)
			}
		},
		"a new version": func(r *rig) {
			if k, err := r.Rotate(bounded(r.t), "orders", 0); err != nil || k.Current != 2 {
				r.t.Errorf("Rotate: %v", err)
			}
		},
	}
}

// A login or sessions that are lost take no other connection and cost no call. Private
// keys are not to be found without a login, which says nothing of them.
func TestLoginAndSessionsLost(t *testing.T) {
	for what, lose := range map[string]func(r *rig){"login": (*rig).logOut, "sessions": (*rig).closeSessions} {
		for name := range ladderUses(nil, nil, nil) {
			t.Run(what+", "+name, func(t *testing.T) {
				r := newRig(t)
				v, m := r.key("orders", 0), material(32)
				wrapped := r.wrap(v, m)
				lose(r)
				ladderUses(v, m, wrapped)[name](r)
				r.opens(v, wrapped, m)
				if n := r.attached(); n != 1 {
					t.Errorf("attached %d times, want once", n)
				}
			})
		}
	}
}

// What a new session, handle or login does not cure is cured by another connection: a
// module may go on believing what the token has forgotten long ago.
func TestWhatOnlyAnotherConnectionCures(t *testing.T) {
	for name, use := range map[string]struct {
		function string
		do       func(r *rig, v *hsm.Version, wrapped []byte) error
	}{
		"an unwrap": {"C_DecryptInit", func(r *rig, v *hsm.Version, wrapped []byte) error {
			_, err := r.Unwrap(bounded(r.t), v, nil, wrapped, bound)
			return err
		}},
		"a wrap": {"C_EncryptInit", func(r *rig, v *hsm.Version, _ []byte) error {
			_, err := r.Wrap(bounded(r.t), v, nil, material(32), bound)
			return err
		}},
		"the health":    {"C_DecryptInit", func(r *rig, _ *hsm.Version, _ []byte) error { return r.Check(bounded(r.t)) }},
		"the catalogue": {"C_FindObjectsInit", func(r *rig, _ *hsm.Version, _ []byte) error { _, err := r.Keys(bounded(r.t)); return err }},
	} {
		for _, code := range []string{"0xb3", "0x82", "0x101"} { // a session, a handle, a login
			t.Run(name+" "+code, func(t *testing.T) {
				r, fault := newFaultyRig(t, func(_ *rig, c *hsm.Config) { c.Patience = 5 * time.Second })
				v := r.key("orders", 0)
				wrapped := r.wrap(v, material(32))
				fault.Set(use.function + " rv=" + code)
				eventually(t, "there is another connection", func() error {
					err := use.do(r, v, wrapped)
					anew := r.attached() > 1
					if err != nil && hsm.KindOf(err) != hsm.Unavailable && (!anew || use.function != "C_EncryptInit") { // which it does not do then
						t.Fatalf("%v, want Unavailable", err)
					}
					if !anew {
						return fmt.Errorf("there is none; %w", err)
					}
					return nil
				})
				fault.Set()
				eventually(t, "it works again", func() error { return use.do(r, v, wrapped) })
			})
		}
	}
}

// Connections that are lost as soon as they are used are no storm of them, however many
// callers there are.
func TestNoStorm(t *testing.T) {
	for _, rule := range []string{"C_Encrypt rv=0x30", "C_Decrypt rv=0x30", "C_Decrypt rv=0xb3", "C_FindObjectsInit rv=0x30", "C_GetAttributeValue rv=0x30", "C_DecryptInit rv=0x101"} {
		t.Run(rule, func(t *testing.T) {
			r, fault := newFaultyRig(t, func(_ *rig, c *hsm.Config) { c.Patience = 50 * time.Millisecond })
			v := r.key("orders", 0)
			wrapped := r.wrap(v, material(32))
			fault.Set(rule)
			_ = fault.Calls()
			var callers sync.WaitGroup
			end := time.Now().Add(time.Second)
			for i := 0; time.Now().Before(end); i++ {
				time.Sleep(5 * time.Millisecond)
				callers.Go(func() { _, _ = r.Wrap(bounded(t), v, nil, material(32), bound) })
				callers.Go(func() { _, _ = r.Unwrap(bounded(t), v, nil, wrapped, bound) })
				if i%12 == 0 { // wraps and unwraps get on in between
					callers.Go(func() { _, _ = r.Version(bounded(t), "orders", 2) })
				}
			}
			callers.Wait()
			// After 0.1 s, 0.2 s, 0.4 s and 0.8 s, less the jitter.
			if calls := fault.Calls(); calls["C_Initialize"] > 6 || calls["C_Login"] > 6 {
				t.Errorf("a storm: %v", calls)
			}
			fault.Set()
			eventually(t, "it works again", func() error {
				_, err := r.Wrap(t.Context(), v, nil, material(32), bound)
				return err
			})
		})
	}
}

// Whatever a token answers to what a caller sent: where the canary opens it is the
// caller's fault, and no reason for another connection.
func TestCallersInputCostsNoConnection(t *testing.T) {
	r, fault := newFaultyRig(t)
	v, m := r.key("orders", 0), material(32)
	wrapped := r.wrap(v, m)
	for _, code := range []string{
		"0x30", "0x31", "0x32", "0xe0", "0xe1", "0x3", "0x190", "0x5", "0x6", "0x2", "0x50", "0x7", "0x150", "0x54", "0x68", "0x70", "0x71", "0x1b",
		"0x20", "0x21", "0x40", "0x41", "0xc0", "0x110", "0x80000001",
	} {
		// The first call and, each time after the canary's, the third and the fifth.
		rule := "C_Decrypt rv=" + code + " count=1"
		fault.Set(rule, rule+" skip=1", rule+" skip=2") // each counts the calls that the others leave
		if err := r.fails(v, wrapped, hsm.BadCiphertext); err != nil && strings.Contains(err.Error(), "C_Decrypt") {
			t.Errorf("%s: the error tells more than others: %v", code, err)
		}
		fault.Set()
		r.opens(v, wrapped, m)
	}
	if n := r.attached(); n != 1 {
		t.Errorf("attached %d times, want once", n)
	}
}

// What the token calls a fault of ours, or cannot do any more, says nothing of the key.
func TestWhatTheTokenDoesNotTake(t *testing.T) {
	r, fault := newFaultyRig(t)
	v, m := r.key("orders", 0), material(32)
	wrapped := r.wrap(v, m)
	for code, want := range map[string]hsm.Kind{
		"0x7": hsm.Broken, "0x150": hsm.Broken, "0xd1": hsm.Broken, "0x13": hsm.Broken, "0xe2": hsm.Broken,
		"0x68": hsm.KeyUnusable, "0x1b": hsm.KeyUnusable, "0x62": hsm.KeyUnusable,
	} {
		fault.Set("C_DecryptInit rv=" + code)
		_ = r.fails(v, wrapped, want)
		fault.Set("C_EncryptInit rv=" + code)
		if _, err := r.Wrap(bounded(t), v, nil, m, bound); hsm.KindOf(err) != want {
			t.Errorf("%s: Wrap: %v, want %v", code, err, want)
		}
		fault.Set()
		r.opens(v, wrapped, m)
	}
}

// A canary that the token fails to open once, for whatever reason, is no other key.
func TestCanaryThatFailsOnce(t *testing.T) {
	for _, code := range []string{"0x5", "0x6", "0x80000001"} {
		t.Run(code, func(t *testing.T) {
			r, fault := newFaultyRig(t)
			v, m := r.key("orders", 0), material(32)
			wrapped := r.wrap(v, m)
			r.logOut() // so that the key is looked for again
			fault.Set("C_Decrypt rv=" + code + " count=1")
			r.opens(v, wrapped, m)
		})
	}
}

// A slot may have another number after each start of the library, and any time.
func TestSlotRenumbered(t *testing.T) {
	for name, lose := range map[string]func(r *rig, fault *hsmtest.Fault, shift string){
		"with the sessions": func(r *rig, fault *hsmtest.Fault, shift string) { fault.Set(shift); r.closeSessions() },
		"with the connection": func(r *rig, fault *hsmtest.Fault, shift string) {
			fault.Set(shift, "C_Decrypt rv=0x30 count=1")
		},
		"while it is away": func(r *rig, fault *hsmtest.Fault, shift string) {
			fault.Set("dead")
			ctx, cancel := context.WithTimeout(r.t.Context(), 200*time.Millisecond)
			defer cancel()
			_ = r.Check(ctx)
			fault.Set(shift)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, fault := newFaultyRig(t, func(_ *rig, c *hsm.Config) { c.Patience = 5 * time.Second })
			v, m := r.key("orders", 0), material(32)
			wrapped := r.wrap(v, m)
			before, err := r.Info(bounded(t))
			if err != nil {
				t.Fatal(err)
			}
			lose(r, fault, "slots 1000")
			r.opens(v, wrapped, m)
			r.wrap(v, m)
			if keys, err := r.Keys(bounded(t)); err != nil || len(keys) != 1 {
				t.Errorf("%d keys, %v", len(keys), err)
			}
			if now, err := r.Info(bounded(t)); err != nil || now.Slot != before.Slot+1000 || r.attached() != 2 {
				t.Errorf("slot %d, before %d, %v; attached %d times", now.Slot, before.Slot, err, r.attached())
			}
		})
	}
}

// A token that says that nobody is logged in gets a login, one for all callers.
func TestLoginToldLost(t *testing.T) {
	r, fault := newFaultyRig(t)
	v, m := r.key("orders", 0), material(32)
	wrapped := r.wrap(v, m)
	_ = fault.Calls()
	fault.Set("C_Login sleep_ms=100", "logged-out")
	var callers sync.WaitGroup
	for range 12 {
		callers.Go(func() { r.opens(v, wrapped, m) })
		callers.Go(func() { r.wrap(v, m) })
	}
	callers.Wait()
	if n := fault.Calls()["C_Login"]; n != 1 || r.attached() != 1 {
		t.Errorf("%d logins, attached %d times, want one and once", n, r.attached())
	}
}

// A caller's time is obeyed while the token logs in; the others get the login.
func TestCallersTimeDuringALogin(t *testing.T) {
	r, fault := newFaultyRig(t)
	v, m := r.key("orders", 0), material(32)
	wrapped := r.wrap(v, m)
	fault.Set("C_Login sleep_ms=1500", "logged-out")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	began := time.Now()
	if _, err := r.Unwrap(ctx, v, nil, wrapped, bound); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > time.Second {
		t.Errorf("Unwrap: %v after %v", err, time.Since(began))
	}
	r.opens(v, wrapped, m)
	if n := fault.Calls()["C_Login"]; n != 2 {
		t.Errorf("%d logins, want one at first and one now", n)
	}
}
