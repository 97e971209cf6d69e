package host_test

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

// replaced waits until another process than pid is up, and pid is gone.
func replaced(t *testing.T, s *host.Supervisor, pid int) {
	t.Helper()
	eventually(t, "another process", func() bool {
		status := s.Status()
		return status.State == host.Up && status.PID != pid && gone(pid)
	})
	if _, err := s.Describe(bounded(t), "memory:orders"); err != nil {
		t.Errorf("Describe by the new process: %v", err)
	}
	if got := s.Status().Restarts; got != 1 {
		t.Errorf("restarts: got %d, want 1", got)
	}
}

func TestDeadProcessesAreReplaced(t *testing.T) {
	for what, kill := range map[string]func(*host.Supervisor){
		"killed":         func(s *host.Supervisor) { _ = unix.Kill(s.Status().PID, unix.SIGKILL) },
		"terminated":     func(s *host.Supervisor) { _ = unix.Kill(s.Status().PID, unix.SIGTERM) },
		"exit":           func(s *host.Supervisor) { _, _ = s.Describe(t.Context(), "do:exit") },
		"panic outside":  func(s *host.Supervisor) { _, _ = s.Describe(t.Context(), "do:die") },
		"stopped (hung)": func(s *host.Supervisor) { _ = unix.Kill(s.Status().PID, unix.SIGSTOP) },
	} {
		t.Run(what, func(t *testing.T) {
			cfg := config(t, puppetSettings{})
			cfg.BackoffMin, cfg.BackoffMax = time.Second, time.Second // later than the retry of a call
			s := plugintest.Start(t, cfg)
			pid := s.Status().PID
			kill(s)
			replaced(t, s, pid)
		})
	}
}

