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
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

func readWeather(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "fine"
	}
	return string(b)
}

var calls atomic.Int64

// weather is what a file says of upstream: fine, dead, slow, lossy, throttled, or
// lying, which is dead with a Check that tells nothing of it.
func weather(ctx context.Context, path string) error {
	switch readWeather(path) {
	case "dead", "lying":
		return plugins.Errorf(plugins.Unavailable, "upstream is away")
	case "slow":
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Second): // it stands for an upstream's time
		}
	case "lossy":
		if n := calls.Add(1) % 10; n == 2 || n == 5 || n == 8 {
			return plugins.Errorf(plugins.Unavailable, "lost")
		}
	case "throttled":
		return &plugins.Error{Class: plugins.Unavailable, RetryAfter: 1500 * time.Millisecond, Detail: "too many"}
	}
	return nil
}

// under is a real plugin under a weather that turns.
type under struct {
	*host.Supervisor
	t    *testing.T
	path string
}

func underWeather(t *testing.T, change func(*host.Config)) *under {
	t.Helper()
	path := filepath.Join(t.TempDir(), "weather")
	cfg := config(t, puppetSettings{Weather: path})
	cfg.Access.Read = []string{filepath.Dir(path)}
	cfg.CallTimeout, cfg.Breaker.MaxWait, cfg.PingInterval = time.Second, time.Second, host.DefaultPingInterval
	change(&cfg)
	u := &under{plugintest.Start(t, cfg), t, path}
	if err := u.call(); err != nil {
		t.Fatalf("in fine weather: %v", err)
	}
	return u
}

// turns changes the weather at once, for those who read it at that time too.
func (u *under) turns(what string) {
	u.t.Helper()
	next := u.path + ".next"
	if err := errors.Join(os.WriteFile(next, []byte(what), 0o600), os.Rename(next, u.path)); err != nil {
		u.t.Fatal(err)
	}
}

func (u *under) call() error {
	_, err := u.Describe(bounded(u.t), "do:upstream "+u.path)
	return err
}

// opens makes calls until the breaker is open, and returns how many.
func (u *under) opens() (calls int) {
	u.t.Helper()
	eventually(u.t, "the breaker opens", func() bool {
		if u.Status().Breaker.Circuit == host.Open {
			return true
		}
		calls++
		_ = u.call()
		return false
	})
	return calls
}

// recovers makes calls until the breaker is closed again.
func (u *under) recovers() {
	u.t.Helper()
	eventually(u.t, "the breaker closes", func() bool {
		_ = u.call()
		return u.Status().Breaker.Circuit == host.Closed
	})
	if err := u.call(); err != nil {
		u.t.Errorf("when it has closed: %v", err)
	}
	eventually(u.t, "the state up", func() bool { return u.Status().State == host.Up })
}

// An upstream that is away, or as good as away, is not called for long, is told as
// such at once, and is noticed when it comes back. The process has no part in it.
func TestUpstreamsThatAreAway(t *testing.T) {
	for what, most := range map[string]int{"dead": 5, "slow": 6, "lying": 5} {
		t.Run(what, func(t *testing.T) {
			u := underWeather(t, func(c *host.Config) { c.Breaker.MaxWait = 10 * time.Second })
			pid := u.Status().PID
			u.turns(what)
			if n := u.opens(); n > most {
				t.Errorf("it took %d calls to open, want %d at most", n, most)
			}
			began, made := time.Now(), made(u)
			for time.Since(began) < 2*time.Second {
				at := time.Now()
				err := u.call()
				if plugins.ClassOf(err) != plugins.Unavailable {
					t.Fatalf("a call: %v, want Unavailable", err)
				}
				if took := time.Since(at); errors.Is(err, plugins.ErrBreakerOpen) && took > 500*time.Millisecond {
					t.Errorf("a refusal took %s", took)
				}
			}
			if n := madeSince(u, made); n > 10 {
				t.Errorf("%d calls were made in two seconds", n)
			}
			status := u.Status()
			if status.Breaker.Opened != 1 || status.Breaker.Refused == 0 || status.PID != pid {
				t.Errorf("status %+v, want one opening, refusals, and process %d", status, pid)
			}
			u.turns("fine")
			u.recovers()
			if status := u.Status(); status.PID != pid || status.Breaker.Opened != 1 {
				t.Errorf("status %+v, want process %d, and one opening", status, pid)
			}
		})
	}
}

