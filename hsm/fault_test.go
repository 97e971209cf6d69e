package hsm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// newFaultyRig is newRig with the fault module before SoftHSM.
func newFaultyRig(t testing.TB, change ...func(*rig, *hsm.Config)) (*rig, *hsmtest.Fault) {
	t.Helper()
	fault := hsmtest.NewFault(t, ".", softHSM)
	return newRig(t, append(change, func(_ *rig, c *hsm.Config) { c.Module = fault.Module })...), fault
}

// Every code that a module may return, once and always: what comes of it for a wrap
// and an unwrap, and whether it takes another connection.
func TestCodes(t *testing.T) {
	const fine = hsm.Kind(0)
	for _, c := range []struct {
		name     string
		rv       uint
		once     hsm.Kind // what a caller gets when it happens once in the first call
		unwrap   hsm.Kind // ... always, in C_Decrypt
		attaches int      // for the one time
	}{
		{"SESSION_HANDLE_INVALID", 0xB3, fine, hsm.Unavailable, 1},
		{"SESSION_CLOSED", 0xB0, fine, hsm.Unavailable, 1},
		{"OPERATION_ACTIVE", 0x90, fine, hsm.Unavailable, 1},
		{"OPERATION_NOT_INITIALIZED", 0x91, fine, hsm.Unavailable, 1},
		{"KEY_HANDLE_INVALID", 0x60, fine, hsm.Unavailable, 1},
		{"OBJECT_HANDLE_INVALID", 0x82, fine, hsm.Unavailable, 1},
		{"USER_NOT_LOGGED_IN", 0x101, fine, hsm.Unavailable, 1},
		{"DEVICE_ERROR", 0x30, fine, hsm.Unavailable, 1},
		{"DEVICE_MEMORY", 0x31, fine, hsm.Unavailable, 1},
		{"DEVICE_REMOVED", 0x32, fine, hsm.Unavailable, 1},
		{"TOKEN_NOT_PRESENT", 0xE0, fine, hsm.Unavailable, 1},
		{"TOKEN_NOT_RECOGNIZED", 0xE1, fine, hsm.Unavailable, 1},
		{"SLOT_ID_INVALID", 0x03, fine, hsm.Unavailable, 1},
		{"CRYPTOKI_NOT_INITIALIZED", 0x190, fine, hsm.Unavailable, 1},
		{"GENERAL_ERROR", 0x05, fine, hsm.Unavailable, 1},
		{"FUNCTION_FAILED", 0x06, fine, hsm.Unavailable, 1},
		{"HOST_MEMORY", 0x02, fine, hsm.Unavailable, 1},
		{"a vendor's code", 0x80000017, fine, hsm.Unavailable, 1},
		{"a code of nobody's", 0x7777, fine, hsm.Unavailable, 1},
		{"ENCRYPTED_DATA_INVALID", 0x40, fine, hsm.BadCiphertext, 1},
		{"MECHANISM_INVALID", 0x70, hsm.KeyUnusable, hsm.KeyUnusable, 1},
		{"KEY_FUNCTION_NOT_PERMITTED", 0x68, hsm.KeyUnusable, hsm.KeyUnusable, 1},
		{"ACTION_PROHIBITED", 0x1B, hsm.KeyUnusable, hsm.KeyUnusable, 1},
		{"ARGUMENTS_BAD", 0x07, fine, hsm.Broken, 1},
		{"PIN_EXPIRED", 0xA3, hsm.Unauthenticated, hsm.Unauthenticated, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, fault := newFaultyRig(t, func(_ *rig, c *hsm.Config) { c.Patience = 5 * time.Second })
			v := r.key("orders", 0)
			m := material(32)
			wrapped := r.wrap(v, m)
			for _, function := range []string{"C_EncryptInit", "C_Encrypt"} {
				before := r.attached()
				fault.Set(fmt.Sprintf("%s rv=%#x count=1", function, c.rv))
				_, err := r.Wrap(bounded(t), v, nil, m, bound)
				if err == nil && c.once != fine || err != nil && hsm.KindOf(err) != c.once {
					t.Errorf("once in %s: %v, want %v", function, err, c.once)
				}
				if n := r.attached() - before; n != c.attaches-1 {
					t.Errorf("once in %s: %d new connections, want %d", function, n, c.attaches-1)
				}
				fault.Set()
				r.opens(v, wrapped, m)
			}
			fault.Set(fmt.Sprintf("C_Decrypt rv=%#x", c.rv))
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			if _, err := r.Unwrap(ctx, v, nil, wrapped, bound); hsm.KindOf(err) != c.unwrap && ctx.Err() == nil {
				t.Errorf("always in C_Decrypt: %v, want %v", err, c.unwrap)
			}
			fault.Set()
			eventually(t, "it works again", func() error {
				got, err := r.Unwrap(t.Context(), v, nil, wrapped, bound)
				if err == nil && !bytes.Equal(got, m) {
					t.Fatal("it opens to something else")
				}
				return err
			})
		})
	}
}

