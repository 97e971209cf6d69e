package hsmtest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"
)

// Token is a new token of a module other than SoftHSM, and all that who uses it must
// know. It belongs to one test, and is gone when that ends.
type Token struct {
	// Module is the path of the library, and Reserved what it is given at its start.
	Module, Reserved string
	// Label is the token's; no other token of the module has it.
	Label string
	// PIN is in PINFile, too.
	PIN, OfficerPIN, PINFile string
	// DataObjects says whether it takes private data objects, and every process sees
	// them: else the catalogue of its keys must be in a file.
	DataObjects bool
	// Dir is the test's own; it may put more there.
	Dir string
	// Env is the environment for processes that do not have that of the test, where
	// it is set already: a module reads it in C_Initialize, or before.
	Env []string
	// Write are the files and directories that a confined process must be able to
	// change to use the token, and Sockets what it connects to.
	Write, Sockets []string
}

// Path is that of a file in Dir.
func (k *Token) Path(name string) string { return filepath.Join(k.Dir, name) }

// newToken has a directory and a file with the PIN. module is a path below Debian's
// directory of libraries, and needs are files; all must be installed.
func newToken(t testing.TB, module, pin, officerPIN string, needs ...string) *Token {
	t.Helper()
	for _, path := range needs {
		if _, err := os.Stat(path); err != nil {
			t.Fatalf("not installed (scripts/setup-hsm-modules): %v", err)
		}
	}
	modules, err := filepath.Glob("/usr/lib/*-linux-gnu*/" + module)
	if err != nil || len(modules) != 1 {
		t.Fatalf("%d of %s are installed (scripts/setup-hsm-modules), %v", len(modules), module, err)
	}
	dir, err := os.MkdirTemp("", "hsm") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	k := &Token{Module: modules[0], Label: Label, PIN: pin, OfficerPIN: officerPIN, Dir: dir}
	k.PINFile = k.Path("pin")
	k.write(t, "pin", pin+"\n")
	return k
}

// write writes a file in Dir.
func (k *Token) write(t testing.TB, name, content string) {
	t.Helper()
	if err := os.WriteFile(k.Path(name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// tool runs pkcs11-tool.
func (k *Token) tool(t testing.TB, args ...string) {
	t.Helper()
	run(t, "pkcs11-tool", slices.Concat([]string{"--module", k.Module}, args)...)
}

// answers tells whether the module can be initialised.
func (k *Token) answers(t testing.TB) error {
	out, err := exec.CommandContext(t.Context(), "pkcs11-tool", "--module", k.Module, "--list-slots").CombinedOutput() //nolint:gosec // a constant of the package
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

// run runs a program that has to succeed.
func run(t testing.TB, name string, args ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput() //nolint:gosec // what the package says
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// daemonPatience is how long a daemon has to be ready, and to end.
const daemonPatience = 20 * time.Second

// daemon starts a program in the foreground, waits until ready has no error, and ends
// it with the test, or with the test's process.
func daemon(t testing.TB, cmd *exec.Cmd, ready func() error) {
	t.Helper()
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGTERM
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(daemonPatience):
			t.Errorf("%s does not end", cmd.Path)
			_ = cmd.Process.Kill()
			<-ended
		}
	})
	var err error
	for deadline := time.Now().Add(daemonPatience); time.Now().Before(deadline); {
		if err = ready(); err == nil {
			return
		}
		select {
		case <-ended:
			t.Fatalf("%s ended: %v\n%s", cmd.Path, cmd.ProcessState, output.Bytes())
		case <-time.After(10 * time.Millisecond):
		}
	}
	t.Fatalf("%s is not ready: %v", cmd.Path, err)
}

// lock holds an exclusive lock on a file until the test ends, also against tests of
// other packages.
func lock(t testing.TB, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	for deadline := time.Now().Add(4 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) || time.Now().After(deadline) {
			t.Fatalf("lock %s: %v", path, err)
		}
	}
}

// remove removes what there may be.
func remove(t testing.TB, paths ...string) {
	t.Helper()
	for _, path := range paths {
		if err := os.RemoveAll(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(fmt.Errorf("remove: %w", err))
		}
	}
}
