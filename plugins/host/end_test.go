package host_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

func TestRunDrains(t *testing.T) {
	s, end := start(t, config(t, puppetSettings{}))
	if err := s.Ready(bounded(t)); err != nil {
		t.Fatal(err)
	}
	answer := make(chan error, 1)
	go func() { _, err := s.Describe(context.Background(), "do:sleep 300ms"); answer <- err }()
	eventually(t, "a call in flight", func() bool { return s.Status().Calls == 1 })
	time.Sleep(50 * time.Millisecond) // until the plugin has it; if not, there is less to drain
	if err := end(); !errors.Is(err, context.Canceled) {
		t.Errorf("Run: got %v, want the end of its context", err)
	}
	if err := <-answer; err != nil {
		t.Errorf("a call in flight at the end: %v", err)
	}
	if _, err := s.Describe(bounded(t), "memory:orders"); plugins.ClassOf(err) != plugins.Unavailable {
		t.Errorf("a call after the end: got %v, want Unavailable", err)
	}
	if err := s.Run(t.Context()); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("Run for the second time: got %v, want a refusal", err)
	}
}

// Whatever state the process is in, the end of Run leaves nothing behind.
func TestRunLeavesNothing(t *testing.T) {
	warmUp, end := start(t, config(t, puppetSettings{}))
	_ = warmUp.Ready(bounded(t))
	_ = end()
	for what, prepare := range map[string]func(*host.Supervisor) int{
		"idle":    func(s *host.Supervisor) int { return s.Status().PID },
		"stopped": func(s *host.Supervisor) int { _ = unix.Kill(s.Status().PID, unix.SIGSTOP); return s.Status().PID },
		"with a child": func(s *host.Supervisor) int {
			answer, _ := order(t, s, "child")
			pid, _ := strconv.Atoi(answer)
			return pid
		},
		"killed with a child": func(s *host.Supervisor) int {
			answer, _ := order(t, s, "child")
			pid, _ := strconv.Atoi(answer)
			_ = unix.Kill(s.Status().PID, unix.SIGKILL)
			return pid
		},
	} {
		t.Run(what, func(t *testing.T) {
			fds, goroutines := openFiles(t), runtime.NumGoroutine()
			cfg := config(t, puppetSettings{})
			cfg.PingInterval, cfg.CallTimeout = time.Minute, time.Second
			s, end := start(t, cfg)
			if err := s.Ready(bounded(t)); err != nil {
				t.Fatal(err)
			}
			pid, other := s.Status().PID, prepare(s)
			began := time.Now()
			_ = end()
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("the end took %s", took)
			}
			if other == 0 || !gone(pid) {
				t.Errorf("process %d or %d is still there", pid, other)
			}
			eventually(t, "its children's end", func() bool { return gone(other) || zombie(other) })
			if left, _ := filepath.Glob(filepath.Join(cfg.RuntimeDir, "*")); len(left) != 0 {
				t.Errorf("left in the runtime directory: %v", left)
			}
			eventually(t, "no goroutine more than before", func() bool { return runtime.NumGoroutine() <= goroutines })
			eventually(t, "no file more than before", func() bool { return openFiles(t) <= fds })
		})
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

// zombie tells whether a process only waits for its parent, which is not us.
func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(b), ") Z ")
}

func TestRestartsLeakNothing(t *testing.T) {
	cfg := config(t, puppetSettings{})
	s := plugintest.Start(t, cfg)
	fds, goroutines := openFiles(t), runtime.NumGoroutine()
	for range 5 {
		pid := s.Status().PID
		_ = unix.Kill(pid, unix.SIGKILL)
		eventually(t, "another process", func() bool { return s.Status().State == host.Up && s.Status().PID != pid })
	}
	eventually(t, "no goroutine more than before", func() bool { return runtime.NumGoroutine() <= goroutines })
	eventually(t, "no file more than before", func() bool { return openFiles(t) <= fds })
	if dirs, _ := filepath.Glob(filepath.Join(cfg.RuntimeDir, "*")); len(dirs) != 1 {
		t.Errorf("in the runtime directory: %v, want one directory", dirs)
	}
}

