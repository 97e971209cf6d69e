package plugintest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
)

// childVariable names the backend that a test binary serves as a plugin.
const childVariable = "KMS_AGENT_PLUGINTEST_SERVE"

// startTimeout is how long a test waits for its plugin.
const startTimeout = 30 * time.Second

// ServeIfChild makes the test binary its own plugin: called first in TestMain,
// it serves one of the backends and never returns where OverTheWire started
// the process, and does nothing else.
func ServeIfChild(backends map[string]func() plugins.Backend) {
	name := os.Getenv(childVariable)
	if name == "" {
		return
	}
	newBackend, ok := backends[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "this test binary serves no backend %q\n", name)
		os.Exit(2)
	}
	if err := plugins.Serve(newBackend()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// OverTheWire returns the named backend of ServeIfChild, opened with settings
// in a process of its own, which is confined as the agent confines it: beyond
// the system's libraries it reaches the files and directories of write only. The
// process ends with the test.
func OverTheWire(t testing.TB, name string, settings json.RawMessage, write ...string) *host.Supervisor {
	t.Helper()
	cfg := Config(t, name, settings)
	cfg.Access.Write = write
	return Start(t, cfg)
}

// Config is how OverTheWire runs a plugin.
func Config(t testing.TB, name string, settings json.RawMessage) host.Config {
	t.Helper()
	// t.TempDir is too long for sockets where tests have long names.
	dir, err := os.MkdirTemp("", "kms")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return host.Config{
		Name: name, Self: true, Env: []string{childVariable + "=" + name, "GODEBUG=" + os.Getenv("GODEBUG")},
		Settings: settings, RuntimeDir: dir, Logger: zaptest.NewLogger(t),
	}
}

// Start runs a plugin until the test ends and waits until it is up.
func Start(t testing.TB, cfg host.Config) *host.Supervisor {
	t.Helper()
	s, err := host.New(cfg)
	if err != nil {
		t.Fatalf("host.New: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: got %v, want the end of its context", err)
		}
	})
	ready, stop := context.WithTimeout(context.Background(), startTimeout)
	defer stop()
	if err := s.Ready(ready); err != nil {
		t.Fatalf("Ready: %v", err)
	}
	return s
}