// made counts the calls that were not refused.
func made(u *under) uint64 {
	s := u.Status()
	return s.Calls - s.Breaker.Refused
}

func madeSince(u *under, before uint64) uint64 { return made(u) - before }

func TestUpstreamThatLosesCalls(t *testing.T) {
	u := underWeather(t, func(*host.Config) {})
	u.turns("lossy")
	good := 0
	const asked = 100
	for range asked {
		if u.call() == nil {
			good++
		}
	}
	status := u.Status()
	if good != asked || status.Retries == 0 || status.Breaker.FailureRate < 0.1 || status.Breaker.Opened != 0 {
		t.Errorf("%d of %d calls served; status %+v", good, asked, status)
	}
}

// Who is told to come back later does, and so do all others.
func TestUpstreamThatThrottles(t *testing.T) {
	u := underWeather(t, func(*host.Config) {})
	u.turns("throttled")
	if err := u.call(); plugins.ClassOf(err) != plugins.Unavailable {
		t.Fatalf("got %v, want Unavailable", err)
	}
	asked, before := time.Now(), made(u)
	u.turns("fine")
	for {
		err := u.call()
		since := time.Since(asked)
		if since >= 1500*time.Millisecond {
			break
		}
		var e *plugins.Error
		if !errors.Is(err, plugins.ErrThrottled) || !errors.As(err, &e) || e.RetryAfter < 1400*time.Millisecond-since {
			if time.Since(asked) < 1400*time.Millisecond { // the call's own time is the repeat's
				t.Fatalf("%s after it asked for 1.5s: %v", since, err)
			}
		}
	}
	if n := madeSince(u, before); n > 2 {
		t.Errorf("%d calls were made meanwhile", n)
	}
	if err := u.call(); err != nil {
		t.Errorf("when the time is over: %v", err)
	}
}

func TestUpstreamThatComesAndGoes(t *testing.T) {
	u := underWeather(t, func(*host.Config) {})
	pid := u.Status().PID
	for i := range 8 {
		u.turns([]string{"dead", "fine"}[i%2])
		for began := time.Now(); time.Since(began) < 300*time.Millisecond; {
			_ = u.call()
		}
	}
	u.turns("fine")
	u.recovers()
	if got := u.Status(); got.PID != pid {
		t.Errorf("status %+v, want process %d", got, pid)
	}
}

// Calls that fail because their process was killed do not keep others from the
// next one.
func TestDeadProcessesAreNotDeadUpstreams(t *testing.T) {
	s := plugintest.Start(t, config(t, puppetSettings{}))
	for range 3 {
		pid, before := s.Status().PID, s.Status().Calls
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				_, _ = s.Describe(ctx, "do:sleep 4s")
			})
		}
		eventually(t, "calls in flight", func() bool { return s.Status().Calls == before+20 })
		_ = unix.Kill(pid, unix.SIGKILL)
		eventually(t, "another process", func() bool { return s.Status().State == host.Up && s.Status().PID != pid })
		if got := s.Status().Breaker; got.Circuit != host.Closed {
			t.Errorf("the breaker: %+v, want it closed", got)
		}
		if _, err := s.Describe(bounded(t), "memory:orders"); err != nil && !strings.Contains(err.Error(), "too many calls") {
			t.Errorf("a call of the new process: %v", err)
		}
		_ = unix.Kill(s.Status().PID, unix.SIGKILL) // ends the repeats
		wg.Wait()
		eventually(t, "the process after that", func() bool { return s.Status().State == host.Up })
	}
}
