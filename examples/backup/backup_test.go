// Package backup_test runs the script of this folder against a real agent.
package backup_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// host is a directory with an agent, and with the environment of a shell there.
type host struct {
	dir string
	env []string
}

func newHost(t *testing.T) *host {
	t.Helper()
	dir, err := os.MkdirTemp("", "bak") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	h := &host{dir: dir, env: append(os.Environ(),
		"PATH="+filepath.Join(dir, "bin")+":"+os.Getenv("PATH"), "BACKUP_KEY=orders", "BACKUP_NAME=web-1",
		"KMS_AGENT_SOCKET="+filepath.Join(dir, "dev", "kms.sock"),
		"SPIFFE_ENDPOINT_SOCKET=unix://"+filepath.Join(dir, "dev", "workload-api", "orders.sock"))}
	agent := filepath.Join(dir, "bin", "kms-agent")
	if out, err := exec.Command("go", "build", "-o", agent, "../../cmd/kms-agent").CombinedOutput(); err != nil {
		t.Fatalf("build the agent: %v\n%s", err, out)
	}
	var log bytes.Buffer
	dev := exec.Command(agent, "dev", "--dir", filepath.Join(dir, "dev"))
	dev.Stdout, dev.Stderr = &log, &log
	if err := dev.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(dev.Process.Signal(syscall.SIGTERM), dev.Wait()); err != nil {
			t.Errorf("the agent ended with %v:\n%s", err, log.String())
		}
	})
	for range 600 {
		if _, err := os.Stat(filepath.Join(dir, "dev", "ready")); err == nil {
			return h
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal("the agent is not ready after 30 s")
	return nil
}

func (h *host) path(name string) string { return filepath.Join(h.dir, name) }

// backup runs the script, with additions to its environment.
func (h *host) backup(args []string, env ...string) (string, error) {
	c := exec.Command("./backup", args...)
	c.Env = slices.Concat(h.env, env)
	out, err := c.CombinedOutput()
	return string(out), err
}

func (h *host) write(t *testing.T, name string, data []byte, mode os.FileMode) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(h.path(name)), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.path(name), data, mode); err != nil {
		t.Fatal(err)
	}
	return h.path(name)
}

// wantFailure demands that the script fails, says so, and leaves nothing.
func (h *host) wantFailure(t *testing.T, result, text string, args []string, env ...string) {
	t.Helper()
	out, err := h.backup(args, env...)
	if err == nil || !strings.Contains(out, text) {
		t.Errorf("backup %v: %v, want a failure that says %q; it said:\n%s", args, err, text, out)
	}
	left, err := filepath.Glob(h.path(result) + "*")
	if err != nil || len(left) > 0 {
		t.Errorf("backup %v left %v (%v)", args, left, err)
	}
}

func TestBackup(t *testing.T) {
	h := newHost(t)
	big := make([]byte, 3<<20)
	_, _ = rand.Read(big)
	h.write(t, "site/index.html", []byte("<h1>a secret page</h1>"), 0o644)
	h.write(t, "site/data/big", big, 0o600)
	site, file := h.path("site"), h.path("site.kms")
	if out, err := h.backup([]string{"save", site, file}); err != nil {
		t.Fatalf("save: %v\n%s", err, out)
	}
	message, err := os.ReadFile(file)
	if err != nil || bytes.Contains(message, []byte("a secret page")) || !bytes.Contains(message, []byte("web-1")) {
		t.Fatalf("the file: %v; want the context readable and the pages not", err)
	}
	if out, err := h.backup([]string{"restore", file, h.path("restored")}); err != nil {
		t.Fatalf("restore: %v\n%s", err, out)
	}
	if out, err := exec.Command("diff", "--recursive", site, h.path("restored")).CombinedOutput(); err != nil {
		t.Errorf("the restored directory differs: %v\n%s", err, out)
	}

	t.Run("tar dies on the way", func(t *testing.T) {
		h.write(t, "broken/tar", []byte("#!/bin/sh\nhead -c 1000000 /dev/zero\necho tar: disk on fire >&2\nexit 2\n"), 0o700)
		h.wantFailure(t, "never.kms", "disk on fire", []string{"save", site, h.path("never.kms")}, "PATH="+h.path("broken")+":"+h.path("bin")+":"+os.Getenv("PATH"))
	})
	t.Run("no agent", func(t *testing.T) {
		h.wantFailure(t, "never.kms", "cannot reach the agent", []string{"save", site, h.path("never.kms")}, "KMS_AGENT_SOCKET="+h.path("nowhere"), "SPIFFE_ENDPOINT_SOCKET=")
	})
	t.Run("not allowed", func(t *testing.T) {
		h.wantFailure(t, "never.kms", "ACCESS_DENIED", []string{"save", site, h.path("never.kms")}, "BACKUP_KEY=payroll")
	})
	t.Run("cut", func(t *testing.T) {
		for _, n := range []int{len(message) - 1, len(message) / 2, 100, 0} {
			cut := h.write(t, fmt.Sprintf("cut-%d.kms", n), message[:n], 0o600)
			h.wantFailure(t, "never", "kms-agent: decrypt: ", []string{"restore", cut, h.path("never")})
		}
	})
	t.Run("changed", func(t *testing.T) {
		changed := bytes.Clone(message)
		changed[len(changed)/2] ^= 1
		h.wantFailure(t, "never", "DECRYPT_FAILED", []string{"restore", h.write(t, "changed.kms", changed, 0o600), h.path("never")})
	})
	t.Run("of another host", func(t *testing.T) {
		h.wantFailure(t, "never", "DECRYPT_FAILED", []string{"restore", file, h.path("never")}, "BACKUP_NAME=web-2")
	})
	t.Run("over what is there", func(t *testing.T) {
		if out, err := h.backup([]string{"restore", file, site}); err == nil || !strings.Contains(out, "exists") {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("usage", func(t *testing.T) {
		if out, err := h.backup([]string{"help"}); err == nil || !strings.Contains(out, "backup save DIRECTORY FILE") {
			t.Errorf("%v\n%s", err, out)
		}
	})
}
