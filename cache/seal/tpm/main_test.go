package tpm_test

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/kms-agent/kms-agent/cache/seal"
	"github.com/kms-agent/kms-agent/cache/seal/tpm"
)

// emulator is a TPM of its own: swtpm, with its state in a directory.
type emulator struct {
	dir, socket string
	cmd         *exec.Cmd
}

func newEmulator(t *testing.T) *emulator {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm") // a socket's path is 107 bytes at most
	must(t, err)
	e := &emulator{dir: dir, socket: filepath.Join(dir, "s")}
	t.Cleanup(func() {
		e.end(syscall.SIGKILL)
		_ = os.RemoveAll(dir)
	})
	e.boot(t)
	return e
}

// boot turns the TPM on and returns once it takes commands.
func (e *emulator) boot(t *testing.T) {
	t.Helper()
	_ = os.Remove(e.socket)
	e.cmd = exec.CommandContext(t.Context(), "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+e.dir,
		"--server", "type=unixio,path="+e.socket, "--ctrl", "type=unixio,path="+e.socket+".ctrl",
		"--flags", "not-need-init,startup-clear")
	said := new(bytes.Buffer)
	e.cmd.Stderr = said
	if err := e.cmd.Start(); err != nil {
		t.Fatalf("start swtpm: %v: install it (scripts/setup-test-deps)", err)
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if conn, err := net.Dial("unix", e.socket); err == nil {
			_ = conn.Close()
			return
		} else if time.Now().After(deadline) {
			e.end(syscall.SIGKILL)
			t.Fatalf("swtpm: %v: %s", err, said)
		}
	}
}

// end stops the TPM: by SIGKILL as a power failure would.
func (e *emulator) end(by syscall.Signal) {
	if e.cmd != nil {
		_ = e.cmd.Process.Signal(by)
		_ = e.cmd.Wait()
		e.cmd = nil
	}
}

func (e *emulator) open(t *testing.T) *tpm.Sealer {
	t.Helper()
	s, err := tpm.Open(tpm.Config{Device: e.socket})
	must(t, err)
	t.Cleanup(s.Close)
	return s
}

// execute runs a command beside the sealer.
func execute[C tpm2.Command[R, *R], R any](t *testing.T, e *emulator, cmd C) *R {
	t.Helper()
	device, err := linuxudstpm.Open(e.socket)
	must(t, err)
	defer func() { _ = device.Close() }()
	response, err := cmd.Execute(device)
	must(t, err)
	return response
}

func save(t *testing.T, path string, s seal.Sealer, values ...string) {
	t.Helper()
	store, err := seal.OpenStore(path, s)
	must(t, err)
	defer store.Close()
	for _, v := range values {
		must(t, store.Save([]seal.Record{{Type: seal.DataKey, Value: []byte(v)}}))
	}
}

func load(path string, s seal.Sealer) (string, error) {
	store, err := seal.OpenStore(path, s)
	if err != nil {
		return "", err
	}
	defer store.Close()
	l, err := store.Load()
	if err != nil {
		return "", err
	}
	defer l.Free()
	return string(l.Records[0].Value), nil
}

func counter(t *testing.T, s *tpm.Sealer) uint64 {
	t.Helper()
	n, err := s.Counter()
	must(t, err)
	return n
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
