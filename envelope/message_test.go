package envelope_test

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha512"
	"errors"
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/kms-agent/kms-agent/envelope"
)

func TestSealOpen(t *testing.T) {
	for _, size := range []int{0, 1, 15, 16, 1024, 4095, 4096, 4097, 1 << 20} {
		plaintext := testPlaintext(size)
		message, err := envelope.Seal([]byte("before"), testKey(), testEDKs(3), testContext(), plaintext)
		if err != nil {
			t.Fatalf("Seal of %d bytes: %v", size, err)
		}
		rest, found := bytes.CutPrefix(message, []byte("before"))
		if !found {
			t.Fatalf("Seal of %d bytes did not append to dst", size)
		}
		m, err := envelope.Parse(rest)
		if err != nil {
			t.Fatalf("Parse of %d bytes: %v", size, err)
		}
		if m.PlaintextSize() != size || m.FrameLength != uint32(max(size, envelope.MinFrameLength)) {
			t.Errorf("%d bytes: PlaintextSize %d, FrameLength %d", size, m.PlaintextSize(), m.FrameLength)
		}
		got, err := m.Open([]byte("before"), testKey())
		if err != nil || !bytes.Equal(got, append([]byte("before"), plaintext...)) {
			t.Errorf("Open of %d bytes: %d bytes, %v", size, len(got), err)
		}
		checkOpens(t, rest, testKey(), plaintext)
	}
}

// TestMessageIDsDiffer: one data key serves many messages because each has keys
// of its own.
func TestMessageIDsDiffer(t *testing.T) {
	seen := map[[envelope.MessageIDSize]byte]bool{}
	for range 100 {
		m, err := envelope.Parse(mustSeal(t, []byte("same")))
		if err != nil {
			t.Fatal(err)
		}
		if seen[m.MessageID] {
			t.Fatalf("message ID %x came twice", m.MessageID)
		}
		seen[m.MessageID] = true
	}
}

func TestExpandIsHKDF(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		root := rapid.SliceOfN(rapid.Byte(), 32, 64).Draw(t, "root")
		info := rapid.String().Draw(t, "info")
		want, err := hkdf.Expand(sha512.New, root, info, sha512.Size)
		if err != nil {
			t.Fatal(err)
		}
		if got := envelope.Expand(root, info); !bytes.Equal(got, want) {
			t.Fatalf("expand gave %x, crypto/hkdf %x", got, want)
		}
	})
}

// TestEveryBitFlip: no message opens once any bit of it is flipped, be it read
// whole or as a stream, framed, in several frames or not framed.
func TestEveryBitFlip(t *testing.T) {
	for name, message := range shortMessages(t) {
		t.Run(name, func(t *testing.T) {
			for i := range len(message) * 8 {
				changed := bytes.Clone(message)
				changed[i/8] ^= 1 << (i % 8)
				if _, err := open(changed, testKey()); !isRefusal(err) {
					t.Fatalf("bit %d of byte %d flipped: Open gave %v", i%8, i/8, err)
				}
				if _, err := openReader(bytes.NewReader(changed), testKey()); !isRefusal(err) {
					t.Fatalf("bit %d of byte %d flipped: Reader gave %v", i%8, i/8, err)
				}
			}
		})
	}
}

// TestEveryTruncation: the beginning of a message is never a message.
func TestEveryTruncation(t *testing.T) {
	for name, message := range shortMessages(t) {
		t.Run(name, func(t *testing.T) {
			for n := range message {
				if _, err := open(message[:n], testKey()); !errors.Is(err, envelope.ErrTruncated) || !errors.Is(err, envelope.ErrMalformed) {
					t.Fatalf("first %d of %d bytes: Parse gave %v, want ErrTruncated", n, len(message), err)
				}
				if _, err := openReader(bytes.NewReader(message[:n]), testKey()); !errors.Is(err, envelope.ErrTruncated) {
					t.Fatalf("first %d of %d bytes: Reader gave %v, want ErrTruncated", n, len(message), err)
				}
			}
		})
	}
}

