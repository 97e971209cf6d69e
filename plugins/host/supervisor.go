// Package host keeps backend processes alive.
package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/kms-agent/kms-agent/plugins"
)

const (
	// drainTimeout is how long calls in flight may go on when Run ends.
	drainTimeout = 5 * time.Second
	// idleChecks is how many pings of an idle process there are for one Check.
	idleChecks = 6
)

// Supervisor runs the process of one backend and replaces it when it dies,
// hangs or gives broken answers. It is a plugins.Backend that stays the same
// meanwhile and is safe for concurrent use: calls without a running process
// are Unavailable at once.
type Supervisor struct {
	cfg             Config
	queue           *queue
	breaker         *breaker
	retries         *budget
	turns           chan struct{} // one place: the breaker has turned
	running         atomic.Bool
	program         program // Run's own
	calls, failures atomic.Uint64
	seesContext     atomic.Pointer[bool] // whether the process that was started last has plugins.CapabilityContext
	firstUp         chan struct{}
	unfit           chan struct{} // the program is not the one that is configured
	asked           chan *request // for a new process
	ended           chan struct{} // Run has returned

	mu      sync.Mutex
	status  Status    // mu guards status and what follows; its counters are elsewhere
	current *process  // nil while calls are refused
	next    time.Time // when a process will be started
}

// New checks the configuration. Run starts the process.
func New(cfg Config) (*Supervisor, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("plugin %q: %w", cfg.Name, err)
	}
	cfg.Logger = cfg.Logger.With(zap.String("backend", cfg.Name))
	return &Supervisor{
		cfg: cfg, program: program{cfg: cfg}, queue: newQueue(cfg.MaxConcurrent), firstUp: make(chan struct{}), unfit: make(chan struct{}),
		breaker: newBreaker(cfg.Breaker, cfg.Name), retries: newBudget(), turns: make(chan struct{}, 1),
		asked: make(chan *request), ended: make(chan struct{}),
		status: Status{Name: cfg.Name, State: Starting, Since: time.Now(), SHA256: cfg.SHA256},
	}, nil
}

// Run supervises until ctx ends, and then returns its error. Calls in flight may
// end first, for up to five seconds. When Run returns, process and socket are
// gone. It is called once.
func (s *Supervisor) Run(ctx context.Context) error {
	if !s.running.CompareAndSwap(false, true) {
		return fmt.Errorf("plugin %q: Run was called already", s.cfg.Name)
	}
	if err := closeOnExec(); err != nil {
		return fmt.Errorf("plugin %q: %w", s.cfg.Name, err)
	}
	defer s.program.close()
	defer close(s.ended)
	pause := backoff{min: s.cfg.BackoffMin, max: s.cfg.BackoffMax}
	var asked *request
	for first := true; ctx.Err() == nil; first = false {
		began := time.Now()
		worked, err := s.runProcess(ctx, first, asked)
		if ctx.Err() != nil {
			break
		}
		if worked { // what ended others before says nothing of this one
			pause.anew()
		}
		wait := pause.after(time.Since(began))
		s.down(err, wait)
		if errors.Is(err, errProgram) {
			closeOnce(s.unfit)
		}
		s.cfg.Logger.Error("plugin is down", zap.Error(err), zap.Duration("next_start", wait))
		asked = s.rest(ctx, wait)
	}
	s.down(nil, 0)
	return ctx.Err()
}

// rest waits for the time of the next start, or for somebody who asks for one.
func (s *Supervisor) rest(ctx context.Context, wait time.Duration) *request {
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	case asked := <-s.asked:
		return asked
	}
	return nil
}

// runProcess runs one process, and those that replace it while it works, to the
// end. It returns why the last ended, and whether that had wrapped or unwrapped.
func (s *Supervisor) runProcess(ctx context.Context, first bool, asked *request) (worked bool, _ error) {
	s.change(func(status *Status) {
		status.State = Starting
		if !first {
			status.Restarts++
		}
	})
	p, err := launch(ctx, s.cfg, &s.program)
	if err != nil {
		asked.answer(err)
		return false, err
	}
	s.started(p)
	asked.answer(nil)
	for {
		asked, err = s.watch(ctx, p)
		if asked == nil {
			break
		}
		p = s.replaced(ctx, p, asked)
	}
	s.mu.Lock()
	s.current = nil
	s.mu.Unlock()
	if err == nil {
		s.drain(p)
	}
	stopped := p.stop(err == nil)
	if _, _, broken := p.verdict(); err != nil && broken == nil {
		s.turned(s.breaker.lost()) // what was under way failed of that alone
	}
	return p.worked.Load(), errors.Join(err, stopped)
}

