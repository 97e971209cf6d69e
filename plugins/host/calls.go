package host

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/kms-agent/kms-agent/plugins"
)

const (
	// retryMin and retryMax bound the wait before the one retry of a call.
	retryMin = 50 * time.Millisecond
	retryMax = time.Second
	// retryRoom is how many times the wait must be left for a retry to make sense.
	retryRoom = 2
)

// Open implements plugins.Backend. The supervisor opens each process itself,
// so that this is an error.
func (s *Supervisor) Open(context.Context, json.RawMessage) (plugins.Info, error) {
	return plugins.Info{}, plugins.Errorf(plugins.Internal, "a supervised backend is opened by its supervisor")
}

// Wrap implements plugins.Backend.
func (s *Supervisor) Wrap(ctx context.Context, key plugins.KeyRef, plaintext []byte, b plugins.Binding) ([]byte, error) {
	return call(ctx, s, wrapName, func(ctx context.Context, r *plugins.Remote) ([]byte, error) { return r.Wrap(ctx, key, plaintext, b) })
}

// WrapProven is plugins.WrapProven in one turn.
func (s *Supervisor) WrapProven(ctx context.Context, key plugins.KeyRef, plaintext []byte, b plugins.Binding) ([]byte, error) {
	return call(ctx, s, wrapName, func(ctx context.Context, r *plugins.Remote) ([]byte, error) {
		return r.WrapProven(ctx, key, plaintext, b)
	})
}

// Unwrap implements plugins.Backend.
func (s *Supervisor) Unwrap(ctx context.Context, key plugins.KeyRef, ciphertext []byte, b plugins.Binding) ([]byte, error) {
	return call(ctx, s, unwrapName, func(ctx context.Context, r *plugins.Remote) ([]byte, error) { return r.Unwrap(ctx, key, ciphertext, b) })
}

// Describe implements plugins.Backend.
func (s *Supervisor) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	return call(ctx, s, "describe", func(ctx context.Context, r *plugins.Remote) (plugins.Description, error) { return r.Describe(ctx, uri) })
}

// Check implements plugins.Backend.
func (s *Supervisor) Check(ctx context.Context) (plugins.Health, error) {
	return call(ctx, s, "check", func(ctx context.Context, r *plugins.Remote) (plugins.Health, error) { return r.Check(ctx) })
}

// Random implements plugins.RandomSource; Invalid where the plugin does not have the
// capability.
func (s *Supervisor) Random(ctx context.Context, dst []byte) error {
	_, err := call(ctx, s, "random", func(ctx context.Context, r *plugins.Remote) (struct{}, error) {
		return struct{}{}, r.Random(ctx, dst)
	})
	return err
}

// SeesContext implements plugins.ContextAware, by the word of the last process.
func (s *Supervisor) SeesContext() (sees, known bool) {
	last := s.seesContext.Load()
	return last != nil && *last, last != nil
}

// Close implements plugins.Backend; the end of Run's context ends the process.
func (s *Supervisor) Close() error { return nil }

const wrapName, unwrapName = "wrap", "unwrap"

type method[T any] func(context.Context, *plugins.Remote) (T, error)

// call makes one call and tells of it.
func call[T any](ctx context.Context, s *Supervisor, name string, m method[T]) (T, error) {
	began := time.Now()
	answer, err := try(ctx, s, name, m)
	if s.cfg.OnCall != nil {
		s.cfg.OnCall(Call{Method: name, Err: err, Caller: plugins.CallerFrom(ctx), Made: !spared(err), Took: time.Since(began)})
	}
	return answer, err
}

// try makes a call with the supervisor's deadline and, since every call is
// idempotent, repeats it once where the backend was not reached.
func try[T any](ctx context.Context, s *Supervisor, name string, m method[T]) (T, error) {
	s.calls.Add(1)
	s.retries.earn()
	bounded, cancel := context.WithTimeout(ctx, s.cfg.CallTimeout)
	defer cancel()
	answer, err := attempt(bounded, s, name, m)
	if wait, again := retryWait(bounded, err); again && s.affords(err) && sleep(bounded, wait) {
		first := err
		if answer, err = attempt(bounded, s, name, m); spared(err) && !spared(first) {
			err = later(first, err)
		}
	}
	if err == nil {
		return answer, nil
	}
	if ctx.Err() == nil && bounded.Err() != nil {
		err = s.overdue(err)
	}
	if ctx.Err() == nil && (isFailure(err) || plugins.IsKeyOnly(err)) && !spared(err) {
		s.failures.Add(1)
	}
	var none T
	return none, err
}

