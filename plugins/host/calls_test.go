package host_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

var (
	_ plugins.Backend      = (*host.Supervisor)(nil)
	_ plugins.RandomSource = (*host.Supervisor)(nil)
)

func TestSupervisorKeepsTheContract(t *testing.T) {
	s := plugintest.Start(t, config(t, puppetSettings{}))
	plugintest.Run(t, func(*testing.T) plugintest.Instance {
		return plugintest.Instance{
			Backend: s, Key: orders, Other: plugins.KeyRef{URI: "memory:other", Version: "1"}, Missing: "memory:missing", Random: true,
		}
	})
	if status := s.Status(); status.Failures != 0 || status.Calls < 100 || status.Plugin.Name != "memory" || status.Restarts != 0 {
		t.Errorf("status: got %+v, want many calls and no failure", status)
	}
}

func TestSupervisorsAreNotOpened(t *testing.T) {
	s, err := host.New(config(t, puppetSettings{}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(t.Context(), nil); plugins.ClassOf(err) != plugins.Internal {
		t.Errorf("Open: got %v, want Internal", err)
	}
	_, err = s.Check(t.Context())
	var e *plugins.Error
	if !errors.As(err, &e) || e.Class != plugins.Unavailable || e.RetryAfter <= 0 || !strings.Contains(e.Detail, "starting") {
		t.Errorf("Check before Run: got %v, want Unavailable with a time to retry", err)
	}
}

func TestEveryClassCrosses(t *testing.T) {
	s := plugintest.Start(t, config(t, puppetSettings{}))
	for _, class := range plugins.Classes() {
		_, err := order(t, s, class.String())
		var e *plugins.Error
		if !errors.As(err, &e) || e.Class != class || e.Detail != "as ordered" {
			t.Errorf("%s: got %v", class, err)
		}
	}
}

func TestUnavailableCallsAreRepeatedOnce(t *testing.T) {
	s := plugintest.Start(t, config(t, puppetSettings{}))
	if _, err := order(t, s, "second"); err != nil {
		t.Errorf("a call that works the second time: %v", err)
	}
	if status := s.Status(); status.Calls != 1 || status.Failures != 0 {
		t.Errorf("status: got %d calls and %d failures, want 1 and 0", status.Calls, status.Failures)
	}
}

// An outage of one key is its callers' alone: it stops no other call, takes no repeats
// from them, replaces no process, and says nothing of how the backend is.
func TestAnIllKeyIsNoOutageOfTheBackend(t *testing.T) {
	s := plugintest.Start(t, config(t, puppetSettings{}))
	pid := s.Status().PID
	for i := range 50 {
		if _, err := order(t, s, "ill"); !plugins.IsKeyOnly(err) {
			t.Fatalf("the ill key: %v", err)
		}
		if i%10 == 9 {
			if _, err := order(t, s, "ok"); err != nil {
				t.Fatalf("another key: %v", err)
			}
		}
	}
	status := s.Status()
	if status.State != host.Up || status.PID != pid || status.Retries != 0 || status.Failures != 50 || status.Breaker.Opened != 0 || status.Breaker.Refused != 0 {
		t.Errorf("status: %+v", status)
	}
	if _, err := order(t, s, "down"); err != nil { // for Check, so that nothing else cures it
		t.Fatal(err)
	}
	if _, err := order(t, s, "Unavailable"); err == nil {
		t.Fatal("no outage")
	}
	eventually(t, "the backend is degraded", func() bool { return s.Status().State == host.Degraded })
	for range 5 {
		_, _ = order(t, s, "ill")
	}
	if got := s.Status().State; got != host.Degraded {
		t.Errorf("an ill key makes a degraded backend %s", got)
	}
}

// A retry that has no chance to be answered in time is not made.
func TestRetriesLeaveTheDeadlineAlone(t *testing.T) {
	s := plugintest.Start(t, config(t, puppetSettings{}))
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Millisecond)
	defer cancel()
	if _, err := s.Describe(ctx, "do:second"); plugins.ClassOf(err) != plugins.Unavailable || ctx.Err() != nil {
		t.Errorf("got %v and context error %v, want Unavailable before the deadline", err, ctx.Err())
	}
}

func TestCallersTakeTurns(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.MaxConcurrent = 1
	s := plugintest.Start(t, cfg)
	const greedy = 12
	var (
		mu    sync.Mutex
		order []string
		wg    sync.WaitGroup
	)
	call := func(caller string) {
		defer wg.Done()
		if _, err := s.Describe(plugins.WithCaller(bounded(t), caller), "do:sleep 20ms"); err != nil {
			t.Errorf("%s: %v", caller, err)
		}
		mu.Lock()
		defer mu.Unlock()
		order = append(order, caller)
	}
	wg.Add(greedy)
	for range greedy {
		go call("greedy")
	}
	eventually(t, "the greedy caller's calls", func() bool { return s.Status().Calls == greedy })
	wg.Add(1)
	go call("modest")
	wg.Wait()
	at := 0
	for order[at] != "modest" {
		at++
	}
	if at > greedy/2 {
		t.Errorf("the modest caller came after %d of %d calls of the greedy one: %v", at, greedy, order)
	}
}

func TestTheCallersOwnEnd(t *testing.T) {
	s := plugintest.Start(t, config(t, puppetSettings{}))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { _, err := s.Describe(ctx, "do:wait"); done <- err }()
	eventually(t, "a call", func() bool { return s.Status().Calls == 1 })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) || plugins.ClassOf(err) != plugins.Unavailable {
		t.Errorf("got %v, want Unavailable because of the cancellation", err)
	}
	if state := s.Status().State; state != host.Up {
		t.Errorf("state: got %s, want up", state)
	}
}

// A backend gives up a little before its caller does. That the caller had so
// little time is still no fault of the backend.
func TestTheCallersOwnDeadline(t *testing.T) {
	s := plugintest.Start(t, config(t, puppetSettings{}))
	for _, patience := range []time.Duration{20 * time.Millisecond, 200 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		_, err := s.Describe(ctx, "do:wait")
		if cancel(); !errors.Is(err, context.DeadlineExceeded) || plugins.ClassOf(err) != plugins.Unavailable {
			t.Errorf("after %s: got %v, want Unavailable because of the caller's deadline", patience, err)
		}
	}
	if status := s.Status(); status.State != host.Up || status.Failures != 0 {
		t.Errorf("state %s and %d failures, want up and none", status.State, status.Failures)
	}
}
