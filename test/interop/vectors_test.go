package interop_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"testing"
)

const vectorDir = "../../envelope/testdata/"

// TestVectorsAreTheirs: the frozen vectors of package envelope, among them
// messages without frames, which no implementation writes any more, open with
// an implementation that is not ours.
func TestVectorsAreTheirs(t *testing.T) {
	p := startPeer(t)
	raw, err := os.ReadFile(vectorDir + "vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var f struct {
		Wrapping struct{ Namespace, Name, Key string }
		Vectors  []struct {
			Name, Message   string
			PlaintextLength int
			Context         map[string]string
		}
	}
	if err := json.Unmarshal(raw, &f); err != nil {
		t.Fatal(err)
	}
	key := rawAESKey{Namespace: f.Wrapping.Namespace, Name: f.Wrapping.Name, Key: unhex(t, f.Wrapping.Key)}
	opened := 0
	for _, v := range f.Vectors {
		if v.Message == "" {
			continue // large: frozen by its checksum
		}
		opened++
		theyOpen(t, p, v.Name, key, unhex(t, v.Message), v.Context, counting(v.PlaintextLength))
	}
	if opened < 11 {
		t.Errorf("only %d vectors", opened)
	}
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestVectorsAreFrozen: the script that made them, which knows the format from
// docs/format.md alone, still makes the same.
func TestVectorsAreFrozen(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "node", vectorDir+"vectors.mjs").Output()
	if err != nil {
		t.Fatalf("node vectors.mjs: %v; %s", err, cure)
	}
	want, err := os.ReadFile(vectorDir + "vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out, want) {
		t.Error("vectors.mjs makes other vectors than vectors.json holds")
	}
}
