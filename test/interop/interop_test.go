package interop_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/fips140"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/kms-agent/kms-agent/envelope"
)

const suite0478 = 0x0478

func keys(n int) []rawAESKey {
	var all []rawAESKey
	for i := range n {
		all = append(all, rawAESKey{Namespace: "kms-agent interop", Name: fmt.Sprintf("key %d", i), Key: random(32)})
	}
	return all
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}

// contextAAD is the serialised encryption context, to which AWS's raw AES
// keyring binds the data key.
func contextAAD(context map[string]string) []byte {
	if len(context) == 0 {
		return nil
	}
	b := binary.BigEndian.AppendUint16(nil, uint16(len(context)))
	for _, key := range slices.Sorted(maps.Keys(context)) {
		for _, s := range []string{key, context[key]} {
			b = binary.BigEndian.AppendUint16(b, uint16(len(s)))
			b = append(b, s...)
		}
	}
	return b
}

func gcm(t *testing.T, key []byte) cipher.AEAD {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	var aead cipher.AEAD
	fips140.WithoutEnforcement(func() { aead, err = cipher.NewGCM(block) }) // the other side chooses its IVs too
	if err != nil {
		t.Fatal(err)
	}
	return aead
}

// wrap makes the EDK that AWS's raw AES keyring makes: provider ID = namespace;
// provider information = name, tag length in bits, IV length, IV.
func (k rawAESKey) wrap(t *testing.T, dataKey []byte, context map[string]string) envelope.EDK {
	t.Helper()
	iv := random(12)
	info := binary.BigEndian.AppendUint32([]byte(k.Name), 128)
	info = binary.BigEndian.AppendUint32(info, 12)
	return envelope.EDK{
		ProviderID:   k.Namespace,
		ProviderInfo: append(info, iv...),
		Ciphertext:   gcm(t, k.Key).Seal(nil, iv, dataKey, contextAAD(context)),
	}
}

// unwrap finds k's EDK in a header and decrypts it.
func (k rawAESKey) unwrap(t *testing.T, h *envelope.Header) []byte {
	t.Helper()
	for _, e := range h.EDKs {
		rest, found := bytes.CutPrefix(e.ProviderInfo, []byte(k.Name))
		if e.ProviderID != k.Namespace || !found || len(rest) != 4+4+12 {
			continue
		}
		dataKey, err := gcm(t, k.Key).Open(nil, rest[8:], e.Ciphertext, contextAAD(h.Context))
		if err != nil {
			t.Fatalf("unwrap: %v", err)
		}
		return dataKey
	}
	t.Fatalf("no EDK of %s among %d", k.Name, len(h.EDKs))
	return nil
}

func sizes() []int {
	if !full() {
		return []int{0, 1, 5000, 200_000}
	}
	const frame = envelope.StreamFrameLength
	return []int{0, 1, 2, 15, 16, 17, 255, 1023, 4095, 4096, 4097, 8192, 10_000, frame - 1, frame, frame + 1, 2 * frame, 3*frame + 1, 1 << 20, 5_000_001}
}

func contexts() map[string]map[string]string {
	all := map[string]map[string]string{
		"none":         nil,
		"beyond ASCII": {"größe": "µ", "zebra": "1", "Ähre": "2", "鍵": "значение", "\U0001F511": "astral", "\uFF5E": "before astral in UTF-8, after it in UTF-16"},
	}
	if !full() {
		return all
	}
	many := map[string]string{}
	for i := range envelope.MaxContextPairs {
		many[fmt.Sprintf("key-%d", i)] = strings.Repeat("v", i)
	}
	all["one"] = map[string]string{"tenant": "acme"}
	all["many"] = many
	all["empty value"] = map[string]string{"empty": "", "tenant": "acme"}
	all["long"] = map[string]string{"long": strings.Repeat("x", envelope.MaxContextSize-2-4-4)}
	return all
}

func frameLengths() []int {
	if !full() {
		return []int{4096}
	}
	return []int{1000, 4096, 65536, 1 << 20}
}

// TestTheyOpenOurs: one-shot messages and streams, opened by them as a whole
// and as a stream, with one key and with any of several.
func TestTheyOpenOurs(t *testing.T) {
	p := startPeer(t)
	all := keys(3)
	for name, context := range contexts() {
		for _, size := range sizes() {
			for _, n := range []int{1, 3} {
				plaintext, dataKey := random(size), random(envelope.DataKeySize)
				edks := []envelope.EDK{ourEDK(t)}
				for _, k := range all[:n] {
					edks = append(edks, k.wrap(t, dataKey, context))
				}
				for kind, message := range map[string][]byte{
					"message": seal(t, dataKey, edks, context, plaintext),
					"stream":  stream(t, dataKey, edks, context, plaintext),
				} {
					label := fmt.Sprintf("%s of %d bytes, %d keys, context %q", kind, size, n, name)
					theyOpen(t, p, label, all[n-1], message, context, plaintext)
				}
			}
		}
	}
}

