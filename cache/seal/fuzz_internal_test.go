package seal

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"testing"
)

// What parses as records encodes to the same bytes again.
func FuzzContent(f *testing.F) {
	f.Add(appendContent(nil, nil))
	f.Add(appendContent(nil, []Record{{DataKey, []byte("a")}, {Clock, nil}}))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0})
	f.Add([]byte{0, 0, 0, 1, 1, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, content []byte) {
		records, err := parseContent(content)
		if err != nil {
			return
		}
		if size, err := contentSize(records); err != nil || size != len(content) {
			t.Fatalf("contentSize: got %d, %v, want %d", size, err, len(content))
		}
		if again := appendContent(nil, records); !bytes.Equal(again, content) {
			t.Fatalf("got % x, want % x", again, content)
		}
	})
}

// What parses as a file has the one encoding. The checksum is mended, so that
// what is behind it is reached.
func FuzzFile(f *testing.F) {
	f.Add(append(appendHeader(nil, 7), 0, 0, 0, 3, 'a', 'b', 'c'))
	f.Add(append(appendHeader(nil, 7), 0xff, 0xff, 0xff, 0xff))
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, body []byte) {
		sum := sha256.Sum256(body)
		file := append(bytes.Clone(body), sum[:]...)
		e, err := parseFile(file)
		if err != nil {
			return
		}
		again := appendHeader(nil, e.counter)
		if !bytes.Equal(again, e.aad) {
			t.Fatalf("aad % x, want % x", e.aad, again)
		}
		again = append(binary.BigEndian.AppendUint32(again, uint32(len(e.sealed))), e.sealed...)
		if !bytes.Equal(again, body) {
			t.Fatalf("got % x, want % x", again, body)
		}
	})
}