// install gives the calls to p.
func (s *Supervisor) install(p *process) {
	s.mu.Lock()
	s.current = p
	s.mu.Unlock()
	s.change(func(status *Status) {
		status.PID, status.Plugin, status.Confined = p.runner.processID(), p.info, p.confined
	})
	_, fault, _ := p.verdict()
	s.breaker.renewed(fault)
	s.judged(cmp.Or(fault, s.breaker.fault()))
}

// judged sets the state of a running process.
func (s *Supervisor) judged(fault error) {
	s.change(func(status *Status) {
		if status.State = Up; fault != nil {
			status.State, status.LastError = Degraded, fault.Error()
		}
	})
	if fault != nil {
		return
	}
	closeOnce(s.firstUp)
}

// closeOnce closes a channel that only Run's goroutine closes.
func closeOnce(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

// watch returns nil when ctx ends, else who asks for another process, or why p
// must be replaced.
func (s *Supervisor) watch(ctx context.Context, p *process) (*request, error) {
	tick := time.NewTicker(s.cfg.PingInterval)
	defer tick.Stop()
	idle := idleness{}
	// What was told, not what is: calls have come in since.
	for degraded := s.Status().State == Degraded; ; {
		select {
		case <-ctx.Done():
			return nil, nil
		case <-p.runner.ended:
			return nil, fmt.Errorf("the process ended: %w", p.runner.end())
		case asked := <-s.asked:
			return asked, nil
		case <-p.changed:
		case <-s.turns:
		case <-s.breaker.probeDue():
			s.probe(ctx, p)
		case <-tick.C:
			if asked := s.unreachable(p); asked != nil {
				return asked, nil
			}
			if err := s.ping(ctx, p); err != nil {
				return nil, err
			}
			if calls, _, _ := p.verdict(); idle.wantsCheck(calls, degraded) && s.breaker.fault() == nil {
				s.checkIdle(ctx, p)
			}
		}
		_, last, broken := p.verdict()
		if broken != nil {
			return nil, fmt.Errorf("the process is broken: %w", broken)
		}
		if fault := cmp.Or(last, s.breaker.fault()); degraded != (fault != nil) {
			degraded = fault != nil
			s.judged(fault)
		}
	}
}

// idleness tells when an idle process is asked how its backend is: always while it
// is not known to be well, now and then otherwise.
type idleness struct {
	calls uint64
	pings int // without a call
}

func (r *idleness) wantsCheck(calls uint64, degraded bool) bool {
	if r.pings++; calls != r.calls {
		r.calls, r.pings = calls, 0
	}
	return r.pings > 0 && (degraded || r.pings%idleChecks == 0)
}

// ping returns an error where the process does not answer.
func (s *Supervisor) ping(ctx context.Context, p *process) error {
	bounded, cancel := context.WithTimeout(ctx, s.cfg.PingInterval)
	defer cancel()
	if err := p.remote.Ping(bounded); err != nil && ctx.Err() == nil {
		return fmt.Errorf("the process does not answer: %w", err)
	}
	return nil
}

// checkIdle asks the backend how it is, where there is no traffic to tell.
func (s *Supervisor) checkIdle(ctx context.Context, p *process) {
	bounded, cancel := context.WithTimeout(ctx, s.cfg.CallTimeout)
	defer cancel()
	_, err := p.remote.Check(bounded)
	if ctx.Err() == nil {
		p.noteCheck(err, errors.Is(err, context.DeadlineExceeded))
	}
}

// probe asks the backend how it is, where no calls are made that would tell.
func (s *Supervisor) probe(ctx context.Context, p *process) {
	bounded, cancel := context.WithTimeout(ctx, s.cfg.CallTimeout)
	defer cancel()
	began := time.Now()
	_, err := p.remote.Check(bounded)
	if ctx.Err() != nil || p.gone() {
		return
	}
	p.noteCheck(err, errors.Is(err, context.DeadlineExceeded))
	if took := time.Since(began); err == nil && took >= s.cfg.Breaker.Slow {
		err = plugins.Errorf(plugins.Unavailable, "it took %s", took.Round(time.Millisecond))
	}
	s.breaker.checked(err)
}

// turned draws the consequences of a turn of the breaker; nil is none.
func (s *Supervisor) turned(t *turn) {
	if t == nil {
		return
	}
	switch {
	case t.to == Closed:
		s.cfg.Logger.Info("breaker closed: the backend is called again", zap.Duration("lasted", t.wait), zap.Uint64("refused", t.refused))
	case !t.again:
		s.cfg.Logger.Error("breaker opened: calls fail at once until the backend is well", zap.String("cause", t.why), zap.Duration("next_check", t.wait))
	}
	if t.to == Open {
		s.breaker.refusedMore(s.queue.flush(t.generation, t.refusal))
	}
	select {
	case s.turns <- struct{}{}:
	default:
	}
}

// drain waits for the calls that p still serves; it gets no more.
func (s *Supervisor) drain(p *process) {
	t := time.NewTimer(min(drainTimeout, s.cfg.CallTimeout))
	defer t.Stop()
	select {
	case <-p.idle():
	case <-p.runner.ended:
	case <-t.C:
	}
}

// down says that there is no process and when there will be one.
func (s *Supervisor) down(fault error, wait time.Duration) {
	s.mu.Lock()
	s.next = time.Now().Add(wait)
	s.mu.Unlock()
	s.change(func(status *Status) {
		status.State, status.PID = Down, 0
		if fault != nil {
			status.LastError = fault.Error()
		}
	})
}

// change changes the status and tells it. Only Run's goroutine calls it.
func (s *Supervisor) change(apply func(*Status)) {
	s.mu.Lock()
	before := s.status.State
	apply(&s.status)
	changed := s.status.State != before
	if changed {
		s.status.Since = time.Now()
	}
	s.mu.Unlock()
	if changed && s.cfg.OnState != nil {
		s.cfg.OnState(s.Status())
	}
}

// available returns an error where no process serves calls.
func (s *Supervisor) available() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.availableLocked()
}

