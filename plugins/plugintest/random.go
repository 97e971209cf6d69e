package plugintest

import (
	"bytes"
	"sync"
	"testing"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
)

// testRandom tests a backend that has the capability, and that one which has not says so.
func testRandom(t *testing.T, i Instance) {
	if process, ok := i.Backend.(interface{ Status() host.Status }); ok {
		if info := process.Status().Plugin; info.Gives(plugins.CapabilityRandom) != i.Random {
			t.Errorf("the backend names the capabilities %v; Instance.Random is %v", info.Capabilities, i.Random)
		}
	}
	source, ok := i.Backend.(plugins.RandomSource)
	switch {
	case !i.Random && ok:
		if err := source.Random(bounded(t), make([]byte, 32)); plugins.ClassOf(err) != plugins.Invalid {
			t.Errorf("Random without the capability: got %v, want Invalid", err)
		}
	case !i.Random:
		t.Log("the backend gives no random")
	case !ok:
		t.Errorf("%T is no plugins.RandomSource", i.Backend)
	default:
		testRandomSource(t, source)
	}
}

func testRandomSource(t *testing.T, source plugins.RandomSource) {
	for _, size := range []int{0, plugins.MaxRandomSize + 1, 64 << 10} {
		if err := source.Random(bounded(t), make([]byte, size)); plugins.ClassOf(err) != plugins.Invalid {
			t.Errorf("Random of %d bytes: got %v, want Invalid", size, err)
		}
	}
	for _, size := range []int{1, 2, 15, 16, 17, 32, 1023, plugins.MaxRandomSize} {
		// What stands behind dst is not the backend's.
		whole := bytes.Repeat([]byte{0x5a}, size+64)
		if err := source.Random(bounded(t), whole[:size]); err != nil {
			t.Errorf("Random of %d bytes: %v", size, err)
		}
		if !bytes.Equal(whole[size:], bytes.Repeat([]byte{0x5a}, 64)) {
			t.Errorf("Random of %d bytes wrote beyond them", size)
		}
	}
	testRandomDiffers(t, source)
}

// testRandomDiffers asks for much at once: no two answers, and no two blocks of 16 bytes
// in them, are the same, but by a chance of 2^-100.
func testRandomDiffers(t *testing.T, source plugins.RandomSource) {
	const answers, block = 16, 16
	var mu sync.Mutex
	seen := map[[block]byte]bool{{}: true} // a block of zeros was not written
	var wg sync.WaitGroup
	for range answers {
		wg.Go(func() {
			dst := make([]byte, 512)
			if err := source.Random(bounded(t), dst); err != nil {
				t.Errorf("Random: %v", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for at := 0; at < len(dst); at += block {
				if b := [block]byte(dst[at:]); seen[b] {
					t.Errorf("Random: the block at %d was there before, or is zero", at)
				} else {
					seen[b] = true
				}
			}
		})
	}
	wg.Wait()
}
