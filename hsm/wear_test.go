package hsm_test

import (
	"strings"
	"testing"

	"github.com/kms-agent/kms-agent/hsm"
)

// counted has a rig's wraps counted, of which a version of aes-gcm may make so many.
func counted(c **hsm.Counter, limit uint64) func(*rig, *hsm.Config) {
	return func(r *rig, cfg *hsm.Config) {
		r.t.Helper()
		var err error
		if *c, err = hsm.OpenCounter(r.t.TempDir(), (1<<32)/limit, nil); err != nil {
			r.t.Fatal(err)
		}
		cfg.Wraps = *c
	}
}

// Every wrap counts: the canary's, those of the tests of a key, and the callers'.
func TestEveryWrapIsCounted(t *testing.T) {
	var c *hsm.Counter
	r, fault := newFaultyRig(t, counted(&c, 1<<20))
	v := r.key("orders", hsm.GCM)
	fault.Calls()          // the token was tried too, with keys of no further use
	encrypted := uint64(3) // a canary, and a test
	count := func(when string, v *hsm.Version) {
		t.Helper()
		encrypted += uint64(fault.Calls()["C_Encrypt"])
		if used, _, err := c.Used(v); err != nil || used != encrypted {
			t.Errorf("%s: %d wraps are counted, the module made %d: %v", when, used, encrypted, err)
		}
	}
	count("made", v)
	m := material(32)
	wrapped := r.wrap(v, m)
	count("tested and used", v)
	r.opens(v, wrapped, m)
	r.logOut()
	r.opens(v, wrapped, m)
	count("found again", v)
	fault.Set("C_Encrypt rv=0x30 count=1")
	r.wrap(v, m)
	count("tried again", v)
	if encrypted < 8 {
		t.Errorf("%d wraps: the key was not tested anew", encrypted)
	}
}

// A version that has made all its wraps opens what it wrapped, also where the token must
// be found again: what it is tested with would be one wrap too many.
func TestWornVersion(t *testing.T) {
	var c *hsm.Counter
	const limit = 8
	r, fault := newFaultyRig(t, counted(&c, limit))
	v := r.key("orders", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(v, m)
	var err error
	for range limit {
		if _, err = r.Wrap(bounded(t), v, nil, m, bound); err != nil {
			break
		}
	}
	if hsm.KindOf(err) != hsm.KeyUnusable || !strings.Contains(err.Error(), "kms-agent hsm rotate orders") {
		t.Fatalf("one wrap too many: %v, want KeyUnusable with the cure", err)
	}
	fault.Calls()
	r.logOut()
	r.opens(v, wrapped, m)
	if _, err = r.Wrap(bounded(t), v, nil, m, bound); hsm.KindOf(err) != hsm.KeyUnusable {
		t.Errorf("afterwards: %v, want KeyUnusable", err)
	}
	if n := fault.Calls()["C_Encrypt"]; n != 0 {
		t.Errorf("%d wraps too many", n)
	}
	if used, most, err := c.Used(v); err != nil || used != limit || most != limit {
		t.Errorf("%d of %d wraps are counted, want %d: %v", used, most, limit, err)
	}
}

// A key that may not wrap any more, as where an operator has taken CKA_ENCRYPT away,
// opens what it wrapped; it wraps again when it may.
func TestKeyThatMayOpenOnly(t *testing.T) {
	r, fault := newFaultyRig(t)
	v := r.key("orders", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(v, m)
	fault.Set("C_EncryptInit rv=0x68") // CKR_KEY_FUNCTION_NOT_PERMITTED
	r.logOut()
	r.opens(v, wrapped, m)
	if _, err := r.Wrap(bounded(t), v, nil, m, bound); hsm.KindOf(err) != hsm.KeyUnusable {
		t.Errorf("Wrap: %v, want KeyUnusable", err)
	}
	r.keepsConnection()
	fault.Set()
	eventually(t, "it wraps again", func() error {
		_, err := r.Wrap(t.Context(), v, nil, m, bound)
		return err
	})
	r.opens(v, wrapped, m)
}