// A wrap is two calls, and nothing is searched for, logged in to or asked on the way.
func TestCallsOfTheHotPath(t *testing.T) {
	r, fault := newFaultyRig(t)
	v := r.key("orders", 0)
	wrapped := r.wrap(v, material(32))
	fault.Calls()
	for range 10 {
		r.wrap(v, material(32))
		if _, err := r.Unwrap(bounded(t), v, nil, wrapped, bound); err != nil {
			t.Fatal(err)
		}
	}
	calls := fault.Calls()
	for _, function := range []string{"C_EncryptInit", "C_Encrypt", "C_DecryptInit", "C_Decrypt"} {
		if calls[function] != 10 {
			t.Errorf("%d calls of %s for 10 operations", calls[function], function)
		}
		delete(calls, function)
	}
	if len(calls) > 0 {
		t.Errorf("other calls: %v", calls)
	}
}

// The ways of real tokens with initialization vectors are found out; tokens that
// handle them wrongly get another suite.
func TestIVStyles(t *testing.T) {
	for _, style := range []string{"written", "appended-12", "appended-16", "prepended-12"} {
		t.Run(style, func(t *testing.T) {
			r, fault := newFaultyRig(t)
			fault.Set("iv " + style)
			p, err := r.Probe(bounded(t))
			if err != nil || p.Use != hsm.GCM || p.Trials[0].IV != style {
				t.Fatalf("probe: %+v, %v", p, err)
			}
			v := r.key("orders", 0)
			seen := map[string]bool{}
			for range 20 {
				m := material(32)
				wrapped := r.wrap(v, m)
				r.opens(v, wrapped, m)
				iv := string(wrapped[27 : 27+wrapped[26]])
				if seen[iv] || len(iv) < 12 {
					t.Errorf("vector %x twice, or too short", iv)
				}
				seen[iv] = true
			}
			fault.Set() // as after an update of the firmware
			if _, err := r.Wrap(bounded(t), v, nil, material(32), bound); err == nil && style != "written" {
				t.Error("the token has another style than the key was made with, and nobody notices")
			}
		})
	}
	for _, broken := range []string{"iv fixed", "iv short-tag", "lossy"} {
		t.Run(broken, func(t *testing.T) {
			r, fault := newFaultyRig(t)
			fault.Set(broken)
			p, err := r.Probe(bounded(t))
			if err != nil || p.Use == hsm.GCM || p.Trials[0].Err == nil {
				t.Errorf("probe: %+v, %v; want no GCM", p, err)
			}
			if broken == "lossy" {
				if _, err := r.CreateKey(bounded(t), "orders", 0); err == nil {
					t.Error("a token that loses bits gets a key")
				}
				return
			}
			if v := r.key("orders", 0); v.Suite != hsm.CBCHMAC {
				t.Errorf("the key has %v", v.Suite)
			}
		})
	}
}

// A dead connection comes back by itself: also where the module then shows no slot
// for a while, or fails to start.
func TestDeadConnection(t *testing.T) {
	r, fault := newFaultyRig(t, func(_ *rig, c *hsm.Config) { c.Patience = 50 * time.Millisecond })
	v := r.key("orders", 0)
	m := material(32)
	wrapped := r.wrap(v, m)
	for _, rules := range [][]string{{"dead"}, {"no-slots", "C_Decrypt rv=0x30"}, {"C_Initialize rv=0x05", "C_DecryptInit rv=0x32"}, {"C_Login rv=0x30", "C_Decrypt rv=0xE0"}} {
		fault.Set(rules...)
		_ = r.fails(v, wrapped, hsm.Unavailable)
		fault.Calls()
		time.Sleep(500 * time.Millisecond) // time in which it tries in vain
		if calls := fault.Calls(); calls["C_Initialize"] > 6 || calls["C_Login"] > 6 {
			t.Errorf("%v: a storm: %v", rules, calls)
		}
		_ = r.fails(v, wrapped, hsm.Unavailable)
		fault.Set()
		eventually(t, strings.Join(rules, ", "), func() error {
			_, err := r.Unwrap(t.Context(), v, nil, wrapped, bound)
			return err
		})
		r.opens(v, wrapped, m)
	}
}