func TestTrailingBytes(t *testing.T) {
	for name, message := range shortMessages(t) {
		for _, tail := range [][]byte{{0}, {0xFF}, message} {
			longer := append(bytes.Clone(message), tail...)
			if _, err := open(longer, testKey()); !errors.Is(err, envelope.ErrMalformed) {
				t.Errorf("%s with %d bytes more: Parse gave %v, want ErrMalformed", name, len(tail), err)
			}
			if _, err := openReader(bytes.NewReader(longer), testKey()); !errors.Is(err, envelope.ErrMalformed) {
				t.Errorf("%s with %d bytes more: Reader gave %v, want ErrMalformed", name, len(tail), err)
			}
		}
	}
}

func isRefusal(err error) bool {
	return errors.Is(err, envelope.ErrMalformed) || errors.Is(err, envelope.ErrDecrypt) || errors.Is(err, envelope.ErrLimit)
}

// shortMessages are one of every kind, short enough to be tried bit by bit.
func shortMessages(t *testing.T) map[string][]byte {
	t.Helper()
	messages := map[string][]byte{
		"sealed":          mustSeal(t, []byte("forty-two bytes of plaintext, one and all!")),
		"sealed, empty":   mustSeal(t, nil),
		"streamed":        mustStream(t, []byte("short")),
		"streamed, empty": mustStream(t, nil),
	}
	for _, v := range readVectors(t).Vectors {
		if v.Writer == "other" {
			messages[v.Name] = unhex(t, v.Message)
		}
	}
	return messages
}

// TestOpenFailureLeavesNothing: not a byte of plaintext stays behind when a
// later frame is bad.
func TestOpenFailureLeavesNothing(t *testing.T) {
	message := mustStream(t, bytes.Repeat([]byte{0xAA}, 3*envelope.StreamFrameLength))
	message[len(message)-1] ^= 1
	m, err := envelope.Parse(message)
	if err != nil {
		t.Fatal(err)
	}
	dst := make([]byte, 5, 5+m.PlaintextSize())
	got, err := m.Open(dst, testKey())
	if got != nil || !errors.Is(err, envelope.ErrDecrypt) {
		t.Fatalf("Open gave %d bytes, %v; want none, ErrDecrypt", len(got), err)
	}
	if i := bytes.IndexByte(dst[:cap(dst)], 0xAA); i >= 0 {
		t.Errorf("plaintext at byte %d of dst after a failure", i)
	}
}

// TestWrongDataKey: a foreign key, a key of a wrong length and a changed
// message are told alike.
func TestWrongDataKey(t *testing.T) {
	message := mustSeal(t, []byte("text"))
	for name, key := range map[string][]byte{"another": count(1, 32), "nil": nil, "16 bytes": count(0, 16), "33 bytes": count(0, 33)} {
		_, err := open(message, key)
		_, errStream := openReader(bytes.NewReader(message), key)
		for _, err := range []error{err, errStream} {
			if !errors.Is(err, envelope.ErrDecrypt) || err.Error() != envelope.ErrDecrypt.Error() {
				t.Errorf("%s: %v, want just ErrDecrypt", name, err)
			}
		}
	}
}

// TestCommitment: header tag and frames verify, and yet the message is refused,
// because its data key is not the one it commits to.
func TestCommitment(t *testing.T) {
	message := envelope.SealUncommitted(testKey(), testEDKs(1), []byte("text"))
	if _, err := open(message, testKey()); !errors.Is(err, envelope.ErrDecrypt) {
		t.Errorf("Open: %v, want ErrDecrypt", err)
	}
	if _, err := openReader(bytes.NewReader(message), testKey()); !errors.Is(err, envelope.ErrDecrypt) {
		t.Errorf("Reader: %v, want ErrDecrypt", err)
	}
}

