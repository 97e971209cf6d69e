package kms_test

import (
	"bytes"
	"io"
	"runtime"
	"testing"
	"time"
	"weak"

	"github.com/kms-agent/kms-agent/agent/kms"
)

// A data key in the cache does not keep the message that it was met in.
func TestMessagesAreNotKept(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	message := func() []byte {
		out, err := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: "orders", Plaintext: make([]byte, 1<<20)})
		if err != nil {
			t.Fatal(err)
		}
		return out.Message
	}
	for name, open := range map[string]func([]byte) error{
		"message": func(m []byte) error {
			_, err := r.Decrypt(t.Context(), c, kms.DecryptRequest{Message: m})
			return err
		},
		"stream": func(m []byte) error {
			st, err := r.DecryptStream(t.Context(), c, nil, bytes.NewReader(m))
			if err != nil {
				return err
			}
			if _, err := io.Copy(io.Discard, st); err != nil {
				return err
			}
			return st.Close(t.Context(), nil)
		},
	} {
		if _, _, err := r.Evict("orders"); err != nil {
			t.Fatal(err)
		}
		m := message()
		kept := weak.Make(&m[0])
		if err := open(m); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		m = nil
		for deadline := time.Now().Add(10 * time.Second); kept.Value() != nil; runtime.GC() {
			if time.Now().After(deadline) {
				t.Errorf("%s: it is still in memory", name)
				break
			}
		}
		if s := r.Stats(); s.DecryptionKeys != 1 {
			t.Errorf("%s: %d data keys in the cache, want 1", name, s.DecryptionKeys)
		}
	}
}
