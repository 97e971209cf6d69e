package client_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// devAgent is the real agent that examples and tests use; tests that stop an
// agent start their own.
var devAgent *realAgent

// realAgent is a process of "kms-agent dev" in a directory of its own.
type realAgent struct {
	dir     string
	binary  string
	process *exec.Cmd
}

// startDevAgent builds the agent and starts it.
func startDevAgent() (*realAgent, error) {
	dir, err := os.MkdirTemp("", "kms")
	if err != nil {
		return nil, err
	}
	a := &realAgent{dir: dir, binary: filepath.Join(dir, "kms-agent")}
	build := exec.Command("go", "build", "-o", a.binary, "../cmd/kms-agent")
	if out, err := build.CombinedOutput(); err != nil {
		a.remove()
		return nil, fmt.Errorf("build the agent: %w\n%s", err, out)
	}
	if err := a.start(); err != nil {
		a.remove()
		return nil, err
	}
	return a, nil
}

func (a *realAgent) home() string   { return filepath.Join(a.dir, "dev") }
func (a *realAgent) socket() string { return filepath.Join(a.home(), "kms.sock") }
func (a *realAgent) workload(name string) string {
	return "unix://" + filepath.Join(a.home(), "workload-api", name+".sock")
}

// start runs the agent and waits until it serves.
func (a *realAgent) start() error {
	a.process = exec.Command(a.binary, "dev", "--dir", a.home())
	log, err := os.OpenFile(filepath.Join(a.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	a.process.Stdout, a.process.Stderr = log, log
	if err := a.process.Start(); err != nil {
		return err
	}
	for range 600 {
		if _, err := os.Stat(filepath.Join(a.home(), "ready")); err == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	text, _ := os.ReadFile(filepath.Join(a.dir, "log"))
	return fmt.Errorf("the agent is not ready after 30 s:\n%s", text)
}

// stop ends the process.
func (a *realAgent) stop() error {
	if a.process == nil {
		return nil
	}
	err := errors.Join(a.process.Process.Signal(syscall.SIGTERM), a.process.Wait())
	a.process = nil
	return err
}

func (a *realAgent) remove() {
	_ = a.stop()
	_ = os.RemoveAll(a.dir)
}
