package envelope_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"testing"

	"github.com/kms-agent/kms-agent/envelope"
)

// The test material is made by counting, so that vectors are the same forever.

func count(first byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

func testKey() []byte { return count(0, envelope.DataKeySize) }

func testID() [envelope.MessageIDSize]byte {
	return [envelope.MessageIDSize]byte(count(0x80, envelope.MessageIDSize))
}

// testPlaintext is n bytes in which no block of 4 comes twice.
func testPlaintext(n int) []byte {
	var b []byte
	for i := range uint32((n + 3) / 4) {
		b = binary.BigEndian.AppendUint32(b, i)
	}
	return append([]byte{}, b[:n]...)
}

func testContext() map[string]string {
	return map[string]string{"tenant": "acme", "table": "orders", "größe": "µ"}
}

func testInfo() envelope.ProviderInfo {
	return envelope.ProviderInfo{
		Purpose:   envelope.PurposeMessage,
		Key:       "orders",
		URI:       "vault:transit/orders",
		Version:   "3",
		Partition: [16]byte(count(0x40, 16)),
	}
}

func testEDKs(n int) []envelope.EDK {
	info, err := testInfo().Marshal()
	if err != nil {
		panic(err)
	}
	edks := []envelope.EDK{{ProviderID: envelope.ProviderID, ProviderInfo: info, Ciphertext: count(0xC0, 60)}}
	for i := 1; i < n; i++ {
		edks = append(edks, envelope.EDK{
			ProviderID:   fmt.Sprintf("provider-%d", i),
			ProviderInfo: count(byte(i), i),
			Ciphertext:   count(byte(0x10*i), 40+i),
		})
	}
	return edks
}

func mustSeal(tb testing.TB, plaintext []byte) []byte {
	tb.Helper()
	message, err := envelope.Seal(nil, testKey(), testEDKs(2), testContext(), plaintext)
	if err != nil {
		tb.Fatalf("Seal: %v", err)
	}
	return message
}

// mustStream is mustSeal by way of a Writer.
func mustStream(tb testing.TB, plaintext []byte) []byte {
	tb.Helper()
	var out bytes.Buffer
	w, err := envelope.NewWriter(&out, testKey(), testEDKs(2), testContext())
	if err != nil {
		tb.Fatalf("NewWriter: %v", err)
	}
	if _, err := w.Write(plaintext); err != nil {
		tb.Fatalf("Write: %v", err)
	}
	if err := w.Close(); err != nil {
		tb.Fatalf("Close: %v", err)
	}
	return out.Bytes()
}

// open opens a whole message.
func open(message, dataKey []byte) ([]byte, error) {
	m, err := envelope.Parse(message)
	if err != nil {
		return nil, err
	}
	return m.Open(nil, dataKey)
}

// openReader opens a stream and returns what it gave until its end or error.
func openReader(r io.Reader, dataKey []byte) ([]byte, error) {
	sr, err := envelope.NewReader(r)
	if err != nil {
		return nil, err
	}
	if err := sr.Unlock(dataKey); err != nil {
		return nil, err
	}
	return io.ReadAll(struct{ io.Reader }{sr})
}
