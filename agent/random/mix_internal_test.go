package random

import (
	"bytes"
	"context"
	"encoding/binary"
	"testing"
	"testing/synctest"
	"time"
)

// counter is a backend whose random is 8 bytes of a count, again and again.
type counter struct{ blocks uint64 }

func (c *counter) Random(_ context.Context, dst []byte) error {
	for at := 0; at < len(dst); at += 8 {
		c.blocks++
		binary.BigEndian.PutUint64(dst[at:], c.blocks)
	}
	return nil
}

// What comes out is what the system gave XOR what the backend gave, over all bytes. Each
// byte of the backend is used once, and erased.
func TestMixing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(nil)
		if err := p.Use("hsm", &counter{}); err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		time.Sleep(time.Second)
		system := []byte("0123456789abcdef0123456789abcdef") // as rand.Read might have filled it
		seen := map[uint64]bool{}
		for range poolSize / len(system) / 2 {
			out := bytes.Clone(system)
			p.mix(out, DataKey)
			for at := 0; at < len(out); at += 8 {
				block := binary.BigEndian.Uint64(out[at:]) ^ binary.BigEndian.Uint64(system[at:])
				if block == 0 || block > poolSize/8 || seen[block] {
					t.Fatalf("%x is %x XOR %x, which is not of the backend, or was used before", out, system, block)
				}
				seen[block] = true
			}
			p.mu.Lock()
			if rest := p.memory.Bytes()[p.held:]; !bytes.Equal(rest, make([]byte, len(rest))) {
				t.Fatal("what was used is not erased")
			}
			p.mu.Unlock()
			synctest.Wait()
		}
		// Without enough at hand it is the system's, all of it.
		much := bytes.Repeat([]byte{7}, poolSize+1)
		if p.mix(much, DataKey); !bytes.Equal(much, bytes.Repeat([]byte{7}, poolSize+1)) {
			t.Error("a part was mixed")
		}
		if err := p.Use("", nil); err != nil {
			t.Fatal(err)
		}
		if all := p.memory.Bytes(); !bytes.Equal(all, make([]byte, len(all))) {
			t.Error("what was held is not erased")
		}
	})
}
