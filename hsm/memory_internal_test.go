package hsm

import (
	"bytes"
	"testing"
)

// What a job used of its worker's memory is zero after it, whatever the suite.
func TestMemoryIsErased(t *testing.T) {
	for _, hybrid := range []bool{false, true} {
		memory, err := newSlab(inSize + outSize)
		if err != nil {
			t.Fatal(err)
		}
		w := &worker{memory: memory, in: memory[:inSize:inSize], out: memory[inSize : inSize+outSize : inSize+outSize], job: job{hybrid: hybrid}}
		const n = 1000
		used := n + block + commitment + macSize // packed, committed to, with a MAC
		if hybrid {
			used = min(inSize, outSize)
		}
		for i := range used {
			w.in[i], w.out[i] = 7, 7
		}
		w.cleanAfter(n)
		if !bytes.Equal(memory, make([]byte, len(memory))) {
			t.Errorf("hybrid %v: something is left", hybrid)
		}
		memory.free()
	}
}
