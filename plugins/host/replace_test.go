package host_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
)

// A process is replaced under load and no call fails.
func TestReplaceUnderLoad(t *testing.T) {
	s, _ := start(t, config(t, puppetSettings{}))
	if err := s.Ready(bounded(t)); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var calls atomic.Int64
	var load sync.WaitGroup
	for range 4 {
		load.Go(func() {
			for ctx.Err() == nil {
				_, err := s.Wrap(ctx, orders, make([]byte, 32), plugins.Binding{Purpose: "message"})
				if err != nil && ctx.Err() == nil {
					t.Errorf("a call failed: %v", err)
					return
				}
				calls.Add(1)
			}
		})
	}
	seen := map[int]bool{s.Status().PID: true}
	for range 3 {
		before := calls.Load()
		old := s.Status().PID
		if err := s.Replace(bounded(t)); err != nil {
			t.Fatalf("Replace: %v", err)
		}
		pid := s.Status().PID
		if seen[pid] || s.Status().State != "up" {
			t.Errorf("process %d, %s", pid, s.Status().State)
		}
		seen[pid] = true
		eventually(t, "the old process's end", func() bool { return gone(old) || zombie(old) })
		eventually(t, "calls after it", func() bool { return calls.Load() > before+10 })
	}
	stop()
	load.Wait()
	if got := s.Status().Restarts; got != 3 {
		t.Errorf("%d restarts, want 3", got)
	}
}

// What the new process answers while the old one still ends counts.
func TestReplaceSeesFaultsAtOnce(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.PingInterval = time.Hour // a Check in between would tell, too
	s, _ := start(t, cfg)
	if err := s.Ready(bounded(t)); err != nil {
		t.Fatal(err)
	}
	answer := make(chan error, 1)
	go func() {
		_, err := s.Describe(t.Context(), "do:sleep 1s")
		answer <- err
	}()
	eventually(t, "the call", func() bool { return s.Status().Calls > 0 })
	if err := s.Replace(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := order(t, s, "Internal"); plugins.ClassOf(err) != plugins.Internal {
		t.Fatalf("a broken answer: got %v, want Internal", err)
	}
	if err := <-answer; err != nil {
		t.Errorf("the call in flight: %v", err)
	}
	eventually(t, "the state degraded", func() bool { return s.Status().State == host.Degraded })
}

// A call that the old process still serves may finish there.
func TestReplaceLetsCallsFinish(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.CallTimeout = 20 * time.Second
	s, _ := start(t, cfg)
	if err := s.Ready(bounded(t)); err != nil {
		t.Fatal(err)
	}
	answer := make(chan error, 1)
	go func() {
		_, err := s.Describe(t.Context(), "do:sleep 1s")
		answer <- err
	}()
	eventually(t, "the call", func() bool { return s.Status().Calls > 0 })
	if err := s.Replace(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if err := <-answer; err != nil {
		t.Errorf("the call in flight: %v", err)
	}
}

// What is not well does not replace what is, as with a password that was changed to a
// wrong one; it replaces what is not well either.
func TestReplaceKeepsWhatIsWell(t *testing.T) {
	obstacle := filepath.Join(t.TempDir(), "obstacle")
	s, _ := start(t, config(t, puppetSettings{Check: "unavailable if " + obstacle}))
	if err := s.Ready(bounded(t)); err != nil {
		t.Fatal(err)
	}
	pid := s.Status().PID
	if err := os.WriteFile(obstacle, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Replace(bounded(t)); err == nil || !strings.Contains(err.Error(), "upstream is away") {
		t.Errorf("Replace: %v, want why the new process is not well", err)
	}
	if got := s.Status(); got.PID != pid || got.State != host.Up {
		t.Errorf("process %d is %s, want %d and up", got.PID, got.State, pid)
	}
	if _, err := s.Wrap(bounded(t), orders, make([]byte, 32), plugins.Binding{Purpose: "message"}); err != nil {
		t.Errorf("the old process: %v", err)
	}
	_, _ = order(t, s, "down")
	if err := s.Replace(bounded(t)); err != nil || s.Status().PID == pid {
		t.Errorf("Replace of what is not well: %v, process %d", err, s.Status().PID)
	}
}

// What cannot work does not replace what works.
func TestReplaceKeepsWhatWorks(t *testing.T) {
	obstacle := filepath.Join(t.TempDir(), "obstacle")
	s, _ := start(t, config(t, puppetSettings{Open: "unless " + obstacle}))
	if err := s.Ready(bounded(t)); err != nil {
		t.Fatal(err)
	}
	pid := s.Status().PID
	if err := os.WriteFile(obstacle, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Replace(bounded(t)); err == nil || !strings.Contains(err.Error(), "obstacle is there") {
		t.Errorf("Replace: %v, want why the new process does not work", err)
	}
	if got := s.Status(); got.PID != pid || got.State != "up" {
		t.Errorf("process %d is %s, want %d up", got.PID, got.State, pid)
	}
	if _, err := s.Describe(bounded(t), "memory:orders"); err != nil {
		t.Errorf("Describe: %v", err)
	}
}

// Whoever asks for a process does not wait for the backoff.
func TestReplaceEndsTheWait(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.BackoffMin, cfg.BackoffMax = time.Hour, time.Hour
	s, end := start(t, cfg)
	if err := s.Ready(bounded(t)); err != nil {
		t.Fatal(err)
	}
	_ = unix.Kill(s.Status().PID, unix.SIGKILL)
	eventually(t, "the state down", func() bool { return s.Status().State == "down" })
	if err := s.Replace(bounded(t)); err != nil {
		t.Fatalf("Replace: %v", err)
	}
	if _, err := s.Describe(bounded(t), "memory:orders"); err != nil {
		t.Errorf("Describe: %v", err)
	}
	_ = end()
	if err := s.Replace(bounded(t)); err == nil || !strings.Contains(err.Error(), "stopped") {
		t.Errorf("Replace after the end: %v", err)
	}
}

// Who asks for a process just when the supervisor ends gets an answer.
func TestReplaceAtTheEnd(t *testing.T) {
	for range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		asking, asked := make(chan struct{}), make(chan error, 1)
		cfg := config(t, puppetSettings{})
		cfg.Self, cfg.Command, cfg.SHA256 = false, "/nonexistent", strings.Repeat("0", 64)
		cfg.BackoffMin, cfg.BackoffMax = time.Minute, time.Minute
		cfg.OnState = func(s host.Status) {
			if s.State == host.Down {
				<-asking
				cancel()
			}
		}
		s, err := host.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		patient, stop := context.WithTimeout(context.Background(), 5*time.Second)
		go func() {
			close(asking)
			asked <- s.Replace(patient)
		}()
		if err := s.Run(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
		if err := <-asked; err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("Replace: %v, want an error at once", err)
		}
		stop()
	}
}
