package kms_test

import (
	"testing"

	"github.com/kms-agent/kms-agent/agent/kms"
)

// TestMessageLargerThanMaxBytes is the caller's fault, and is told so.
func TestMessageLargerThanMaxBytes(t *testing.T) {
	r := newRig(t)
	r.config.Keys[0].Limits.MaxBytes = 10
	r.apply()
	_, err := r.Encrypt(t.Context(), caller(t, orders), kms.EncryptRequest{Key: "orders", Plaintext: make([]byte, 11)})
	wantReason(t, err, kms.ReasonTooLarge)
	_, err = r.Encrypt(t.Context(), caller(t, orders), kms.EncryptRequest{Key: "orders", Plaintext: make([]byte, 10)})
	wantReason(t, err, "")
}
