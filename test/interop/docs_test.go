package interop_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

// TestDocumentedReader runs the script of docs/format.md: whoever has the page
// and a data key can open messages without any code of ours.
func TestDocumentedReader(t *testing.T) {
	script := documentedScript(t)
	raw, err := os.ReadFile(vectorDir + "vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var f struct {
		DataKey string
		Vectors []struct {
			Name, Message   string
			PlaintextLength int
		}
	}
	if err := json.Unmarshal(raw, &f); err != nil {
		t.Fatal(err)
	}
	for _, v := range f.Vectors {
		if v.Message == "" {
			continue // large: frozen by its checksum
		}
		if got, err := runReader(t, script, unhex(t, v.Message), unhex(t, f.DataKey)); err != nil || !bytes.Equal(got, counting(v.PlaintextLength)) {
			t.Errorf("%s: the script gave %d bytes, %v", v.Name, len(got), err)
		}
	}
	dataKey, plaintext := random(envelope.DataKeySize), random(3*envelope.StreamFrameLength)
	message := stream(t, dataKey, []envelope.EDK{ourEDK(t)}, map[string]string{"tenant": "acme"}, plaintext)
	if got, err := runReader(t, script, message, dataKey); err != nil || !bytes.Equal(got, plaintext) {
		t.Errorf("stream of 3 frames: the script gave %d bytes, %v", len(got), err)
	}
	if got, err := runReader(t, script, message, random(envelope.DataKeySize)); err == nil || len(got) > 0 {
		t.Errorf("foreign data key: the script gave %d bytes, %v; want an error", len(got), err)
	}
	message[len(message)/2] ^= 1
	if got, err := runReader(t, script, message, dataKey); err == nil || len(got) > 0 {
		t.Errorf("changed message: the script gave %d bytes, %v; want an error", len(got), err)
	}
}

// documentedScript saves the script of docs/format.md and returns its path.
func documentedScript(t *testing.T) string {
	t.Helper()
	page, err := os.ReadFile("../../docs/format.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(page), "```js\n")
	script, _, closed := strings.Cut(rest, "```\n")
	if !found || !closed {
		t.Fatal("docs/format.md has no script any more")
	}
	path := filepath.Join(t.TempDir(), "open.mjs")
	if err := os.WriteFile(path, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func runReader(t *testing.T, script string, message, dataKey []byte) ([]byte, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "message")
	if err := os.WriteFile(path, message, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "node", script, path, hex.EncodeToString(dataKey)).Output()
	if errors.Is(err, exec.ErrNotFound) {
		t.Fatalf("%v; %s", err, cure)
	}
	return out, err
}

// counting is the plaintext of the vectors: 32-bit numbers from 0.
func counting(n int) []byte {
	var b []byte
	for i := range uint32(n/4 + 1) {
		b = binary.BigEndian.AppendUint32(b, i)
	}
	return b[:n]
}

// TestDocumentedExample: the example of docs/format.md is the first vector.
func TestDocumentedExample(t *testing.T) {
	page, err := os.ReadFile("../../docs/format.md")
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(vectorDir + "vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var f struct{ Vectors []struct{ Message string } }
	if err := json.Unmarshal(raw, &f); err != nil {
		t.Fatal(err)
	}
	dump := block(t, string(page), "\n## Example\n")
	rest, gap := f.Vectors[0].Message, false
	for _, word := range hexWords(dump, 42) {
		if word == "..." {
			gap = true
			continue
		}
		i := strings.Index(rest, word)
		if i != 0 && (i < 0 || !gap) {
			t.Fatalf("%s of the example is not in the message before its last %d bytes", word, len(rest)/2)
		}
		rest, gap = rest[i+len(word):], false
	}
	if rest != "" {
		t.Errorf("the example lacks the last %d bytes", len(rest)/2)
	}
}

// block returns the first indented text of a page's section.
func block(t *testing.T, page, section string) string {
	t.Helper()
	_, rest, found := strings.Cut(page, section)
	_, rest, opened := strings.Cut(rest, "```\n")
	text, _, closed := strings.Cut(rest, "```\n")
	if !found || !opened || !closed {
		t.Fatalf("docs/format.md has no example under %q any more", section)
	}
	return text
}

// TestDocumentedBinding: the binding that docs/format.md spells out is the one
// that backends get.
func TestDocumentedBinding(t *testing.T) {
	page, err := os.ReadFile("../../docs/format.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := unhex(t, strings.Join(hexWords(block(t, string(page), "\n### What the wrapping key binds\n"), 62), ""))
	raw, err := os.ReadFile(vectorDir + "vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var f struct {
		EDKs []struct{ ProviderInfo string }
	}
	if err := json.Unmarshal(raw, &f); err != nil {
		t.Fatal(err)
	}
	binding := plugins.Binding{Purpose: "message", ProviderInfo: unhex(t, f.EDKs[0].ProviderInfo)}
	if got := binding.AAD(); !bytes.Equal(got, documented) {
		t.Errorf("AAD gives %x, docs/format.md has %x", got, documented)
	}
	// And by the words of the page, with a context that is bound.
	field := func(s string) []byte { return append(binary.BigEndian.AppendUint64(nil, uint64(len(s))), s...) }
	binding.ContextBound, binding.Context = true, map[string]string{"tenant": "acme", "table": "orders", "größe": "µ"}
	want := slices.Concat(documented[:len(documented)-1], []byte{1}, binary.BigEndian.AppendUint64(nil, 3),
		field("größe"), field("µ"), field("table"), field("orders"), field("tenant"), field("acme"))
	if got := binding.AAD(); !bytes.Equal(got, want) {
		t.Errorf("with context AAD gives %x, docs/format.md says %x", got, want)
	}
}

// hexWords returns the bytes of a dump: of each line what stands before its
// explanation, which begins behind the given width, and "..." for bytes left
// out.
func hexWords(dump string, width int) []string {
	var words []string
	for line := range strings.Lines(dump) {
		line = line[:min(len(line), width)]
		for _, word := range strings.Fields(line) {
			if _, err := hex.DecodeString(word); err == nil || word == "..." {
				words = append(words, word)
			}
		}
	}
	return words
}
