package kms_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/cache/seal/tpm"
)

// emulator is a TPM in software whose state is in a directory.
type emulator struct {
	t   *testing.T
	dir string
	cmd *exec.Cmd
}

// on turns the TPM on, and returns a sealer of it.
func (e *emulator) on() *tpm.Sealer {
	e.t.Helper()
	socket := filepath.Join(e.dir, "s")
	_ = os.Remove(socket)
	e.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+e.dir, "--server", "type=unixio,path="+socket,
		"--ctrl", "type=unixio,path="+socket+".ctrl", "--flags", "not-need-init,startup-clear")
	if err := e.cmd.Start(); err != nil {
		e.t.Fatalf("start swtpm: %v: install it (scripts/setup-test-deps)", err)
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			_ = conn.Close()
			break
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("swtpm: %v", err)
		}
	}
	s, err := tpm.Open(tpm.Config{Device: socket})
	if err != nil {
		e.t.Fatal(err)
	}
	return s
}

// off is a power failure.
func (e *emulator) off() {
	if e.cmd != nil {
		_ = e.cmd.Process.Kill()
		_ = e.cmd.Wait()
		e.cmd = nil
	}
}

// TestRebootWithTPM: what a TPM seals survives the boot, and the time that the host was
// off counts.
func TestRebootWithTPM(t *testing.T) {
	dir, err := os.MkdirTemp("", "tpm") // a socket's path is 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	e := &emulator{t: t, dir: dir}
	t.Cleanup(func() {
		e.off()
		_ = os.RemoveAll(dir)
	})
	r := newStoreRig(t)
	sealer := e.on()
	r.sealer = sealer
	r.restart()
	message := r.used("orders")
	r.stop()
	sealer.Close()
	e.off()
	r.backend.fail(unreachable())
	r.boot, r.wall = "second", r.wall.Add(30*time.Minute)
	r.clock.Advance(-59 * time.Minute) // the boot clock begins anew
	sealer = e.on()
	defer func() { sealer.Close() }()
	r.sealer = sealer
	if got := r.restart(); got.DataKeys != 2 || got.Age != 30*time.Minute {
		t.Errorf("restored %+v, want two data keys from half an hour ago", got)
	}
	if _, source, err := r.encrypt("orders"); err != nil || source != cache.Grace {
		t.Errorf("encrypt: %v, %v", source, err)
	}
	if source, err := r.decrypt(message); err != nil || source != cache.Grace {
		t.Errorf("decrypt: %v, %v", source, err)
	}
	r.clock.Advance(36 * time.Minute)
	_, err = r.decrypt(message)
	wantReason(t, err, "BACKEND_UNAVAILABLE")
}
