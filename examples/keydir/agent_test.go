package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// rest is a configuration around the one of the README.
const rest = `version: 1
trust_domain: example.org
state_dir: state
runtime_dir: run
listen: { native: { socket: kms.sock, mode: "0600" } }
admin: { socket: admin.sock }
identity: { static_peers: [{ uid: %d, id: spiffe://example.org/orders }] }
policy: [{ name: orders, callers: [spiffe://example.org/orders], keys: [orders], operations: [encrypt, decrypt] }]
audit: { file: audit.log, initial_key: initial.key }
%s`

// The configuration of the README, in a real agent: a message is made and opened
// under a key that is a file.
func TestInAnAgent(t *testing.T) {
	dir, err := os.MkdirTemp("", "kd") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	agent, plugin := filepath.Join(dir, "kms-agent"), filepath.Join(dir, "keydir")
	for binary, source := range map[string]string{agent: "../../cmd/kms-agent", plugin: "."} {
		if out, err := exec.Command("go", "build", "-o", binary, source).CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", source, err, out)
		}
	}
	config := filepath.Join(dir, "config.yaml")
	text := fmt.Sprintf(rest, os.Getuid(), documented(t, plugin, keys(t, "orders/1")))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	run := exec.Command(agent, "run", "--config", config)
	run.Stdout, run.Stderr = &log, &log
	if err := run.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(run.Process.Signal(syscall.SIGTERM), run.Wait()); err != nil || t.Failed() {
			t.Errorf("the agent ended with %v:\n%s", err, log.String())
		}
	})
	message := command(t, agent, dir, "a secret", "encrypt", "--key", "orders")
	if got := command(t, agent, dir, message, "decrypt"); got != "a secret" || strings.Contains(message, got) {
		t.Errorf("got %q", got)
	}
}

// documented is the configuration of the README for these files.
func documented(t *testing.T, plugin, keys string) string {
	t.Helper()
	page, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(page), "```yaml\n")
	text, _, found := strings.Cut(text, "```")
	binary, err := os.ReadFile(plugin)
	if err != nil || !found {
		t.Fatal("README.md has no configuration", err)
	}
	return strings.NewReplacer(
		"/usr/lib/kms-agent/plugins/keydir", plugin, "/etc/kms-agent/keys", keys,
		"what sha256sum printed", fmt.Sprintf("%x", sha256.Sum256(binary)),
	).Replace(text)
}

// command runs a command of the agent's program, until the agent serves.
func command(t *testing.T, agent, dir, in string, args ...string) string {
	t.Helper()
	const unavailable = 4
	for range 300 {
		c := exec.Command(agent, append(args, "--identity", "peer", "--socket", filepath.Join(dir, "kms.sock"))...)
		c.Stdin = strings.NewReader(in)
		var fault bytes.Buffer
		c.Stderr = &fault
		out, err := c.Output()
		if err == nil {
			return string(out)
		}
		if c.ProcessState.ExitCode() != unavailable {
			t.Fatalf("kms-agent %v: %v\n%s", args, err, fault.String())
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatalf("kms-agent %v: the agent does not serve", args)
	return ""
}