// serving returns the process that serves calls, with one more call in flight.
func (s *Supervisor) serving() (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.availableLocked(); err != nil {
		return nil, err
	}
	s.current.serving.Add(1)
	return s.current, nil
}

func (s *Supervisor) availableLocked() error {
	if s.current != nil {
		return nil
	}
	e := &plugins.Error{
		Class: plugins.Unavailable, RetryAfter: max(time.Until(s.next), 0) + s.cfg.BackoffMin/5, // and a start
		Detail: fmt.Sprintf("the plugin of backend %s is %s", s.cfg.Name, s.status.State),
	}
	if s.status.LastError != "" {
		e.Detail += ", last error: " + s.status.LastError
	}
	return e
}

// Ready returns nil once the backend was up. It returns an error with the cause
// of the last failed start when ctx ends first, or at once where the program is not
// the one that is configured.
func (s *Supervisor) Ready(ctx context.Context) error {
	select {
	case <-s.firstUp:
	case <-s.unfit:
	case <-ctx.Done():
	}
	select {
	case <-s.firstUp: // it may be both: the program was put right
		return nil
	default:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if ctx.Err() == nil {
		return fmt.Errorf("plugin %q is %s: %s", s.cfg.Name, s.status.State, s.status.LastError)
	}
	if s.status.LastError != "" {
		return fmt.Errorf("plugin %q is %s: %s: %w", s.cfg.Name, s.status.State, s.status.LastError, ctx.Err())
	}
	return fmt.Errorf("plugin %q is still %s: %w", s.cfg.Name, s.status.State, ctx.Err())
}

// Status tells the state of the process.
func (s *Supervisor) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	status := s.status
	status.Calls, status.Failures, status.Retries = s.calls.Load(), s.failures.Load(), s.retries.spent.Load()
	status.Breaker = s.breaker.status()
	return status
}
