package tpm

import (
	"bytes"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

// What parses as a sealed secret is put together to the same bytes.
func FuzzObject(f *testing.F) {
	f.Add([]byte{0, 1, 'a', 0, 2, 'b', 'c'})
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte{0xff, 0xff, 0, 0})
	f.Fuzz(func(t *testing.T, object []byte) {
		public, private, err := splitObject(object)
		if err != nil {
			return
		}
		if again := append(tpm2.Marshal(*public), tpm2.Marshal(*private)...); !bytes.Equal(again, object) {
			t.Fatalf("got % x, want % x", again, object)
		}
	})
}
