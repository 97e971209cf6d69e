package local_test

import (
	"io"
	"os"
	"os/exec"
	"testing"

	"github.com/hashicorp/go-hclog"
	plugin "github.com/hashicorp/go-plugin"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/local"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

// instance is a keystore for the conformance suite, served by backend.
func instance(t *testing.T, backend plugins.Backend) plugintest.Instance {
	t.Helper()
	seal := keyFile(t)
	k := newStore(t, seal, "orders", "other")
	if _, err := backend.Open(t.Context(), config(t, k.Path(), seal)); err != nil {
		t.Fatalf("Open: %v", err)
	}
	return plugintest.Instance{
		Backend: backend, Key: orders1, Other: plugins.KeyRef{URI: "local:other", Version: "1"}, Missing: "local:missing",
		Disable: func(t *testing.T) {
			t.Helper()
			must(t, k.Disable("orders", "1"))
		},
	}
}

func TestConformance(t *testing.T) {
	plugintest.Run(t, func(t *testing.T) plugintest.Instance {
		b := local.New()
		t.Cleanup(func() { _ = b.Close() })
		return instance(t, b)
	})
}

func TestConformanceOverTheWire(t *testing.T) {
	plugintest.Run(t, func(t *testing.T) plugintest.Instance { return instance(t, process(t)) })
}

// process is this test binary as a plugin.
func process(t *testing.T) plugins.Backend {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{childVariable + "=plugin"}
	client := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig: plugins.Handshake(), VersionedPlugins: plugins.Sets(nil), Cmd: cmd, SkipHostEnv: true,
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC}, AutoMTLS: true, Logger: hclog.New(&hclog.LoggerOptions{Output: io.Discard}),
	})
	t.Cleanup(client.Kill)
	protocol, err := client.Client()
	must(t, err)
	service, err := protocol.Dispense(plugins.PluginName)
	must(t, err)
	backend, ok := service.(plugins.Backend)
	if !ok {
		t.Fatalf("the plugin serves a %T", service)
	}
	return backend
}

// The cures reach the agent, and so does what an administrator changes.
func TestOverTheWire(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal, "orders")
	_, err := process(t).Open(t.Context(), config(t, k.Path()+".missing", seal))
	wantClass(t, "no keystore", err, plugins.Unavailable, k.Path()+".missing", "create it")
	b := process(t)
	_, err = b.Open(t.Context(), config(t, k.Path(), seal))
	must(t, err)
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
