package identity_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/kms-agent/kms-agent/identity"
)

// Whoever sends bad tokens has a bounded number of signatures verified, and keeps
// nobody out whose token is known.
func TestJWTFlood(t *testing.T) {
	w := newJWTWorld(t, nil)
	conn, known, fresh := w.agent.dial(t, nil), w.key.token(t, nil), w.key.token(t, map[string]any{"jti": "fresh"})
	w.wantBearer(t, conn, known, orders, identity.ProofJWTSVID)
	bad := w.tokenContext(t, newJWTKey(t, "first", jose.ES256).token(t, nil))
	flood := func(atLeast int) {
		t.Helper()
		for n := range 100_000 {
			_, err := identity.CallerFromContext(bad)
			if errors.Is(err, identity.ErrThrottled) {
				if n < atLeast {
					t.Errorf("%d bad tokens are too many", n)
				}
				return
			}
			if !errors.Is(err, identity.ErrUntrusted) {
				t.Fatalf("a bad token: %v", err)
			}
		}
		t.Fatal("any number of bad tokens is verified")
	}
	flood(50)
	w.wantBearer(t, conn, known, orders, identity.ProofJWTSVID)
	// Also when it is due to be verified again.
	w.clock.forward(2 * time.Minute)
	flood(50)
	w.wantBearer(t, conn, known, orders, identity.ProofJWTSVID)
	flood(0)
	if _, err := identity.CallerFromContext(w.tokenContext(t, fresh)); err != nil && !errors.Is(err, identity.ErrThrottled) {
		t.Errorf("a token that is not known yet: %v", err)
	}
	w.clock.forward(time.Second)
	w.wantBearer(t, conn, fresh, orders, identity.ProofJWTSVID)
}

// Honest tokens that do not hold any more do not count.
func TestJWTsThatAreNotVerifiedAreNoFlood(t *testing.T) {
	w := newJWTWorld(t, nil)
	for name, token := range map[string]string{
		"expired":    w.key.token(t, map[string]any{"exp": time.Now().Add(-2 * time.Minute).Unix()}),
		"rotated":    newJWTKey(t, "former", jose.ES256).token(t, nil),
		"no token":   strings.Repeat("x", 100),
		"of another": w.key.token(t, map[string]any{"aud": "another"}),
	} {
		ctx := w.tokenContext(t, token)
		for range 200 {
			if _, err := identity.CallerFromContext(ctx); err == nil || errors.Is(err, identity.ErrThrottled) {
				t.Fatalf("%s: %v, want a refusal for what it is", name, err)
			}
		}
	}
}
