package kms_test

import (
	"strings"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/plugins"
)

// A wrapping key that was never there is told to the operator too, until it is.
func TestHealthOfAMissingWrappingKey(t *testing.T) {
	r := newRig(t)
	problem := func() string {
		for _, h := range r.Health() {
			if h.Name == "orders" {
				return h.Problem
			}
		}
		return "no such key"
	}
	encrypt := func() error {
		_, err := r.Encrypt(t.Context(), caller(t, orders), kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
		return err
	}
	r.backend.fail(plugins.Errorf(plugins.Unavailable, "away"))
	if err := encrypt(); err == nil || problem() != "" {
		t.Errorf("an outage is no fault of the key: %v, %q", err, problem())
	}
	r.backend.fail(plugins.Errorf(plugins.KeyNotFound, "make it with init-key"))
	if err := encrypt(); err == nil || !strings.Contains(problem(), "make it with init-key") {
		t.Errorf("of a missing key: %v, %q", err, problem())
	}
	r.backend.fail(nil)
	if err := encrypt(); err != nil || problem() != "" {
		t.Errorf("once it is there: %v, %q", err, problem())
	}
}

// A version that is too old encrypts and wraps nothing new, cached or not, and opens
// what it has wrapped.
func TestMaxVersionAge(t *testing.T) {
	r := newRig(t)
	m, c := r.material(), caller(t, orders)
	r.config.Keys[0].MaxVersionAge = time.Nanosecond
	r.apply()
	calls := map[string]func() error{
		"Encrypt": func() error {
			_, err := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
			return err
		},
		"GenerateDataKey": func() error {
			_, err := r.GenerateDataKey(t.Context(), c, kms.GenerateDataKeyRequest{Key: "orders"})
			return err
		},
		"Wrap": func() error {
			_, err := r.Wrap(t.Context(), c, kms.WrapRequest{Key: "orders", Plaintext: make([]byte, 32)})
			return err
		},
	}
	for name, call := range calls {
		err := call()
		wantReason(t, err, kms.ReasonKeyUnusable)
		if !strings.Contains(err.Error(), "rotate the wrapping key") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := r.Decrypt(t.Context(), c, kms.DecryptRequest{Message: m.message}); err != nil {
		t.Errorf("Decrypt: %v", err)
	}
	for _, h := range r.Health() {
		if strings.Contains(h.Problem, "rotate the wrapping key") != (h.Name == "orders") {
			t.Errorf("health: %+v", h)
		}
	}
	r.config.Keys[0].MaxVersionAge = time.Hour
	r.apply()
	for name, call := range calls {
		if err := call(); err != nil {
			t.Errorf("%s of a version that is young: %v", name, err)
		}
	}
}
