package host

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/kms-agent/kms-agent/plugins"
)

// request asks Run for a new process; done has room for the one answer.
type request struct{ done chan error }

// Replace starts a new process, which must open the backend and be well, if the old one
// is, before the calls go to it, and then ends the old one when its calls are done. On an
// error the old process, if there is one, goes on. Without a process it ends the
// wait for the next start.
func (s *Supervisor) Replace(ctx context.Context) error {
	r := &request{done: make(chan error, 1)}
	select {
	case s.asked <- r:
	case <-ctx.Done():
		return fmt.Errorf("plugin %q: %w", s.cfg.Name, ctx.Err())
	case <-s.ended:
		return s.stopped()
	}
	select {
	case err := <-r.done:
		return err
	case <-s.ended: // Run took the request and ended before it could start a process
		select {
		case err := <-r.done:
			return err
		default:
			return s.stopped()
		}
	case <-ctx.Done():
		return fmt.Errorf("plugin %q: the new process is not ready yet: %w", s.cfg.Name, ctx.Err())
	}
}

func (s *Supervisor) stopped() error { return fmt.Errorf("plugin %q is stopped", s.cfg.Name) }

// answer tells those who asked for a process how its start went.
func (r *request) answer(err error) {
	if r != nil {
		r.done <- err
	}
}

// replaced starts a process beside p and gives it the calls. It returns p where
// that fails.
func (s *Supervisor) replaced(ctx context.Context, p *process, asked *request) *process {
	next, err := launch(ctx, s.cfg, &s.program)
	if err == nil {
		err = s.unworthy(ctx, p, next)
	}
	if err != nil {
		s.cfg.Logger.Error("new plugin process does not work; the old one goes on", zap.Error(err))
		asked.answer(err)
		return p
	}
	s.change(func(status *Status) { status.Restarts++ })
	s.breaker.release()
	s.started(next)
	asked.answer(nil)
	s.drain(p)
	if err := p.stop(true); err != nil {
		s.cfg.Logger.Warn("old plugin process did not end well", zap.Error(err))
	}
	return next
}

// unreachable asks for another process where the socket of p is gone, as those who
// clear up old files leave it. The connection holds, but could not be made again.
func (s *Supervisor) unreachable(p *process) *request {
	if p.runner.reachable() || time.Now().Before(p.nextMove) {
		return nil
	}
	p.nextMove = time.Now().Add(s.cfg.BackoffMax)
	s.cfg.Logger.Warn("socket of the plugin is gone: its process is replaced")
	return &request{done: make(chan error, 1)}
}

// unworthy ends a new process whose backend is not well while that of p is, as with a
// password that was changed to a wrong one: it returns why.
func (s *Supervisor) unworthy(ctx context.Context, p, next *process) error {
	_, fault, _ := next.verdict()
	if fault == nil {
		return nil
	}
	s.checkIdle(ctx, p) // what it was when it was asked last may be past
	if _, own, _ := p.verdict(); own != nil {
		return nil //nolint:nilerr // neither is well
	}
	return errors.Join(fmt.Errorf("the new process is not well, and the old one is: %w", fault), next.stop(true))
}

// started gives the calls to a process that has just been launched.
func (s *Supervisor) started(p *process) {
	s.cfg.Logger.Info("plugin started", zap.Int("pid", p.runner.processID()), zap.String("plugin", p.info.Name),
		zap.String("version", p.info.Version), zap.String("fips140", p.info.FIPS140))
	if !p.confined && s.cfg.Confine == ConfineWhereKnown {
		s.cfg.Logger.Warn("plugin is not confined: the kernel has no Landlock")
	}
	s.seesContext.Store(new(p.info.Gives(plugins.CapabilityContext)))
	s.install(p)
}
