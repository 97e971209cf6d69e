package hsm_test

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// inFile keeps the catalogue in a file.
func inFile(r *rig, c *hsm.Config) {
	c.Catalogue = &hsm.CatalogueFile{Path: r.path("catalogue"), KeyFile: r.path("catalogue.key")}
}

func TestCatalogueInFile(t *testing.T) {
	r := newRig(t, inFile)
	if _, err := r.Key(bounded(t), "orders"); hsm.KindOf(err) != hsm.Unavailable || !strings.Contains(err.Error(), "there is no catalogue") {
		t.Errorf("without a file: %v", err)
	}
	want := material(32)
	first := r.key("orders", hsm.GCM)
	r.key("letters", hsm.CBCHMAC)
	wrapped := r.wrap(first, want)
	k, err := r.Rotate(bounded(t), "orders", 0)
	if err != nil || k.Current != 2 || len(k.Versions) != 2 {
		t.Fatalf("Rotate: %+v, %v", k, err)
	}
	r.opens(first, wrapped, want)
	if keys, err := r.Keys(bounded(t)); err != nil || len(keys) != 2 || keys[0].Name != "letters" || keys[1].Current != 2 {
		t.Errorf("Keys: %v, %v", keys, err)
	}
	if _, err := r.CreateKey(bounded(t), "orders", 0); hsm.KindOf(err) != hsm.Invalid {
		t.Errorf("a key of the same name: %v", err)
	}
	out, err := exec.CommandContext(t.Context(), "pkcs11-tool", "--module", softHSM, "--token-label", hsmtest.Label, "--login", "--pin", userPIN,
		"--list-objects", "--type", "data").CombinedOutput()
	if err != nil || strings.Contains(string(out), "kmsagent/") {
		t.Errorf("there is a catalogue on the token too: %v\n%s", err, out)
	}
	for _, name := range []string{"catalogue", "catalogue.key"} {
		if info, err := os.Stat(r.path(name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
}

// Only who has the key changes what the catalogue says, and what cannot be used is
// neither an empty catalogue nor a key that is gone.
func TestCatalogueIsAuthenticated(t *testing.T) {
	r := newRig(t, inFile)
	r.key("orders", hsm.GCM)
	good, err := os.ReadFile(r.path("catalogue"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(r.path("catalogue.key"))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]struct {
		catalogue, key []byte
		says           string
	}{
		"changed":         {bytes.Replace(good, []byte("enabled"), []byte("disabled"), 1), key, "its MAC is wrong"},
		"cut off":         {good[:len(good)-1], key, "its MAC is wrong"},
		"longer":          {append(bytes.Clone(good), '\n'), key, "its MAC is wrong"},
		"empty":           {nil, key, "does not begin as a catalogue"},
		"another format":  {bytes.Replace(good, []byte("catalogue 1"), []byte("catalogue 2"), 1), key, "does not begin as a catalogue"},
		"another key":     {good, material(32), "its MAC is wrong"},
		"a key too short": {good, key[:31], "has not the 32 bytes"},
		"a key too long":  {good, append(bytes.Clone(key), 0), "has not the 32 bytes"},
		"too large":       {append(bytes.Clone(good), make([]byte, 16<<20)...), key, "more than"},
	} {
		r.write("catalogue", string(change.catalogue))
		r.write("catalogue.key", string(change.key))
		_, err := r.Keys(bounded(t))
		if hsm.KindOf(err) != hsm.Unavailable || !strings.Contains(err.Error(), change.says) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := r.CreateKey(bounded(t), "letters", hsm.GCM); err == nil {
			t.Errorf("%s: a key was made", name)
		}
		if now, err := os.ReadFile(r.path("catalogue")); err != nil || !bytes.Equal(now, change.catalogue) {
			t.Errorf("%s: the catalogue was replaced", name)
		}
	}
	r.write("catalogue", string(good))
	r.write("catalogue.key", string(key))
	if err := os.Chmod(r.path("catalogue.key"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Keys(bounded(t)); err == nil || !strings.Contains(err.Error(), "gives others access") {
		t.Errorf("a key that all may read: %v", err)
	}
	if err := os.Remove(r.path("catalogue.key")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.CreateKey(bounded(t), "letters", hsm.GCM); err == nil {
		t.Error("a catalogue whose key is gone began anew")
	}
}

// A key that is in the file and not on the token is looked for in a new connection,
// once: some modules see only what was there at their start.
func TestKeyThatOnlyTheFileHas(t *testing.T) {
	r := newRig(t, inFile)
	v := r.key("orders", hsm.GCM)
	wrapped := r.wrap(v, material(32))
	r.tool("--delete-object", "--type", "secrkey", "--label", "kmsagent/orders/v1")
	for range 3 {
		_ = r.fails(v, wrapped, hsm.KeyNotFound)
	}
	if n := r.attached(); n != 2 {
		t.Errorf("attached %d times, want 2", n)
	}
}

// A catalogue that is missing is none that begins: the next one would tell hosts that the
// keys of the first are gone.
func TestCatalogueThatIsLost(t *testing.T) {
	r := newRig(t, inFile)
	r.key("orders", hsm.GCM)
	if err := os.Rename(r.path("catalogue"), r.path("elsewhere")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.CreateKey(bounded(t), "letters", hsm.GCM); hsm.KindOf(err) != hsm.Invalid || !strings.Contains(err.Error(), "is missing") {
		t.Errorf("CreateKey: %v, want that the catalogue is missing", err)
	}
	if _, err := os.Stat(r.path("catalogue")); err == nil {
		t.Error("there is another catalogue")
	}
	if err := os.Rename(r.path("elsewhere"), r.path("catalogue")); err != nil {
		t.Fatal(err)
	}
	r.key("letters", hsm.GCM)
}
