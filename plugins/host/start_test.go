package host_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

// Each of these is started again and again, serves no call, says why, and
// leaves nothing behind.
func TestStartsThatFail(t *testing.T) {
	for _, c := range []struct{ mode, want string }{
		{"exit-0", "exit status 0"},
		{"exit-3", "exit status 3"},
		{"crash-at-once", "exit status 2"},
		{"silent", "not ready within 300ms"},
		{"ignores-term", "not ready within 300ms"},
		{"half-handshake", "not ready within 300ms"},
		{"rubbish", "Unrecognized remote plugin message: rubbish �[31m on stdout"},
		{"long-rubbish", "Unrecognized remote plugin message"},
		{"other-core", "core"},
		{"other-protocol", "99"},
		{"net-rpc", "netrpc"},
		{"tcp", "not in the directory"},
		{"other-socket", "not in the directory"},
		{"no-socket", "Unavailable"},
	} {
		t.Run(c.mode, func(t *testing.T) {
			cfg := modeConfig(t, c.mode)
			cfg.StartTimeout = 300 * time.Millisecond
			if strings.Contains(c.want, "exit") || c.mode == "no-socket" {
				cfg.StartTimeout = 10 * time.Second // loaded machines are slow
			}
			wantFailedStart(t, cfg, c.want)
		})
	}
}

func TestOpensThatFail(t *testing.T) {
	for _, c := range []struct{ order, want string }{
		{"hang", "not ready within 2s"},
		{"wait", "deadline exceeded"},
		{"exit", "exit status 7"},
		{"panic", "panicked in Open"},
		{"Invalid", "Invalid: as ordered"},
		{"Denied", "Denied: as ordered"},
		{"Unavailable", "Unavailable: as ordered"},
	} {
		t.Run(c.order, func(t *testing.T) {
			cfg := config(t, puppetSettings{Open: c.order})
			cfg.StartTimeout = 2 * time.Second
			wantFailedStart(t, cfg, c.want)
		})
	}
}

func wantFailedStart(t *testing.T, cfg host.Config, want string) {
	t.Helper()
	s, end := start(t, cfg)
	eventually(t, "two starts and their error", func() bool {
		status := s.Status()
		return status.Restarts >= 2 && strings.Contains(status.LastError, want) || status.Restarts > 4
	})
	if status := s.Status(); !strings.Contains(status.LastError, want) || len(status.LastError) > 2000 {
		t.Errorf("last error: got %q, want it bounded and with %q", status.LastError, want)
	}
	_, err := s.Describe(bounded(t), "memory:orders")
	if plugins.ClassOf(err) != plugins.Unavailable || !strings.Contains(err.Error(), want) {
		t.Errorf("Describe: got %v, want Unavailable with the last error", err)
	}
	ready, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := s.Ready(ready); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Ready: got %v, want the last error", err)
	}
	_ = end()
	nothingLeft(t, cfg)
}

// program copies the test binary, so that it can be checked and changed.
func program(t *testing.T) (path, sum string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "plugin")
	if err := os.WriteFile(path, b, 0o700); err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(b)
	return path, hex.EncodeToString(digest[:])
}

func TestProgramIsExecutedFromWhatWasChecked(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.Self = false
	cfg.Command, cfg.SHA256 = program(t)
	cfg.Args = []string{"an argument"}
	s := plugintest.Start(t, cfg)
	// The program on disk may change now: nothing of it is executed.
	if err := os.Remove(cfg.Command); err != nil {
		t.Fatal(err)
	}
	if exe, err := order(t, s, "proc exe"); err != nil || !strings.HasPrefix(exe, "/memfd:plugin") {
		t.Errorf("executable: got %q and %v, want a sealed copy in memory", exe, err)
	}
	if cmdline, err := order(t, s, "proc cmdline "+cfg.Command); err != nil || cmdline != "found: "+cfg.Command+"\x00an argument\x00" {
		t.Errorf("command line: got %q and %v, want the command and its argument", cmdline, err)
	}
	if got := s.Status().SHA256; got != cfg.SHA256 {
		t.Errorf("status: got SHA-256 %q, want %q", got, cfg.SHA256)
	}
}

func TestProgramsThatAreNotExecuted(t *testing.T) {
	path, sum := program(t)
	script := filepath.Join(t.TempDir(), "script")
	text := []byte("#!/bin/sh\nexit 0\n")
	if err := os.WriteFile(script, text, 0o700); err != nil {
		t.Fatal(err)
	}
	scriptSum := sha256.Sum256(text)
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, text, 0o600); err != nil {
		t.Fatal(err)
	}
	other := strings.Repeat("0", 64)
	for _, c := range []struct{ name, path, sum, want string }{
		{"another digest", path, other, "the SHA-256 of " + path + " is " + sum + ", the configuration says " + other},
		{"a script", script, hex.EncodeToString(scriptSum[:]), "not a native program"},
		{"not executable", plain, hex.EncodeToString(scriptSum[:]), "not an executable file"},
		{"a directory", filepath.Dir(plain), other, "not an executable file"},
		{"nothing", plain + "-missing", other, "no such file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := config(t, puppetSettings{})
			cfg.Self, cfg.Command, cfg.SHA256 = false, c.path, c.sum
			wantFailedStart(t, cfg, c.want)
		})
	}
}

