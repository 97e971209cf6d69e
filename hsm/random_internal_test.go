package hsm

import (
	"bytes"
	"crypto/rand"
	"slices"
	"testing"
)

func TestStuckGenerators(t *testing.T) {
	fresh := func(n int) []byte {
		b := make([]byte, n)
		_, _ = rand.Read(b) // never fails
		return b
	}
	g, first, block := &generator{}, fresh(40), fresh(randomBlock)
	for _, c := range []struct {
		name   string
		random []byte
		good   bool
	}{
		{"the first", first, true},
		{"another", fresh(40), true},
		{"the one before the last", first, true},
		{"the same again", first, false},
		{"the same beginning", first[:randomBlock], false},
		{"zeros", make([]byte, randomBlock), false},
		{"zeros in the midst", slices.Concat(fresh(32), make([]byte, randomBlock), fresh(16)), false},
		{"one byte, again and again", bytes.Repeat([]byte{0xaa}, 64), false},
		{"a block twice in a row", slices.Concat(fresh(16), block, block), false},
		{"what came before the faults", first, false},
		{"well again", fresh(1024), true},
	} {
		if err := g.check(c.random); (err == nil) != c.good || err != nil && KindOf(err) != Broken {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
