package client_test

import (
	"testing"

	"github.com/kms-agent/kms-agent/client"
)

// BenchmarkEncrypt compares a call of the agent with the same in process, for
// 1 KiB.
func BenchmarkEncrypt(b *testing.B) {
	c := as(b, "orders")
	p := inProcess(b, c)
	request := &client.EncryptRequest{Key: "orders", Plaintext: make([]byte, 1024), Context: acme}
	for name, with := range map[string]cryptor{"agent": c, "in process": p} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(1024)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := with.Encrypt(b.Context(), request); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}