// A process that is lost between its handshake and the first RPC costs nothing
// but time, however often that happens.
func TestFailedConnectionsLeakNothing(t *testing.T) {
	for _, mode := range []string{"mute", "mute-and-gone", "no-socket"} {
		t.Run(mode, func(t *testing.T) {
			cfg := modeConfig(t, mode)
			cfg.StartTimeout = 300 * time.Millisecond
			fds, goroutines := openFiles(t), runtime.NumGoroutine()
			s, end := start(t, cfg)
			eventually(t, "some starts", func() bool { return s.Status().Restarts >= 2 })
			_ = end()
			for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
				if runtime.NumGoroutine() <= goroutines && openFiles(t) <= fds {
					return
				}
			}
			t.Errorf("%d goroutines and %d files more than before", runtime.NumGoroutine()-goroutines, openFiles(t)-fds)
		})
	}
}

// The runtime directory may be open to every user, for the agent's sockets are
// reached through it. That somebody locks it holds up no plugin.
func TestLockedRuntimeDirectory(t *testing.T) {
	cfg := config(t, puppetSettings{})
	dir, err := os.Open(cfg.RuntimeDir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dir.Close() })
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	s, end := start(t, cfg)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := s.Ready(ctx); err != nil {
		_ = dir.Close() // so that the test can end
		t.Error(err)
	}
	_ = end()
}

// hostProcess runs this binary as a host, in a process of its own.
func hostProcess(t *testing.T, env ...string) (cmd *exec.Cmd, dir, said string) {
	t.Helper()
	cfg := config(t, puppetSettings{})
	cmd = exec.Command("/proc/self/exe")
	cmd.Env = append(slices.Clone(env), modeVariable+"=host", "RUNTIME_DIR="+cfg.RuntimeDir, "PLUGIN_ENV="+strings.Join(cfg.Env, ",")+","+strings.Join(env, ","))
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	said, err = bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("host: %v", err)
	}
	return cmd, cfg.RuntimeDir, strings.TrimSpace(said)
}

func TestPluginsDieWithAKilledHost(t *testing.T) {
	cmd, dir, said := hostProcess(t)
	pid, err := strconv.Atoi(strings.Fields(said)[0])
	if err != nil || pid == 0 || zombie(pid) {
		t.Fatalf("host said %q, want the ID of a living process", said)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	eventually(t, "the plugin's end", func() bool { return gone(pid) || zombie(pid) })
	if dirs, _ := filepath.Glob(filepath.Join(dir, "*")); len(dirs) != 1 {
		t.Fatalf("left by a killed host: %v, want one directory", dirs)
	}
	// The next host clears up after it, and leaves a living one's alone.
	cfg := config(t, puppetSettings{})
	cfg.RuntimeDir = dir
	first := plugintest.Start(t, cfg)
	second := plugintest.Start(t, cfg)
	if dirs, _ := filepath.Glob(filepath.Join(dir, "*")); len(dirs) != 2 {
		t.Errorf("in the runtime directory: %v, want those of two plugins", dirs)
	}
	for _, s := range []*host.Supervisor{first, second} {
		if _, err := s.Describe(bounded(t), "memory:orders"); err != nil {
			t.Errorf("Describe: %v", err)
		}
	}
}

// A host that demands a FIPS 140-3 module takes the plugin's word for it.
func TestDemandsAFIPS140Module(t *testing.T) {
	for mode, refused := range map[string]bool{"off": true, "on": false} {
		cfg := config(t, puppetSettings{})
		cfg.FIPS140 = true
		cfg.Env = append(cfg.Env, "GODEBUG=fips140="+mode)
		s, _ := start(t, cfg)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if !refused {
			if err := s.Ready(ctx); err != nil {
				t.Errorf("with GODEBUG=fips140=%s: %v", mode, err)
			}
			continue
		}
		eventually(t, "the refusal", func() bool { return strings.Contains(s.Status().LastError, "without a FIPS 140-3 module") })
	}
}

func TestWorksUnderFIPS140Only(t *testing.T) {
	_, _, said := hostProcess(t, "GODEBUG=fips140=only")
	if fields := strings.Fields(said); len(fields) != 3 || fields[1] != "<nil>" || fields[2] == "off" {
		t.Errorf("host said %q, want a process, no error and a FIPS 140 module", said)
	}
}
