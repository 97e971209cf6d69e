package envelope_test

import (
	"bytes"
	"testing"

	"github.com/kms-agent/kms-agent/envelope"
)

func addMessages(f *testing.F) {
	f.Helper()
	f.Add(mustSeal(f, []byte("text")))
	f.Add(mustStream(f, nil))
	for _, v := range readVectors(f).Vectors {
		f.Add(unhex(f, v.Message))
	}
	f.Add(append(goodHeader().bytes(), emptyFinal...))
}

// FuzzParse: nothing makes the parser panic; what parses marshals back; the
// Reader sees the same header.
func FuzzParse(f *testing.F) {
	addMessages(f)
	f.Fuzz(func(t *testing.T, message []byte) {
		if _, err := envelope.Parse(message); err != nil {
			if !isRefusal(err) {
				t.Fatalf("Parse: an error of no kind: %v", err)
			}
			return
		}
		if err := roundTrip(message); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzOpen flips a byte of a message of any kind: it does not open any more.
func FuzzOpen(f *testing.F) {
	messages := [][]byte{mustSeal(f, testPlaintext(100)), mustStream(f, testPlaintext(100))}
	for _, v := range readVectors(f).Vectors {
		if v.Message != "" {
			messages = append(messages, unhex(f, v.Message))
		}
	}
	f.Add(uint(0), uint(0), byte(1), uint(0))
	f.Fuzz(func(t *testing.T, which, at uint, flip byte, cut uint) {
		message := bytes.Clone(messages[which%uint(len(messages))])
		changed := bytes.Clone(message)
		changed[at%uint(len(changed))] ^= flip
		changed = changed[:uint(len(changed))-cut%uint(len(changed))]
		if bytes.Equal(changed, message) {
			return
		}
		_, err := open(changed, testKey())
		_, errStream := openReader(bytes.NewReader(changed), testKey())
		if !isRefusal(err) || !isRefusal(errStream) {
			t.Fatalf("byte %d changed by %#02x, %d cut: Open gave %v, Reader %v", at, flip, cut, err, errStream)
		}
	})
}

// FuzzProviderInfo: what parses marshals back.
func FuzzProviderInfo(f *testing.F) {
	f.Add(unhex(f, frozenInfo))
	f.Add(unhex(f, frozenCheckedInfo))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := envelope.ParseProviderInfo(b)
		if err != nil {
			if !isRefusal(err) {
				t.Fatalf("an error of no kind: %v", err)
			}
			return
		}
		if got, err := p.Marshal(); err != nil || !bytes.Equal(got, b) {
			t.Fatalf("%x parses to %+v, which marshals to %x, %v", b, p, got, err)
		}
	})
}

// FuzzSeal: whatever is sealed opens again to the same, whole and streamed.
func FuzzSeal(f *testing.F) {
	f.Add([]byte("plaintext"), "key", "value", "provider", []byte("info"), []byte("edk"))
	f.Fuzz(func(t *testing.T, plaintext []byte, key, value, provider string, info, ciphertext []byte) {
		edks := []envelope.EDK{{ProviderID: provider, ProviderInfo: info, Ciphertext: ciphertext}}
		message, err := envelope.Seal(nil, testKey(), edks, map[string]string{key: value}, plaintext)
		if err != nil {
			return
		}
		m, err := envelope.Parse(message)
		if err != nil || m.Context[key] != value || m.EDKs[0].ProviderID != provider {
			t.Fatalf("Parse of what was sealed: %+v, %v", m, err)
		}
		checkOpens(t, message, testKey(), plaintext)
	})
}
