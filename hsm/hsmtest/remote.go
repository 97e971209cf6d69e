package hsmtest

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Remote is a token at the other end of a wire, as that of an HSM in the network:
// p11-kit serves it in other processes, and everything between its module and them
// passes a line that a test can disturb. Several goroutines may use it.
//
// What p11-kit passes on depends on its release: 0.24 knows RSA and HMAC, not AES.
type Remote struct {
	// Module is the module that reaches the token: p11-kit's client.
	Module string
	// Address is where it looks for it, the value of RemoteVariable.
	Address string

	t      testing.TB
	soft   *SoftHSM
	log    string // what the server says, a file
	server *exec.Cmd
	line   *line
}

// RemoteVariable is what tells p11-kit's client where its server is. A client reads
// it when it is loaded.
const RemoteVariable = "P11_KIT_SERVER_ADDRESS"

// NewRemote serves the token s, until the test ends; one token may have several. The
// environment of the test has RemoteVariable.
func NewRemote(t testing.TB, s *SoftHSM) *Remote {
	t.Helper()
	modules, _ := filepath.Glob("/usr/lib/*/pkcs11/p11-kit-client.so") // the pattern is good
	if len(modules) == 0 {
		t.Fatal("p11-kit-modules is not installed (make deps)")
	}
	dir, err := os.MkdirTemp(s.Dir(), "wire")
	if err != nil {
		t.Fatal(err)
	}
	r := &Remote{Module: modules[0], t: t, soft: s, log: filepath.Join(dir, "log"), line: newLine(filepath.Join(dir, "near"), filepath.Join(dir, "far"))}
	r.Address = "unix:path=" + r.line.near
	t.Cleanup(r.Stop)
	r.Start()
	t.Setenv(RemoteVariable, r.Address)
	return r
}

// Env is the environment for processes that do not have that of the test.
func (r *Remote) Env() []string { return append(r.soft.Env(), RemoteVariable+"="+r.Address) }

// Start starts the server, and the line to it.
func (r *Remote) Start() {
	r.t.Helper()
	if err := r.serve(); err != nil {
		said, _ := os.ReadFile(r.log) // there may be none
		r.t.Fatalf("p11-kit server: %v\n%s", err, said)
	}
	if err := r.line.open(); err != nil {
		r.t.Fatal(err)
	}
}

// Stop ends the server with all that it started, and the line: nobody is at the
// address any more.
func (r *Remote) Stop() {
	r.line.close()
	if r.server == nil {
		return
	}
	_ = syscall.Kill(-r.server.Process.Pid, syscall.SIGKILL) // those that serve connections outlive it otherwise
	_ = r.server.Wait()                                      // it was killed
	r.server = nil
	_ = os.Remove(r.line.far)
}

// serve starts the server and waits until it listens.
func (r *Remote) serve() error {
	out, in, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = errors.Join(out.Close(), in.Close()) }()
	log, err := os.Create(r.log)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command("p11-kit", "server", "-f", "-n", r.line.far, "--provider", SoftHSMModule, "pkcs11:token="+Label) //nolint:gosec,noctx // paths of the test; Stop ends it
	cmd.Env = append(os.Environ(), r.soft.Env()...)
	cmd.Stdout, cmd.Stderr = in, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	r.server = cmd
	_ = in.Close()
	_ = out.SetReadDeadline(time.Now().Add(10 * time.Second)) // it is a pipe
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "P11_KIT_SERVER_PID=") {
			return nil
		}
	}
	return errors.New("it does not say that it listens")
}

// Cut ends all connections. New ones are taken.
func (r *Remote) Cut() { r.line.cut() }

// Refuse ends new connections as soon as they are made, and takes them again.
func (r *Remote) Refuse(yes bool) { r.line.change(func(w *ways) { w.refuse = yes }) }

// Silence keeps back all answers, also of new connections, and lets them go again.
func (r *Remote) Silence(yes bool) { r.line.change(func(w *ways) { w.silent = yes }) }

// CutAnswers lets skip answers pass, and ends connections in the middle of the count
// ones that are next.
func (r *Remote) CutAnswers(skip, count int) {
	r.line.change(func(w *ways) { w.whole, w.halves = skip, count })
}

// Delay keeps back each answer for so long.
func (r *Remote) Delay(d time.Duration) { r.line.change(func(w *ways) { w.delay = d }) }

// Throttle lets each connection have so many bytes of answers a second; 0 is as many as
// can be.
func (r *Remote) Throttle(bytesPerSecond int) {
	r.line.change(func(w *ways) { w.rate = bytesPerSecond })
}

// Corrupt lets skip answers pass, and changes a bit in the middle of the count ones that
// are next.
func (r *Remote) Corrupt(skip, count int) {
	r.line.change(func(w *ways) { w.clean, w.dirty = skip, count })
}

// Connections returns how many connections were made, or tried and refused, since it
// was last asked. While the server is stopped nobody counts.
func (r *Remote) Connections() int { return r.line.counted() }
