package cache_test

import (
	"bytes"
	"testing"

	"github.com/kms-agent/kms-agent/cache"
)

func TestMemory(t *testing.T) {
	m, err := cache.NewMemory(100)
	if err != nil {
		t.Fatal(err)
	}
	if b := m.Bytes(); len(b) < 100 || !bytes.Equal(b, make([]byte, len(b))) {
		t.Errorf("%d bytes, want at least 100, of zeros", len(b))
	}
	copy(m.Bytes(), "secret")
	for range 2 {
		m.Free()
		if len(m.Bytes()) != 0 {
			t.Error("there is memory after Free")
		}
	}
}
