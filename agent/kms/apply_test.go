package kms_test

import (
	"context"
	"maps"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/kms-agent/kms-agent/agent/kms"
)

// A permission that is taken away is gone for every request that begins after
// Apply has returned, whatever is cached and under way, and no request suffers
// from a configuration that changes beside it.
func TestApplyUnderLoad(t *testing.T) {
	r := newRig(t)
	m := r.material()
	var allowed atomic.Bool
	var gate sync.RWMutex // held by a request that must meet one configuration
	allowed.Store(true)
	ctx, stop := context.WithCancel(t.Context())
	var work sync.WaitGroup
	for range 4 {
		work.Go(func() {
			c := caller(t, orders)
			for ctx.Err() == nil {
				gate.RLock()
				want := kms.Reason("")
				if !allowed.Load() {
					want = kms.ReasonAccessDenied
				}
				_, encrypted := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
				_, decrypted := r.Decrypt(t.Context(), c, kms.DecryptRequest{Message: m.message})
				gate.RUnlock()
				if kms.ReasonOf(encrypted) != want || kms.ReasonOf(decrypted) != want {
					t.Errorf("encrypt: %v, decrypt: %v; want %q", encrypted, decrypted, want)
					stop()
				}
				// And across a change, where either answer is right.
				_, err := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
				switch kms.ReasonOf(err) {
				case "", kms.ReasonAccessDenied, kms.ReasonBackendDown: // it says that the configuration changed
				default:
					t.Errorf("across a change: %v", err)
					stop()
				}
			}
		})
	}
	change := func(may bool) {
		next := r.config
		next.Backends = maps.Clone(r.config.Backends)
		if may {
			next.Policy = compile(t, everything())
			// Another process of the same backend.
			next.Backends["local"] = &troubled{Backend: r.backend.Backend}
		} else {
			next.Policy = compile(t, random())
		}
		gate.Lock()
		defer gate.Unlock()
		if err := r.Apply(next); err != nil {
			t.Errorf("apply: %v", err)
		}
		allowed.Store(may)
	}
	for i := range 60 {
		change(i%2 == 1)
	}
	stop()
	work.Wait()
}
