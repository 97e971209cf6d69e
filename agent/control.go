package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/pprof"
	"runtime/trace"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/kms-agent/kms-agent/agent/kms"
)

// logLevel is what the agent logs: what its configuration says, or what an
// administrator said last.
type logLevel struct {
	level zap.AtomicLevel

	mu         sync.Mutex
	configured zapcore.Level // mu guards configured and revert
	revert     *time.Timer   // nil unless the level lasts for a time
}

// configure sets the configured level. One that an administrator set ends when
// the configuration says something else than before.
func (l *logLevel) configure(level zapcore.Level) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if level == l.configured {
		return
	}
	l.configured = level
	l.setLocked(level, 0)
}

// set is for an administrator.
func (l *logLevel) set(name string, lasts time.Duration) (previous, current string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	level := l.configured
	if name != "" {
		var known LogLevel
		if err := known.UnmarshalText([]byte(name)); err != nil {
			return "", "", fmt.Errorf("the log level %w", err)
		}
		if level, err = zapcore.ParseLevel(name); err != nil {
			return "", "", err
		}
	}
	previous = l.level.String()
	l.setLocked(level, lasts)
	return previous, l.level.String(), nil
}

func (l *logLevel) setLocked(level zapcore.Level, lasts time.Duration) {
	if l.revert != nil {
		l.revert.Stop()
		l.revert = nil
	}
	l.level.SetLevel(level)
	if lasts <= 0 {
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(lasts, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.revert == timer { // else somebody set a level meanwhile
			l.setLocked(l.configured, 0)
		}
	})
	l.revert = timer
}

func (l *logLevel) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.revert != nil {
		l.revert.Stop()
		l.revert = nil
	}
}

// UseLevel gives the agent the level of its logger to change: by configuration
// and by administrators. Call it before Run.
func (a *Agent) UseLevel(level zap.AtomicLevel) {
	a.level.level, a.level.configured = level, level.Level()
}

// SetLogLevel implements serve.Controller.
func (a *Agent) SetLogLevel(level string, lasts time.Duration) (previous, current string, err error) {
	previous, current, err = a.level.set(level, lasts)
	if err == nil {
		a.logger.Warn("log level set by an administrator", zap.String("previous", previous), zap.String("level", current), zap.Duration("lasts", lasts))
	}
	return previous, current, err
}

// RestartPlugin implements serve.Controller.
func (a *Agent) RestartPlugin(ctx context.Context, name string) (pid int, err error) {
	a.mu.Lock()
	b := a.backends[name]
	a.mu.Unlock()
	if b == nil {
		return 0, &kms.Error{Reason: kms.ReasonInvalidRequest, Message: fmt.Sprintf("there is no backend %.64q; kms-agent plugin list shows them", name)}
	}
	if err := b.supervisor.Replace(ctx); err != nil {
		return 0, &kms.Error{
			Reason: kms.ReasonBackendDown, Cause: err,
			Message: fmt.Sprintf("a new process of backend %q does not work, and the old one goes on if it runs: %v", name, err),
		}
	}
	return b.supervisor.Status().PID, nil
}

const maxProfile = 20 * time.Second

// Profile implements serve.Controller.
func (a *Agent) Profile(ctx context.Context, name string, d time.Duration, to io.Writer) error {
	begin, end := pprof.StartCPUProfile, pprof.StopCPUProfile
	switch name {
	case "cpu":
	case "trace":
		begin, end = trace.Start, trace.Stop
	case "heap", "allocs", "goroutine", "threadcreate", "block", "mutex":
		if d != 0 {
			return fmt.Errorf("the profile %s takes no time; leave the duration out", name)
		}
		return pprof.Lookup(name).WriteTo(to, 0)
	default:
		return fmt.Errorf("the profile %s", unknownWord(name, []string{"cpu", "trace", "heap", "allocs", "goroutine", "threadcreate", "block", "mutex"}))
	}
	if d <= 0 || d > maxProfile || d > a.longestSilence() {
		return fmt.Errorf("the profile %s takes a duration of more than zero and at most %v", name, min(maxProfile, a.longestSilence()))
	}
	if err := begin(to); err != nil {
		return errors.New("another profile is being taken; wait for its end")
	}
	defer end()
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// longestSilence is how long a stream may stand still before its door ends it,
// with time left to answer.
func (a *Agent) longestSilence() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cfg.Limits.MaxDeadline * 3 / 4
}
