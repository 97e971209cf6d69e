package local_test

import (
	"encoding/json"
	"os"
	"testing"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/local"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

// conform runs the conformance suite on keystores of its own, served by what
// open returns.
func conform(t *testing.T, open func(t *testing.T, settings json.RawMessage) plugins.Backend) {
	t.Helper()
	plugintest.Run(t, func(t *testing.T) plugintest.Instance {
		seal := keyFile(t)
		k := newStore(t, seal, "orders", "other")
		_, err := k.Rotate("orders")
		must(t, err)
		return plugintest.Instance{
			Backend: open(t, config(t, k.Path(), seal)),
			Key:     orders1, Other: plugins.KeyRef{URI: "local:other", Version: "1"}, Missing: "local:missing",
			Disable: func(t *testing.T) {
				t.Helper()
				must(t, k.Disable("orders", "1"))
			},
		}
	})
}

func TestConformance(t *testing.T) {
	conform(t, func(t *testing.T, settings json.RawMessage) plugins.Backend {
		b := local.New()
		t.Cleanup(func() { _ = b.Close() })
		if _, err := b.Open(t.Context(), settings); err != nil {
			t.Fatalf("Open: %v", err)
		}
		return b
	})
}

func TestConformanceOverTheWire(t *testing.T) {
	conform(t, overTheWire)
}

// overTheWire runs the backend in a process that reaches what it says it reads.
func overTheWire(t *testing.T, settings json.RawMessage) plugins.Backend {
	cfg := plugintest.Config(t, "local", settings)
	cfg.Access.Read = local.Paths(settings)
	return plugintest.Start(t, cfg)
}

// The cures reach the agent, and so does what an administrator changes.
func TestOverTheWire(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal, "orders")
	b := overTheWire(t, config(t, k.Path(), seal))
	wrapped, err := b.Wrap(t.Context(), orders1, dataKey, binding)
	must(t, err)
	must(t, k.Disable("orders", "1"))
	_, err = b.Unwrap(t.Context(), orders1, wrapped, binding)
	wantClass(t, "disabled", err, plugins.KeyUnusable, "enable it")
	must(t, k.Enable("orders", "1"))
	plain, err := b.Unwrap(t.Context(), orders1, wrapped, binding)
	must(t, err)
	if string(plain) != string(dataKey) {
		t.Errorf("unwrapped %q, want %q", plain, dataKey)
	}
	must(t, os.Chmod(k.Path(), 0o644))
	_, err = b.Unwrap(t.Context(), orders1, wrapped, binding)
	wantClass(t, "keystore open to all", err, plugins.Unavailable, "chmod 600")
}