// A module is finalised once for each time that it was initialised: one that was not
// complains, or worse.
func TestFinalizedOnce(t *testing.T) {
	fault := hsmtest.NewFault(t, ".", softHSM)
	calls := map[string]int{}
	count := func(function string) int {
		for name, n := range fault.Calls() {
			calls[name] += n
		}
		return calls[function]
	}
	attached := 0
	t.Run("life", func(t *testing.T) {
		r := newRig(t, func(_ *rig, c *hsm.Config) { c.Module, c.Patience = fault.Module, 50*time.Millisecond })
		v := r.key("orders", 0)
		wrapped := r.wrap(v, material(32))
		fault.Set("C_Initialize rv=0x30", "C_Decrypt rv=0x30")
		eventually(t, "it has tried three times in vain", func() error {
			_ = r.fails(v, wrapped, hsm.Unavailable)
			if count("C_Initialize") < r.attached()+3 {
				return errors.New("it has not")
			}
			return nil
		})
		fault.Set()
		eventually(t, "it works again", func() error { return r.Check(t.Context()) })
		attached = r.attached()
	})
	if n := count("C_Finalize"); n != attached {
		t.Errorf("finalised %d times, initialised %d times", n, attached)
	}
}

// A caller's time is obeyed while the module blocks, and its session is nobody
// else's until the module lets go of it.
func TestBlockedModule(t *testing.T) {
	r, fault := newFaultyRig(t, func(_ *rig, c *hsm.Config) { c.Sessions = 2 })
	v := r.key("orders", 0)
	m := material(32)
	wrapped := r.wrap(v, m)
	fault.Set("C_Encrypt sleep_ms=4000 count=2")
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		began := time.Now()
		if _, err := r.Wrap(ctx, v, nil, m, bound); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 3*time.Second {
			t.Errorf("Wrap: %v after %v", err, time.Since(began))
		}
		cancel()
	}
	// Both sessions are still in the module.
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := r.Unwrap(ctx, v, nil, wrapped, bound); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Unwrap: %v, want a wait in vain for a session", err)
	}
	r.opens(v, wrapped, m)
	if n := r.attached(); n != 1 {
		t.Errorf("attached %d times", n)
	}
}

// Callers that stay with the module stay, and leave where they wait for a session.
func TestStay(t *testing.T) {
	r, fault := newFaultyRig(t, func(_ *rig, c *hsm.Config) { c.Sessions, c.Stay = 1, true })
	v := r.key("orders", 0)
	m := material(32)
	wrapped := r.wrap(v, m)
	fault.Set("C_Encrypt sleep_ms=2500 count=1")
	fault.Calls() // those of the past
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	stayed := make(chan error, 1)
	go func() {
		_, err := r.Wrap(ctx, v, nil, m, bound)
		stayed <- err
	}()
	eventually(t, "the module is called", func() error {
		if fault.Calls()["C_Encrypt"] == 0 {
			return errors.New("it is not")
		}
		return nil
	})
	if _, err := r.Unwrap(ctx, v, nil, wrapped, bound); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Unwrap: %v, want a wait in vain for a session", err)
	}
	if err := <-stayed; err != nil {
		t.Errorf("Wrap: %v, want what the module answers at last", err)
	}
	r.opens(v, wrapped, m)
}

// A token that has fewer sessions than it says serves with those that it has.
func TestFewerSessions(t *testing.T) {
	r, fault := newFaultyRig(t)
	v := r.key("orders", 0)
	fault.Set("C_OpenSession rv=0xb1", "C_Encrypt sleep_ms=30")
	done := make(chan error)
	for range 6 {
		go func() {
			_, err := r.Wrap(bounded(t), v, nil, material(32), bound)
			done <- err
		}()
	}
	for range 6 {
		if err := <-done; err != nil && hsm.KindOf(err) != hsm.Unavailable {
			t.Errorf("Wrap: %v", err)
		}
	}
	fault.Set()
	r.wrap(v, material(32))
}