// How long others before it were waited for is nothing to a process that has wrapped: when
// it dies, the next one is started soon.
func TestProcessThatWorkedIsReplacedSoon(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.BackoffMin, cfg.BackoffMax = time.Second, time.Minute
	s := plugintest.Start(t, cfg)
	wait := func() time.Duration {
		t.Helper()
		_ = unix.Kill(s.Status().PID, unix.SIGKILL)
		eventually(t, "the state down", func() bool { return s.Status().State == host.Down })
		_, err := s.Describe(bounded(t), "memory:orders")
		var e *plugins.Error
		if !errors.As(err, &e) || e.RetryAfter == 0 {
			t.Fatalf("a call without a process: %v, want when it may be made again", err)
		}
		return e.RetryAfter
	}
	for range 5 { // after which it is 16 seconds, at least
		wait()
		if err := s.Replace(bounded(t)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Wrap(bounded(t), orders, make([]byte, 32), plugins.Binding{}); err != nil {
		t.Fatal(err)
	}
	if got := wait(); got > 2*time.Second {
		t.Errorf("the next one is started in %s, want 2 s at most", got)
	}
	if err := s.Replace(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Describe(bounded(t), "memory:orders"); err != nil { // which shows nothing
		t.Fatal(err)
	}
	if got := wait(); got < 2*time.Second {
		t.Errorf("after one that answered nothing: %s, want a longer wait", got)
	}
}

func TestInterruptsAreIgnored(t *testing.T) {
	s := plugintest.Start(t, config(t, puppetSettings{}))
	pid := s.Status().PID
	for range 5 {
		if err := unix.Kill(pid, unix.SIGINT); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Describe(bounded(t), "memory:orders"); err != nil || s.Status().PID != pid {
		t.Errorf("after SIGINT: error %v and process %d, want the same process %d to serve", err, s.Status().PID, pid)
	}
}

func TestCallsInFlightWhenTheProcessDies(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.BackoffMin, cfg.BackoffMax = time.Minute, time.Minute
	s := plugintest.Start(t, cfg)
	pid := s.Status().PID
	const calls = 8
	failures := make(chan error, calls)
	for range calls {
		go func() { _, err := s.Describe(context.Background(), "do:sleep 1h"); failures <- err }()
	}
	eventually(t, "calls in flight", func() bool { return s.Status().Calls >= calls })
	_ = unix.Kill(pid, unix.SIGKILL)
	for range calls {
		if err := <-failures; plugins.ClassOf(err) != plugins.Unavailable || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a call in flight: got %v, want Unavailable", err)
		}
	}
	eventually(t, "the state down", func() bool { return s.Status().State == host.Down })
	began := time.Now()
	_, err := s.Describe(bounded(t), "memory:orders")
	var e *plugins.Error
	if !errors.As(err, &e) || e.Class != plugins.Unavailable || e.RetryAfter < 30*time.Second || time.Since(began) > 5*time.Second {
		t.Errorf("a call without a process: got %v after %s, want Unavailable at once, to be repeated when there is one", err, time.Since(began))
	}
	status := s.Status()
	if status.PID != 0 || !strings.Contains(status.LastError, "signal: killed") || status.Failures != calls+1 {
		t.Errorf("status: got %+v, want no process, how it died, and %d failures", status, calls+1)
	}
}

func TestHungCallsReplaceTheProcess(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.CallTimeout = 200 * time.Millisecond
	s := plugintest.Start(t, cfg)
	pid := s.Status().PID
	for i := range 3 {
		if _, err := order(t, s, "hang"); plugins.ClassOf(err) != plugins.Unavailable || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("hung call %d: got %v, want Unavailable that is not the caller's own deadline", i, err)
		}
	}
	replaced(t, s, pid)
	if got := s.Status().LastError; !strings.Contains(got, "no answer in time") {
		t.Errorf("last error: got %q, want why the process was replaced", got)
	}
}

// A backend that says that its upstream does not answer is no broken process,
// and nor is one whose callers are impatient.
func TestSlowUpstreamsDoNotReplaceTheProcess(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.CallTimeout = 300 * time.Millisecond
	cfg.Breaker.Failures = 100 // the process shall get all of them
	s := plugintest.Start(t, cfg)
	pid := s.Status().PID
	for range 6 {
		if _, err := order(t, s, "wait"); plugins.ClassOf(err) != plugins.Unavailable {
			t.Errorf("no answer from upstream: got %v, want Unavailable", err)
		}
	}
	eventually(t, "the state degraded", func() bool { return s.Status().State == host.Degraded })
	for range 6 {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		_, err := s.Describe(ctx, "do:sleep 20ms")
		if cancel(); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("an impatient caller: got %v, want its own deadline", err)
		}
	}
	if _, err := s.Describe(bounded(t), "memory:orders"); err != nil || s.Status().PID != pid {
		t.Errorf("error %v and process %d, want the same process %d to serve", err, s.Status().PID, pid)
	}
	eventually(t, "the state up", func() bool { return s.Status().State == host.Up })
}

func TestBrokenAnswersReplaceTheProcess(t *testing.T) {
	for _, what := range []string{"Internal", "panic", "env CONFIGURED_TOO_LONG" + strings.Repeat("G", 900)} {
		t.Run(what[:3], func(t *testing.T) {
			cfg := config(t, puppetSettings{})
			cfg.PingInterval = time.Hour // a Check in between would find nothing wrong
			cfg.Env = append(cfg.Env, strings.TrimPrefix(what, "env ")+strings.Repeat("x", 900)+"=1")
			s := plugintest.Start(t, cfg)
			pid := s.Status().PID
			for range 4 {
				if _, err := order(t, s, what); plugins.ClassOf(err) != plugins.Internal {
					t.Fatalf("a broken answer: got %v, want Internal", err)
				}
			}
			eventually(t, "the state degraded", func() bool { return s.Status().State == host.Degraded })
			// One good answer, even a no, and the count begins anew.
			if _, err := order(t, s, "KeyNotFound"); plugins.ClassOf(err) != plugins.KeyNotFound {
				t.Fatalf("a no: got %v", err)
			}
			eventually(t, "the state up", func() bool { return s.Status().State == host.Up })
			for range 5 {
				_, _ = order(t, s, what)
			}
			replaced(t, s, pid)
		})
	}
}

func TestUnreachableUpstreamsDegrade(t *testing.T) {
	var states []host.State
	var mu sync.Mutex
	cfg := config(t, puppetSettings{Check: "unavailable"})
	cfg.OnState = func(status host.Status) {
		mu.Lock()
		defer mu.Unlock()
		states = append(states, status.State)
	}
	s, end := start(t, cfg)
	eventually(t, "the state degraded", func() bool { return s.Status().State == host.Degraded })
	if got := s.Status().LastError; !strings.Contains(got, "upstream is away") {
		t.Errorf("last error: got %q, want what the check said", got)
	}
	ready, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := s.Ready(ready); err == nil || !strings.Contains(err.Error(), "upstream is away") {
		t.Errorf("Ready: got %v, want what the check said", err)
	}
	// It serves all the same; what it answers makes it up, and idle it is asked.
	if _, err := s.Describe(bounded(t), "memory:orders"); err != nil {
		t.Errorf("Describe while degraded: %v", err)
	}
	if _, err := order(t, s, "up"); err != nil {
		t.Fatal(err)
	}
	if err := s.Ready(bounded(t)); err != nil {
		t.Errorf("Ready: %v", err)
	}
	if _, err := order(t, s, "Unauthenticated"); plugins.ClassOf(err) != plugins.Unauthenticated {
		t.Errorf("got %v, want Unauthenticated", err)
	}
	eventually(t, "the state degraded by a call", func() bool { return s.Status().State == host.Degraded })
	eventually(t, "the state up by a check", func() bool { return s.Status().State == host.Up })
	_ = end()
	mu.Lock()
	defer mu.Unlock()
	want := fmt.Sprint([]host.State{host.Degraded, host.Up, host.Degraded, host.Up, host.Down})
	if got := fmt.Sprint(states); got != want {
		t.Errorf("states: got %s, want %s", got, want)
	}
}

func TestStartedByHand(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = []string{modeVariable + "=by-hand"}
	out, err := cmd.Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), "the agent starts it by itself") {
		t.Errorf("got %q and %v, want an explanation and status 1", out, err)
	}
}

