package hsm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
)

func TestRandom(t *testing.T) {
	r := newRig(t)
	for _, n := range []int{0, hsm.MaxRandom + 1} {
		if err := r.Random(bounded(t), make([]byte, n)); hsm.KindOf(err) != hsm.Invalid {
			t.Errorf("%d bytes: %v, want Invalid", n, err)
		}
	}
	seen := map[string]bool{}
	for _, n := range []int{1, 15, 16, 17, 32, 32, 1023, hsm.MaxRandom} {
		dst := bytes.Repeat([]byte{0x5a}, n+8)
		if err := r.Random(bounded(t), dst[:n]); err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		if !bytes.Equal(dst[n:], bytes.Repeat([]byte{0x5a}, 8)) || n >= 15 && (seen[string(dst[:15])] || bytes.Equal(dst[n-8:n], dst[n:])) {
			t.Errorf("%d bytes: %x", n, dst)
		}
		seen[string(dst[:min(n, 15)])] = true
	}
}

// What the module answers to C_GenerateRandom, once and always.
func TestRandomCodes(t *testing.T) {
	const fine = hsm.Kind(0)
	for _, c := range []struct {
		name         string
		rv           uint
		once, always hsm.Kind
		attaches     int // for the one time
	}{
		{"OK, and nothing written", 0, hsm.Broken, hsm.Broken, 0},
		{"RANDOM_NO_RNG", 0x121, hsm.Invalid, hsm.Invalid, 0},
		{"FUNCTION_NOT_SUPPORTED", 0x54, hsm.Invalid, hsm.Invalid, 0},
		{"SESSION_HANDLE_INVALID", 0xB3, fine, hsm.Unavailable, 0},
		{"USER_NOT_LOGGED_IN", 0x101, fine, hsm.Unavailable, 0},
		{"DEVICE_ERROR", 0x30, fine, hsm.Unavailable, 1},
		{"GENERAL_ERROR", 0x05, fine, hsm.Unavailable, 0},
		{"a vendor's code", 0x80000017, fine, hsm.Unavailable, 0},
		{"ARGUMENTS_BAD", 0x07, hsm.Broken, hsm.Broken, 0},
		{"KEY_HANDLE_INVALID", 0x60, hsm.Broken, hsm.Broken, 0},
		{"PIN_EXPIRED", 0xA3, hsm.Unauthenticated, hsm.Unauthenticated, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, fault := newFaultyRig(t)
			v := r.key("orders", 0)
			secret := material(32)
			wrapped, before := r.wrap(v, secret), r.attached()
			for _, how := range []struct {
				rule string
				want hsm.Kind
			}{{" count=1", c.once}, {"", c.always}} {
				rule, want := how.rule, how.want
				fault.Set(fmt.Sprintf("C_GenerateRandom rv=%#x%s", c.rv, rule))
				dst := make([]byte, 32)
				ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
				err := r.Random(ctx, dst)
				cancel()
				if err == nil && want != fine || err != nil && hsm.KindOf(err) != want && !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("rule %q: %v, want %v", rule, err, want)
				}
				if (err == nil) == bytes.Equal(dst, make([]byte, 32)) {
					t.Errorf("rule %q: %x with %v", rule, dst, err)
				}
				if n := r.attached() - before; rule != "" && n != c.attaches {
					t.Errorf("%d new connections, want %d", n, c.attaches)
				}
				fault.Set()
				eventually(t, "random again", func() error { return r.Random(bounded(t), dst) })
			}
			r.opens(v, wrapped, secret)
		})
	}
}

// Who has no more time leaves, and what the module gives then is for nobody.
func TestRandomObeysItsDeadline(t *testing.T) {
	r, fault := newFaultyRig(t, func(_ *rig, c *hsm.Config) { c.Sessions = 1 })
	fault.Set("C_GenerateRandom sleep_ms=2000 count=1")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	dst, began := make([]byte, 32), time.Now()
	if err := r.Random(ctx, dst); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the end of its time", err)
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("it took %v", took)
	}
	fault.Set()
	again := make([]byte, 32)
	if err := r.Random(bounded(t), again); err != nil || bytes.Equal(again, make([]byte, 32)) {
		t.Errorf("afterwards: %x, %v", again, err)
	}
	if !bytes.Equal(dst, make([]byte, 32)) {
		t.Errorf("who left was given %x", dst)
	}
}
