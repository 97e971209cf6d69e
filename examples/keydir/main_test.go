package main

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

// The test binary is its own plugin.
func TestMain(m *testing.M) {
	plugintest.ServeIfChild(map[string]func() plugins.Backend{"keydir": func() plugins.Backend { return &backend{} }})
	os.Exit(m.Run())
}

// keys makes a directory of keys, as in "orders/1".
func keys(t *testing.T, paths ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, path := range paths {
		secret := make([]byte, 32)
		_, _ = rand.Read(secret)
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, secret, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func settings(t *testing.T, dir string) json.RawMessage {
	t.Helper()
	text, err := json.Marshal(map[string]string{"directory": dir})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// instance is what the suite needs to know.
func instance(b plugins.Backend) plugintest.Instance {
	return plugintest.Instance{
		Backend: b,
		Key:     plugins.KeyRef{URI: "keydir:orders", Version: "2"},
		Other:   plugins.KeyRef{URI: "keydir:archive", Version: "1"},
		Missing: "keydir:missing",
	}
}

func opened(t *testing.T, dir string) *backend {
	t.Helper()
	b := &backend{}
	t.Cleanup(func() { _ = b.Close() })
	if _, err := b.Open(t.Context(), settings(t, dir)); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestConformance(t *testing.T) {
	plugintest.Run(t, func(t *testing.T) plugintest.Instance {
		return instance(opened(t, keys(t, "orders/1", "orders/2", "archive/1")))
	})
}

// As the agent runs it: a process of its own, confined to the directory.
func TestConformanceOverTheWire(t *testing.T) {
	plugintest.Run(t, func(t *testing.T) plugintest.Instance {
		dir := keys(t, "orders/1", "orders/2", "archive/1")
		cfg := plugintest.Config(t, "keydir", settings(t, dir))
		cfg.Access.Read = []string{dir}
		return instance(plugintest.Start(t, cfg))
	})
}

// What this backend adds to the contract: a new file is a rotation, one that is
// taken away a revocation, and no name leads out of the directory.
func TestFiles(t *testing.T) {
	dir := keys(t, "orders/1", "orders/notes", "orders/03", "short/1", "empty/x")
	if err := os.WriteFile(filepath.Join(dir, "short", "1"), []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	b := opened(t, dir)
	first := plugins.KeyRef{URI: "keydir:orders", Version: "1"}
	wrapped, err := b.Wrap(t.Context(), first, []byte("material"), plugins.Binding{Purpose: "message"})
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(wrapped, []byte("material")) {
		t.Fatal("the ciphertext is clear")
	}
	if err := os.Link(filepath.Join(dir, "orders", "03"), filepath.Join(dir, "orders", "2")); err != nil {
		t.Fatal(err)
	}
	d, err := b.Describe(t.Context(), "keydir:orders")
	if err != nil || d.Current != "2" || len(d.Versions) != 2 {
		t.Errorf("after a rotation: %+v, %v", d, err)
	}
	if err := os.Remove(filepath.Join(dir, "orders", "1")); err != nil {
		t.Fatal(err)
	}
	_, err = b.Unwrap(t.Context(), first, wrapped, plugins.Binding{Purpose: "message"})
	wantClass(t, "a version taken away", err, plugins.KeyNotFound)
	_, err = b.Wrap(t.Context(), plugins.KeyRef{URI: "keydir:short", Version: "1"}, []byte("x"), plugins.Binding{})
	wantClass(t, "a short key", err, plugins.KeyUnusable)
	for _, uri := range []string{"keydir:empty", "keydir:", "keydir:.", "keydir:..", "keydir:../orders", "keydir:orders/..", "other:orders"} {
		_, err := b.Describe(t.Context(), uri)
		wantClass(t, uri, err, plugins.KeyNotFound)
	}
	for _, version := range []string{"", "0", "-1", "03", "notes", "../orders/2"} {
		_, err := b.Wrap(t.Context(), plugins.KeyRef{URI: "keydir:orders", Version: version}, []byte("x"), plugins.Binding{})
		wantClass(t, "version "+version, err, plugins.KeyNotFound)
	}
}

func wantClass(t *testing.T, what string, err error, want plugins.Class) {
	t.Helper()
	if got := plugins.ClassOf(err); got != want {
		t.Errorf("%s: got %s (%v), want %s", what, got, err, want)
	}
}

func TestSettings(t *testing.T) {
	for text, want := range map[string]plugins.Class{
		`{}`: plugins.Invalid, `[]`: plugins.Invalid, `{"directory": "/does/not/exist"}`: plugins.Unavailable,
	} {
		b := &backend{}
		_, err := b.Open(t.Context(), json.RawMessage(text))
		wantClass(t, text, err, want)
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
}

// It stays as short as its README says.
func TestLength(t *testing.T) {
	source, err := os.ReadFile("main.go")
	if err != nil {
		t.Fatal(err)
	}
	if lines := bytes.Count(source, []byte("\n")); lines >= 150 {
		t.Errorf("main.go has %d lines, want less than 150", lines)
	}
}
