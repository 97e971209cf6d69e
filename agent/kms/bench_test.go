package kms_test

import (
	"testing"

	"github.com/kms-agent/kms-agent/agent/kms"
)

// What one operation costs below the doors: policy, cache, message and audit.
func BenchmarkEncrypt1KiB(b *testing.B) {
	r := newRig(b)
	c := caller(b, orders)
	req := kms.EncryptRequest{Key: "orders", Plaintext: make([]byte, 1<<10)}
	b.SetBytes(1 << 10)
	b.ReportAllocs()
	b.SetParallelism(8)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := r.Encrypt(b.Context(), c, req); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkDecrypt1KiB(b *testing.B) {
	r := newRig(b)
	c := caller(b, orders)
	made, err := r.Encrypt(b.Context(), c, kms.EncryptRequest{Key: "orders", Plaintext: make([]byte, 1<<10)})
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(1 << 10)
	b.ReportAllocs()
	b.SetParallelism(8)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := r.Decrypt(b.Context(), c, kms.DecryptRequest{Message: made.Message}); err != nil {
				b.Fatal(err)
			}
		}
	})
}