// Whoever waits for a program that will not be executed need not wait for long, and
// a program that is put right is started all the same.
func TestUnfitProgramsAreToldAtOnce(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.Self = false
	path, sum := program(t)
	cfg.Command, cfg.SHA256 = path+".link", sum
	if err := os.WriteFile(cfg.Command, []byte("something else"), 0o700); err != nil {
		t.Fatal(err)
	}
	s, _ := start(t, cfg)
	patient, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	if err := s.Ready(patient); err == nil || !strings.Contains(err.Error(), "the configuration says "+sum) {
		t.Errorf("Ready: got %v, want that it is another program", err)
	}
	if err := os.Rename(path, cfg.Command); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the right program", func() bool { return s.Ready(patient) == nil })
}

func TestPluginsHaveOnlyTheirOwnEnvironment(t *testing.T) {
	t.Setenv("KMS_AGENT_TEST_SECRET", "of the host")
	cfg := config(t, puppetSettings{})
	cfg.Env = append(cfg.Env, "CONFIGURED=yes")
	s := plugintest.Start(t, cfg)
	env, err := order(t, s, "env CONFIGURED=|KMS_AGENT_TEST_|PATH=|HOME=|PLUGIN_UNIX_SOCKET_DIR=")
	want := "found: CONFIGURED=yes PLUGIN_UNIX_SOCKET_DIR=" + cfg.RuntimeDir + "/plugin-"
	if err != nil || !strings.HasPrefix(env, want) || strings.Count(env, "=") != 2 {
		t.Errorf("environment: got %q and %v, want what is configured, and sockets in a directory of its own", env, err)
	}
}

func TestPluginsAreHardened(t *testing.T) {
	s := plugintest.Start(t, config(t, puppetSettings{}))
	for what, want := range map[string]string{
		"proc status NoNewPrivs:|Umask:": "found: Umask: 0077 NoNewPrivs: 1",
		"proc limits Max core":           "found: Max core file size 0 0 bytes",
		"proc fd/0":                      "/dev/null",
		"proc cwd":                       "/",
	} {
		if got, err := order(t, s, what); err != nil || got != want {
			t.Errorf("%s: got %q and %v, want %q", what, got, err, want)
		}
	}
	// Whose process is not dumpable, its files in /proc belong to root, for whom
	// else it runs; what it may be asked itself is this.
	if dumpable, err := order(t, s, "dumpable"); err != nil || dumpable != "0" {
		t.Errorf("dumpable: got %q and %v, want 0", dumpable, err)
	}
}

func TestNewRefusesFaultyConfigurations(t *testing.T) {
	good := host.Config{Name: "n", Self: true, RuntimeDir: "/run/kms-agent"}
	if _, err := host.New(good); err != nil {
		t.Fatalf("a good configuration: %v", err)
	}
	for want, change := range map[string]func(*host.Config){
		"no name":                func(c *host.Config) { c.Name = "" },
		"neither a command nor":  func(c *host.Config) { c.Command = "/bin/true" },
		"not an absolute path":   func(c *host.Config) { c.Self, c.Command = false, "relative" },
		"64 hexadecimal digits":  func(c *host.Config) { c.Self, c.Command = false, "/bin/true" },
		"which sockets need":     func(c *host.Config) { c.RuntimeDir = "/" + strings.Repeat("d", 70) },
		"is no range":            func(c *host.Config) { c.BackoffMin, c.BackoffMax = time.Minute, time.Second },
		"must be positive":       func(c *host.Config) { c.CallTimeout = -1 },
		"the settings are":       func(c *host.Config) { c.Settings = make(json.RawMessage, 1<<20) },
		"the runtime directory ": func(c *host.Config) { c.RuntimeDir = "" },
	} {
		cfg := good
		change(&cfg)
		if _, err := host.New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want an error with %q", err, want)
		}
	}
}

// The longest runtime directory that is allowed has room for sockets.
func TestLongRuntimeDirectories(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.RuntimeDir += "/" + strings.Repeat("d", 70-len(cfg.RuntimeDir)-1)
	s := plugintest.Start(t, cfg)
	if _, err := s.Describe(bounded(t), "memory:orders"); err != nil {
		t.Errorf("Describe: %v", err)
	}
}
