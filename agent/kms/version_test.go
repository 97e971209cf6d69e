package kms_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/plugins"
)

// outdated does not tell of versions after the first.
type outdated struct{ plugins.Backend }

func (b outdated) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	d, err := b.Backend.Describe(ctx, uri)
	d.Current, d.Versions = "1", slices.DeleteFunc(d.Versions, func(v plugins.KeyVersion) bool { return v.Version != "1" })
	return d, err
}

// A version that this agent has not heard of is no key that is gone while
// upstream cannot be asked: another host may have met it first.
func TestNewVersionInAnOutage(t *testing.T) {
	r := newRig(t)
	ctx, c := t.Context(), caller(t, orders)
	if _, err := r.keystore.Rotate("orders"); err != nil {
		t.Fatal(err)
	}
	made, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
	if err != nil || made.KeyUse.Version != "2" {
		t.Fatalf("version %q, %v; want 2", made.KeyUse.Version, err)
	}
	use := func(b plugins.Backend) {
		r.config.Backends = map[string]plugins.Backend{"local": b}
		r.apply()
	}
	decrypt := func() error {
		_, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: made.Message})
		return err
	}
	stale := &switchable{Backend: outdated{r.backend}}
	use(stale)
	if _, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	wantReason(t, decrypt(), kms.ReasonKeyUnusable) // upstream itself says so
	r.clock.Advance(10 * time.Second)
	r.backend.fail(unreachable())
	wantReason(t, decrypt(), kms.ReasonBackendDown)
	r.backend.fail(nil)
	stale.Backend = r.backend
	r.clock.Advance(time.Millisecond) // too early to ask again
	wantReason(t, decrypt(), kms.ReasonBackendDown)
	r.clock.Advance(time.Second)
	if err := decrypt(); err != nil {
		t.Errorf("once upstream told of the version: %v", err)
	}
}

// switchable is another backend than before when a test says so.
type switchable struct{ plugins.Backend }