// TestWriteRefusals: what may not be written is refused alike by Seal and
// NewWriter, without output.
func TestWriteRefusals(t *testing.T) {
	long := func(n int) string { return strings.Repeat("x", n) }
	manyPairs := map[string]string{}
	for i := range envelope.MaxContextPairs + 1 {
		manyPairs[fmt.Sprint(i)] = ""
	}
	edk := func(id, info, ciphertext int) []envelope.EDK {
		return []envelope.EDK{{ProviderID: long(id), ProviderInfo: make([]byte, info), Ciphertext: make([]byte, ciphertext)}}
	}
	var large []envelope.EDK
	for range 9 {
		large = append(large, edk(1, 1, envelope.MaxEDKSize)...)
	}
	for _, tt := range []struct {
		name    string
		key     []byte
		edks    []envelope.EDK
		context map[string]string
		limit   bool
		want    string
	}{
		{"short key", count(0, 31), testEDKs(1), nil, false, "32 bytes"},
		{"no EDK", testKey(), nil, nil, false, "at least one"},
		{"17 EDKs", testKey(), testEDKs(17), nil, true, "17 encrypted data keys"},
		{"no provider", testKey(), edk(0, 1, 1), nil, false, "provider ID"},
		{"provider not UTF-8", testKey(), []envelope.EDK{{ProviderID: "\xff", Ciphertext: []byte{1}}}, nil, false, "UTF-8"},
		{"empty EDK", testKey(), edk(1, 1, 0), nil, false, "empty"},
		{"long provider", testKey(), edk(257, 1, 1), nil, true, "provider ID"},
		{"long info", testKey(), edk(1, 4097, 1), nil, true, "provider information"},
		{"long EDK", testKey(), edk(1, 1, 8193), nil, true, "encrypted data key"},
		{"large header", testKey(), large, nil, true, "header"},
		{"65 pairs", testKey(), testEDKs(1), manyPairs, true, "65 pairs"},
		{"large context", testKey(), testEDKs(1), map[string]string{"k": long(envelope.MaxContextSize)}, true, "encryption context"},
		{"empty key", testKey(), testEDKs(1), map[string]string{"": "v"}, false, "empty key"},
		{"reserved by AWS", testKey(), testEDKs(1), map[string]string{"aws-crypto-public-key": "v"}, false, "reserved"},
		{"reserved by us", testKey(), testEDKs(1), map[string]string{"kms-agent-x": "v"}, false, "reserved"},
		{"key not UTF-8", testKey(), testEDKs(1), map[string]string{"\xff": "v"}, false, "UTF-8"},
		{"value not UTF-8", testKey(), testEDKs(1), map[string]string{"k": "\xff"}, false, "UTF-8"},
	} {
		var out bytes.Buffer
		message, err := envelope.Seal(nil, tt.key, tt.edks, tt.context, nil)
		_, errWriter := envelope.NewWriter(&out, tt.key, tt.edks, tt.context)
		for _, err := range []error{err, errWriter} {
			if err == nil || !strings.Contains(err.Error(), tt.want) || errors.Is(err, envelope.ErrLimit) != tt.limit {
				t.Errorf("%s: %v; want an error with %q, ErrLimit %t", tt.name, err, tt.want, tt.limit)
			}
		}
		if message != nil || out.Len() > 0 {
			t.Errorf("%s: wrote %d and %d bytes", tt.name, len(message), out.Len())
		}
	}
}

// TestWriteLimits: the very limits can be written and read.
func TestWriteLimits(t *testing.T) {
	context := map[string]string{}
	for i := range envelope.MaxContextPairs - 1 {
		context[fmt.Sprintf("%02d", i)] = ""
	}
	context["fill"] = strings.Repeat("x", envelope.MaxContextSize-2-63*6-8)
	edks := []envelope.EDK{{
		ProviderID:   strings.Repeat("p", envelope.MaxProviderIDSize),
		ProviderInfo: make([]byte, envelope.MaxProviderInfoSize),
		Ciphertext:   make([]byte, envelope.MaxEDKSize),
	}}
	edks = append(edks, testEDKs(envelope.MaxEDKs-1)...)
	message, err := envelope.Seal(nil, testKey(), edks, context, []byte("text"))
	if err != nil {
		t.Fatalf("Seal: %v", err)
	}
	checkOpens(t, message, testKey(), []byte("text"))
}

func TestSealTooLong(t *testing.T) {
	_, err := envelope.Seal(nil, testKey(), testEDKs(1), nil, make([]byte, envelope.MaxFrameLength+1))
	if !errors.Is(err, envelope.ErrLimit) || !strings.Contains(err.Error(), "stream") {
		t.Errorf("Seal of more than MaxFrameLength: %v, want ErrLimit and the cure", err)
	}
}

// TestErrorsTellNoSecrets: neither data keys nor context values get into errors.
func TestErrorsTellNoSecrets(t *testing.T) {
	err := envelope.CheckContext(map[string]string{"kms-agent-k": "value-to-hide", "\xff": "value-to-hide"})
	if err == nil || strings.Contains(err.Error(), "hide") {
		t.Errorf("CheckContext: %v", err)
	}
}