func TestPluginLogs(t *testing.T) {
	core, logs := observer.New(zapcore.DebugLevel)
	cfg := config(t, puppetSettings{})
	cfg.Logger = zap.New(core)
	s := plugintest.Start(t, cfg)
	for _, line := range []string{
		`raw {"@message":1}`, // go-plugin's own relay panics at this
		`raw {"@level":"error","@message":"failed","key":"orders","n":1}`,
		"log by os.Stderr",
		"panic",
	} {
		_, _ = order(t, s, line)
	}
	entry := func(text string) (observer.LoggedEntry, bool) {
		for _, e := range logs.FilterMessage("plugin log").All() {
			if e.ContextMap()["text"] == text {
				return e, true
			}
		}
		return observer.LoggedEntry{}, false
	}
	for text, want := range map[string]zapcore.Level{
		"failed": zapcore.ErrorLevel, "by os.Stderr": zapcore.WarnLevel, "": zapcore.InfoLevel, "panic in the backend": zapcore.ErrorLevel,
	} {
		eventually(t, "the line "+text, func() bool { _, ok := entry(text); return ok })
		if e, _ := entry(text); e.Level != want || e.ContextMap()["backend"] != "puppet" {
			t.Errorf("%q: got %s %v, want %s of the backend", text, e.Level, e.ContextMap(), want)
		}
	}
	if e, _ := entry("panic in the backend"); !strings.Contains(fmt.Sprint(e.ContextMap()["plugin.stack"]), "puppet") {
		t.Errorf("panic: got %v, want where it happened", e.ContextMap())
	}
	for _, e := range logs.All() {
		if text := fmt.Sprint(e.Message, e.ContextMap()); strings.Contains(text, secretText) {
			t.Errorf("the log holds the argument of a panic: %s", text)
		}
	}
	if _, err := s.Describe(bounded(t), "memory:orders"); err != nil {
		t.Errorf("Describe: %v", err)
	}
}
