package hsm_test

import (
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
)

// Verify tells what is wrong with a version, and an outage from that.
func TestVerify(t *testing.T) {
	var c *hsm.Counter
	r, fault := newFaultyRig(t, counted(&c, 64), func(_ *rig, c *hsm.Config) { c.Patience = 50 * time.Millisecond })
	r.key("orders", hsm.GCM)
	if _, err := r.Rotate(bounded(t), "orders", 0); err != nil {
		t.Fatal(err)
	}
	k, err := r.SetState(bounded(t), "orders", 1, hsm.Disabled)
	if err == nil {
		k, err = r.Rotate(bounded(t), "orders", 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	disabled, older, current := k.Versions[0], k.Versions[1], k.Versions[2]
	wants := func(when string, v *hsm.Version, want hsm.Kind) {
		t.Helper()
		if err := r.Verify(bounded(t), v); kindOf(err) != want {
			t.Errorf("%s: version %d: %v, want %v", when, v.Number, err, want)
		}
	}
	all := []*hsm.Version{disabled, older, current}
	for _, v := range all {
		wants("well", v, 0)
	}
	for _, rule := range []string{"C_FindObjectsInit rv=0xb3 count=1", "C_FindObjectsInit rv=0x101 count=1", "C_DecryptInit rv=0x82 count=1"} {
		for _, v := range all {
			r.logOut()
			fault.Set(rule)
			wants("once "+rule, v, 0)
		}
	}
	for _, rule := range []string{"dead", "C_FindObjectsInit rv=0x30", "C_FindObjectsInit rv=0x101"} {
		for _, v := range all {
			r.logOut()
			fault.Set(rule)
			wants(rule, v, hsm.Unavailable)
			fault.Set()
			eventually(t, "it is back", func() error { return r.Check(t.Context()) })
		}
	}
	r.logOut()
	fault.Set("C_EncryptInit rv=0x68")
	wants("not let to wrap", older, 0) // which it is not asked for
	wants("not let to wrap", current, hsm.KeyUnusable)
	fault.Set()
	wants("let to wrap again", current, 0)
	for err == nil {
		_, err = r.Wrap(bounded(t), current, nil, material(32), bound)
	}
	if kindOf(err) != hsm.KeyUnusable {
		t.Errorf("Wrap: %v, want that all are made", err)
	}
	wants("worn", current, hsm.KeyUnusable)
	r.logOut()
	wants("worn, and found again", current, hsm.KeyUnusable)
	r.substitute(older)
	r.logOut()
	wants("another key", older, hsm.KeyUnusable)
}

// A token without a random generator can be used all the same.
func TestTokenWithoutRandom(t *testing.T) {
	for _, code := range []string{"0x121", "0x54"} {
		t.Run(code, func(t *testing.T) {
			r, fault := newFaultyRig(t)
			fault.Set("C_GenerateRandom rv=" + code)
			if err := r.Check(bounded(t)); err != nil {
				t.Errorf("Check: %v", err)
			}
			if keys, err := r.Keys(bounded(t)); err != nil || len(keys) != 0 {
				t.Errorf("Keys: %v, %v; want none", keys, err)
			}
			if _, err := r.Key(bounded(t), "missing"); kindOf(err) != hsm.KeyNotFound {
				t.Errorf("Key: %v, want that there is none", err)
			}
			v, m := r.key("orders", hsm.GCM), material(32)
			r.opens(v, r.wrap(v, m), m)
			if p, err := r.Probe(bounded(t)); err != nil || kindOf(p.Random) != hsm.Invalid {
				t.Errorf("Probe: %v, random: %v; want that there is none", err, p.Random)
			}
			if n := r.attached(); n != 1 {
				t.Errorf("attached %d times, want once", n)
			}
		})
	}
}