// spared tells errors of calls that the breaker did not let through.
func spared(err error) bool {
	return errors.Is(err, plugins.ErrBreakerOpen) || errors.Is(err, plugins.ErrThrottled)
}

// affords tells whether a call may be repeated. What never reached the backend is no
// more load on it the second time.
func (s *Supervisor) affords(err error) bool { return spared(err) || s.retries.spend() }

// later is the error of a call whose repeat was refused: what the backend said,
// with when it may be asked again.
func later(said, refused error) error {
	var first, second *plugins.Error
	if !errors.As(said, &first) || !errors.As(refused, &second) {
		return refused
	}
	e := *first
	e.RetryAfter = second.RetryAfter
	return &e
}

// overdue is the error of a call whose time is up. Its cause must not look like
// the end of the caller's own context.
func (s *Supervisor) overdue(err error) error {
	if errors.Is(err, plugins.ErrCrowded) {
		return plugins.Errorf(plugins.Unavailable, "backend %s: %w", s.cfg.Name, plugins.ErrCrowded)
	}
	return plugins.Errorf(plugins.Unavailable, "backend %s gave no answer within %s", s.cfg.Name, s.cfg.CallTimeout)
}

// attempt waits for the caller's turn and makes the call.
func attempt[T any](ctx context.Context, s *Supervisor, name string, m method[T]) (T, error) {
	var none T
	if err := s.available(); err != nil {
		return none, err
	}
	t, err := s.breaker.admit(ctx)
	if err != nil {
		return none, err
	}
	if err = s.queue.acquire(ctx, plugins.CallerFrom(ctx), t.generation); err != nil {
		s.turned(s.breaker.settle(t, undecided, time.Time{}, err))
		return none, err
	}
	defer s.queue.release()
	p, err := s.serving() // it may have been replaced while we waited
	if err != nil {
		s.turned(s.breaker.settle(t, undecided, time.Time{}, err))
		return none, err
	}
	defer p.serving.Done()
	began := time.Now()
	answer, err := m(ctx, p.remote)
	took := time.Since(began)
	patient := took >= s.cfg.CallTimeout/2
	if !patient {
		err = forTheCaller(ctx, began, err)
	}
	overrun := patient && errors.Is(err, context.DeadlineExceeded)
	p.note(err, overrun)
	said := s.verdictOn(p, err, took, overrun)
	if said == answered && err == nil && (name == wrapName || name == unwrapName) && !p.worked.Load() {
		p.worked.Store(true)
	}
	s.turned(s.breaker.settle(t, said, began, err))
	return answer, err
}

// verdictOn says what the end of a call tells of the backend.
func (s *Supervisor) verdictOn(p *process, err error, took time.Duration, overrun bool) verdict {
	left := errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
	switch {
	case err != nil && p.gone():
		return undecided // it is the process that failed, and is replaced
	case overrun, !left && isFailure(err):
		return failed
	case !left && plugins.IsKeyOnly(err): // also where it took long: so may this key alone
		return aside
	case took >= s.cfg.Breaker.Slow:
		return slow
	case left:
		return undecided
	default:
		return answered
	}
}

// forTheCaller returns err, or that ctx ended where the backend gave up because
// ctx was about to end: it does so a little earlier, to be able to answer. That
// a caller is impatient must not look like an upstream that is away.
func forTheCaller(ctx context.Context, began time.Time, err error) error {
	deadline, ok := ctx.Deadline()
	if !ok || plugins.ClassOf(err) != plugins.Unavailable || time.Until(deadline) > plugins.AnswerMargin(deadline.Sub(began)) {
		return err
	}
	<-ctx.Done()
	return &plugins.Error{Class: plugins.Unavailable, Err: ctx.Err()}
}

// retryWait tells whether a call is repeated and after how long: not where the
// backend asks for more patience than a call has, nor where the wait would eat
// most of the time that is left. An outage of one key takes no repeats from the others.
func retryWait(ctx context.Context, err error) (time.Duration, bool) {
	var e *plugins.Error
	if !errors.As(err, &e) || e.Class != plugins.Unavailable || ctx.Err() != nil || e.RetryAfter > retryMax ||
		e.KeyOnly || errors.Is(err, plugins.ErrBreakerOpen) {
		return 0, false
	}
	wait := max(e.RetryAfter, retryMin) + rand.N(retryMin) //nolint:gosec // jitter
	deadline, ok := ctx.Deadline()
	return wait, ok && time.Until(deadline) > retryRoom*wait
}

// sleep returns false where the context ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