// ourEDK is one that they do not know and have to step over.
func ourEDK(t *testing.T) envelope.EDK {
	t.Helper()
	info, err := envelope.ProviderInfo{Purpose: envelope.PurposeMessage, Key: "orders", URI: "local:orders", Version: "1"}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return envelope.EDK{ProviderID: envelope.ProviderID, ProviderInfo: info, Ciphertext: random(60)}
}

func seal(t *testing.T, dataKey []byte, edks []envelope.EDK, context map[string]string, plaintext []byte) []byte {
	t.Helper()
	message, err := envelope.Seal(nil, dataKey, edks, context, plaintext)
	if err != nil {
		t.Fatalf("Seal: %v", err)
	}
	return message
}

func stream(t *testing.T, dataKey []byte, edks []envelope.EDK, context map[string]string, plaintext []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := envelope.NewWriter(&out, dataKey, edks, context)
	if err != nil {
		t.Fatalf("NewWriter: %v", err)
	}
	if _, err := w.Write(plaintext); err != nil {
		t.Fatalf("Write: %v", err)
	}
	if err := w.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	return out.Bytes()
}

func theyOpen(t *testing.T, p *peer, label string, key rawAESKey, message []byte, context map[string]string, plaintext []byte) {
	t.Helper()
	got, err := p.do(t, request{Operation: "decrypt", Keys: []rawAESKey{key}, Data: message})
	if err != nil || !bytes.Equal(got.Data, plaintext) {
		t.Errorf("%s: they decrypted %d bytes, %v", label, len(got.Data), err)
		return
	}
	if diff := cmp.Diff(context, got.Context, cmpopts.EquateEmpty()); diff != "" || got.Suite != suite0478 {
		t.Errorf("%s: suite %04x, context (-ours +theirs):\n%s", label, got.Suite, diff)
	}
	got, err = p.do(t, request{Operation: "decryptStream", Keys: []rawAESKey{key}, Data: message})
	if err != nil || !bytes.Equal(got.Data, plaintext) {
		t.Errorf("%s: their stream decrypted %d bytes, %v", label, len(got.Data), err)
	}
}

// TestWeOpenTheirs: messages and streams of several frame lengths, opened by us
// as a whole and as a stream.
func TestWeOpenTheirs(t *testing.T) {
	p := startPeer(t)
	all := keys(3)
	for name, context := range contexts() {
		for _, size := range sizes() {
			for _, frameLength := range frameLengths() {
				for _, operation := range []string{"encrypt", "encryptStream"} {
					if size/frameLength > 2000 {
						continue // thousands of frames take them minutes
					}
					plaintext := random(size)
					got, err := p.do(t, request{Operation: operation, Keys: all, Context: context, FrameLength: frameLength, Data: plaintext})
					label := fmt.Sprintf("%s of %d bytes, frame length %d, context %q", operation, size, frameLength, name)
					if err != nil {
						t.Errorf("%s: %v", label, err)
						continue
					}
					weOpen(t, label, all[size%3], got.Data, context, plaintext)
				}
			}
		}
	}
}

func weOpen(t *testing.T, label string, key rawAESKey, message []byte, context map[string]string, plaintext []byte) {
	t.Helper()
	m, err := envelope.Parse(message)
	if err != nil {
		t.Errorf("%s: Parse: %v", label, err)
		return
	}
	if diff := cmp.Diff(context, m.Context, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("%s: context (-theirs +ours):\n%s", label, diff)
	}
	dataKey := key.unwrap(t, &m.Header)
	if got, err := m.Open(nil, dataKey); err != nil || !bytes.Equal(got, plaintext) {
		t.Errorf("%s: Open gave %d bytes, %v", label, len(got), err)
	}
	r, err := envelope.NewReader(bytes.NewReader(message))
	if err != nil {
		t.Errorf("%s: NewReader: %v", label, err)
		return
	}
	if err := r.Unlock(dataKey); err != nil {
		t.Errorf("%s: Unlock: %v", label, err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, plaintext) {
		t.Errorf("%s: Reader gave %d bytes, %v", label, len(got), err)
	}
}

// TestTheyRefuseOursWhenChanged: what they check of our messages is what we
// mean by it.
func TestTheyRefuseOursWhenChanged(t *testing.T) {
	p := startPeer(t)
	key, dataKey := keys(1), random(envelope.DataKeySize)
	context := map[string]string{"tenant": "acme"}
	message := seal(t, dataKey, []envelope.EDK{key[0].wrap(t, dataKey, context)}, context, []byte("text"))
	step := 7
	if full() {
		step = 1
	}
	for at := 0; at < len(message); at += step {
		changed := bytes.Clone(message)
		changed[at] ^= 1
		if _, err := p.do(t, request{Operation: "decrypt", Keys: key, Data: changed}); err == nil {
			t.Errorf("they opened our message with byte %d changed", at)
		}
	}
}
