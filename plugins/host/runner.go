package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

const (
	// pipeDelay is how long the pipes of a dead process may stay open: processes
	// of its own could hold them.
	pipeDelay = 500 * time.Millisecond
	// maxHandshake bounds the one line that a plugin says of itself.
	maxHandshake = 8 << 10
)

// runner executes a plugin for go-plugin. It is a runner of our own because
// go-plugin's crashes the host on some lines of the plugin's standard error,
// lets the process be killed only through RPCs without a deadline, and connects
// to any address that the process names.
type runner struct {
	cmd       *exec.Cmd
	rules     *ruleset // open until the process was started; nil: not confined
	socketDir string
	rest      *relay // what follows the handshake on standard output
	stderr    *relay
	stdout    *io.PipeReader
	closeOut  *io.PipeWriter
	ended     chan struct{} // closed when the process was reaped

	mu     sync.Mutex
	socket string // mu guards socket; what the plugin listens on
	pid    int    // mu guards pid and what follows; 0 before the start
	reaped bool   // the process is gone, and so may be its process ID
	err    error  // how it ended
}

func newRunner(cmd *exec.Cmd, socketDir string, rules *ruleset, logger *zap.Logger) *runner {
	r := &runner{
		cmd: cmd, rules: rules, socketDir: socketDir, ended: make(chan struct{}),
		rest: newRelay(logger, "stdout", zapcore.ErrorLevel), stderr: newRelay(logger, "stderr", zapcore.ErrorLevel),
	}
	r.stdout, r.closeOut = io.Pipe()
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &handshakeWriter{line: r.closeOut, rest: r.rest}, r.stderr, pipeDelay
	return r
}

// handshakeWriter passes on the first line, cut to maxHandshake bytes. What
// follows is logged, so that a plugin that writes to standard output is neither
// blocked nor believed.
type handshakeWriter struct {
	line io.Writer
	rest io.Writer
	sent int
	over bool
}

// Write implements io.Writer.
func (h *handshakeWriter) Write(p []byte) (int, error) {
	if h.over {
		return h.rest.Write(p)
	}
	line, rest, ended := bytes.Cut(p, []byte("\n"))
	if room := maxHandshake - h.sent; len(line) > room {
		line, ended = line[:room], true
	}
	h.sent, h.over = h.sent+len(line), ended
	if ended {
		line = append(bytes.Clone(line), '\n')
	}
	if _, err := h.line.Write(line); err != nil {
		return 0, err
	}
	_, err := h.rest.Write(rest)
	return len(p), err
}

// Start implements go-plugin's runner.
func (r *runner) Start(context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reaped {
		return errors.New("stopped before it was started")
	}
	if err := r.rules.onOwnThread(r.cmd.Start, r.ended); err != nil {
		return fmt.Errorf("execute the plugin: %w", err)
	}
	r.pid = r.cmd.Process.Pid
	go r.reap()
	return nil
}

// reap waits for the process, takes its descendants along and closes its pipes.
func (r *runner) reap() {
	defer close(r.ended)
	waitExited(r.pid)
	r.mu.Lock()
	// The dead process still holds its ID, so that the group is surely its own.
	_ = unix.Kill(-r.pid, unix.SIGKILL)
	r.reaped = true
	r.mu.Unlock()
	err := r.cmd.Wait()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	if err == nil {
		err = errors.New(r.cmd.ProcessState.String())
	}
	r.mu.Lock()
	r.err = err
	r.mu.Unlock()
	_ = r.closeOut.Close()
	_ = r.rest.Close()
	_ = r.stderr.Close()
}

// waitExited blocks until the process is dead and leaves it to be reaped.
func waitExited(pid int) {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// kill ends the process and its group at once. It does not wait.
func (r *runner) kill() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pid == 0 {
		r.reaped = true // never start it
		return
	}
	if !r.reaped {
		_ = unix.Kill(-r.pid, unix.SIGKILL)
	}
}

// end returns how the process ended; only after ended is closed.
func (r *runner) end() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

func (r *runner) processID() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.pid
}

// Wait implements go-plugin's runner.
func (r *runner) Wait(context.Context) error {
	<-r.ended
	return nil // how it ended is told by the supervisor
}

// Kill implements go-plugin's runner.
func (r *runner) Kill(context.Context) error {
	r.kill()
	return nil
}

// Stdout implements go-plugin's runner.
func (r *runner) Stdout() io.ReadCloser { return r.stdout }

// Stderr implements go-plugin's runner: it sees nothing of it.
func (r *runner) Stderr() io.ReadCloser { return io.NopCloser(strings.NewReader("")) }

// Name implements go-plugin's runner.
func (r *runner) Name() string { return r.cmd.Args[0] }

// ID implements go-plugin's runner.
func (r *runner) ID() string {
	if pid := r.processID(); pid != 0 {
		return strconv.Itoa(pid)
	}
	return ""
}

// Diagnose implements go-plugin's runner.
func (r *runner) Diagnose(context.Context) string { return "" }

// PluginToHost implements go-plugin's runner. It refuses every address that is
// not a socket in the plugin's private directory.
func (r *runner) PluginToHost(network, address string) (string, string, error) {
	if network != "unix" || filepath.Dir(address) != r.socketDir {
		return "", "", fmt.Errorf("the plugin listens on %q %q, not in the directory that PLUGIN_UNIX_SOCKET_DIR names", network, address)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.socket = address
	return network, address, nil
}

// reachable tells whether the socket that the plugin named is still there.
func (r *runner) reachable() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.socket == "" {
		return true
	}
	_, err := os.Lstat(r.socket)
	return !errors.Is(err, fs.ErrNotExist)
}

// HostToPlugin implements go-plugin's runner.
func (r *runner) HostToPlugin(network, address string) (string, string, error) {
	return network, address, nil
}
