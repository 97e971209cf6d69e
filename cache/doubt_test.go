package cache_test

import (
	"testing"

	"github.com/kms-agent/kms-agent/cache"
)

// TestDoubt: what opens nothing is asked for anew, and only its user's; what has
// opened something stays. It is used until it is released all the same.
func TestDoubt(t *testing.T) {
	bubble(t, func(r *rig) {
		use := func() *cache.Use {
			u, err := r.Decrypt(r.t.Context(), r.decryption(1))
			if err != nil {
				r.t.Fatal(err)
			}
			return u
		}
		first := use()
		r.Doubt(first)
		second := use()
		r.wantCalls(2, 0)
		if got, want := string(first.DataKey()), string(dataKey(1)); got != want {
			r.t.Errorf("a data key in use is %x, want %x", got, want)
		}
		r.Doubt(first) // another has taken its place, which is none of its business
		second.Proven()
		r.Doubt(second)
		use().Release()
		first.Release()
		second.Release()
		r.wantCalls(2, 0)
	})
}
