package kms_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	mixed "github.com/kms-agent/kms-agent/agent/random"
)

// constant is a backend whose random is the same byte again and again, or an error.
type constant struct{ err error }

func (c constant) Random(_ context.Context, dst []byte) error {
	copy(dst, bytes.Repeat([]byte{0xc5}, len(dst)))
	return c.err
}

// random32 makes every kind of random there is, 32 bytes each, and returns it.
func (r *rig) random32(key string) (all [][]byte) {
	r.t.Helper()
	c, ctx := caller(r.t, orders), r.t.Context()
	_, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: key, Plaintext: []byte("x")})
	if err != nil {
		r.t.Fatal(err)
	}
	made, err := r.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: key})
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err = r.GenerateDataKeyWithoutPlaintext(ctx, c, kms.GenerateDataKeyRequest{Key: key}); err != nil {
		r.t.Fatal(err)
	}
	given, err := r.GenerateRandom(ctx, c, 32)
	if err != nil {
		r.t.Fatal(err)
	}
	return append(all, made.Plaintext, given)
}

// Every data key, and what callers ask for, has random of the backend in it, and is the
// system's all the same.
func TestBackendsRandomIsMixedIn(t *testing.T) {
	r := newRig(t)
	if err := r.random.Use("hsm", constant{}); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); r.random.Stats().Held < r.random.Stats().Size && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	seen := map[string]bool{}
	for _, key := range []string{"orders", "archive"} {
		for _, b := range r.random32(key) {
			if seen[string(b)] || bytes.Contains(b, bytes.Repeat([]byte{0xc5}, 8)) {
				t.Errorf("%x", b)
			}
			seen[string(b)] = true
		}
	}
	counts := r.random.Stats().Counts
	if c := counts[mixed.DataKey]; c != (mixed.Count{Mixed: 6, MixedBytes: 6 * 32}) {
		t.Errorf("data keys: %+v, want six that are mixed", c)
	}
	if c := counts[mixed.GenerateRandom]; c != (mixed.Count{Mixed: 2, MixedBytes: 64}) {
		t.Errorf("random: %+v, want two that are mixed", c)
	}
}

// A backend without random holds nothing up, and is counted.
func TestOperationsGoOnWithoutTheBackendsRandom(t *testing.T) {
	r := newRig(t)
	if err := r.random.Use("hsm", constant{err: unreachable()}); err != nil {
		t.Fatal(err)
	}
	r.random32("orders")
	counts := r.random.Stats().Counts
	if counts[mixed.DataKey] != (mixed.Count{Unmixed: 3, UnmixedBytes: 96}) || counts[mixed.GenerateRandom] != (mixed.Count{Unmixed: 1, UnmixedBytes: 32}) {
		t.Errorf("counts: %+v, want that nothing is mixed", counts)
	}
}
