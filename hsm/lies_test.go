package hsm_test

import (
	"errors"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
)

// boasts are lengths and counts that cannot be: some as large as the memory that results
// are written to.
func boasts() []string {
	return []string{"1", "64", "4121", "5224", "5227", "0x100000000", "0xfffffffffffffffe", "0xffffffffffffffff"}
}

// Lengths and counts that cannot be are the module's fault: they end no process, give
// nobody what is not there, and say nothing of keys.
func TestBoasts(t *testing.T) {
	for _, suite := range []hsm.Suite{hsm.GCM, hsm.CBCHMAC, hsm.OAEPSHA1} {
		t.Run(suite.String(), func(t *testing.T) {
			r, fault := newFaultyRig(t)
			v := r.key("orders", suite)
			m, large := material(32), material(hsm.MaxMaterial)
			wrapped, wrappedLarge := r.wrap(v, m), r.wrap(v, large)
			for _, size := range boasts() {
				for what, do := range map[string]func() error{
					"a wrap":         func() error { _, err := r.Wrap(bounded(t), v, nil, m, bound); return err },
					"a large wrap":   func() error { _, err := r.Wrap(bounded(t), v, nil, large, bound); return err },
					"an unwrap":      func() error { _, err := r.Unwrap(bounded(t), v, nil, wrapped, bound); return err },
					"a large unwrap": func() error { _, err := r.Unwrap(bounded(t), v, nil, wrappedLarge, bound); return err },
					"the keys":       func() error { _, err := r.Keys(bounded(t)); return err },
				} {
					fault.Set()
					r.opens(v, wrapped, m) // so that the key is known
					fault.Set("boast " + size)
					err := do()
					if kind := kindOf(err); kind != hsm.Broken && kind != hsm.Unavailable && (kind != hsm.BadCiphertext || what == "a wrap") {
						t.Errorf("%s, %s: %v", what, size, err)
					}
				}
			}
			fault.Set()
			r.opens(v, wrapped, m)
			r.opens(v, wrappedLarge, large)
		})
	}
}

// kindOf is the kind of the error of what must fail; 0 where it has none.
func kindOf(err error) hsm.Kind {
	if err == nil {
		return 0
	}
	return hsm.KindOf(err)
}

// Who boasts while a connection is made ends no process, and is connected to afterwards.
func TestBoastsWhileItConnects(t *testing.T) {
	r, fault := newFaultyRig(t, func(_ *rig, c *hsm.Config) { c.Patience = 50 * time.Millisecond })
	v, m := r.key("orders", hsm.GCM), material(32)
	wrapped := r.wrap(v, m)
	for _, size := range boasts()[2:] {
		_ = fault.Calls()
		fault.Set("boast "+size, "C_Decrypt rv=0x30") // which loses the connection
		eventually(t, "it connects", func() error {
			// Where the slots that there are not are few, it is connected, and finds too much.
			_, err := r.Unwrap(bounded(t), v, nil, wrapped, bound)
			if kind := kindOf(err); kind != hsm.Unavailable && kind != hsm.Broken {
				t.Fatalf("%s: %v", size, err)
			}
			if fault.Calls()["C_GetSlotList"] == 0 {
				return errors.New("it does not")
			}
			return nil
		})
		fault.Set()
		eventually(t, "it works again", func() error {
			_, err := r.Unwrap(t.Context(), v, nil, wrapped, bound)
			return err
		})
	}
}

// A token that chooses the initialization vectors, and chooses one twice, is found out
// while it serves.
func TestVectorTwice(t *testing.T) {
	r, fault := newFaultyRig(t)
	fault.Set("iv written")
	v := r.key("orders", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(v, m)
	fault.Set("iv stuck")
	r.wrap(v, m)
	for range 3 {
		if _, err := r.Wrap(bounded(t), v, nil, m, bound); kindOf(err) != hsm.Broken {
			t.Errorf("Wrap with a vector that was used: %v, want that the token is broken", err)
		}
	}
	r.opens(v, wrapped, m)
	fault.Set("iv written")
	r.opens(v, r.wrap(v, m), m)
}
