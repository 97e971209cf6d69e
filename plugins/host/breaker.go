package host

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/kms-agent/kms-agent/plugins"
)

// Defaults of Breaker.
const (
	DefaultBreakerFailures = 5
	DefaultBreakerRate     = 0.6
	DefaultBreakerMaxWait  = 10 * time.Second
	// slowShare is the part of CallTimeout after which a call is slow.
	slowShare = 4
)

const (
	// minRated is how many calls of the window there must be for a rate.
	minRated = 40
	// Where more than lossyRate of at least minLossy calls failed before a run of
	// failures, and not most of them, chance alone makes runs: then they must be
	// lossyRun times as long to mean something.
	lossyRate, minLossy, lossyRun = 0.1, 10, 4
	// trials is how many calls must succeed, one after another, before all may come;
	// maxUndecided is how many may end without a word on the backend meanwhile.
	trials, maxUndecided = 3, 8
	// minProbeWait is the first wait before the backend is asked how it is.
	minProbeWait = 250 * time.Millisecond
	// trialPatience is how long calls wait for another's trial, which takes a moment as a rule.
	trialPatience = 250 * time.Millisecond
	// probeTime is added to when a call may come again: the probe takes time, too.
	probeTime = 50 * time.Millisecond
	// excuse is how long before a process dies its calls may fail because of that.
	excuse = time.Second
)

// Circuit is the state of a backend's breaker.
type Circuit string

// The states of a breaker.
const (
	// Closed: calls are made.
	Closed Circuit = "closed"
	// Open: calls fail at once. The backend is asked by Check how it is.
	Open Circuit = "open"
	// HalfOpen: Check was well, and calls are let through one at a time.
	HalfOpen Circuit = "half-open"
)

// Breaker says when a backend gets no calls for a while. The zero value is the
// defaults.
type Breaker struct {
	// Failures is how many failures in a row open it.
	Failures int
	// Rate is the share of failures among the calls of ten seconds, of which there
	// must be 40, that opens it: more than 0 and at most 1.
	Rate float64
	// Slow is how long a call may take before it counts as a failure, though its
	// answer is used; a quarter of CallTimeout by default.
	Slow time.Duration
	// MaxWait bounds the wait between two questions whether the backend is back.
	MaxWait time.Duration
}

func (b Breaker) withDefaults(callTimeout time.Duration) Breaker {
	orDefault(&b.Failures, DefaultBreakerFailures)
	orDefault(&b.Rate, DefaultBreakerRate)
	orDefault(&b.Slow, callTimeout/slowShare)
	orDefault(&b.MaxWait, DefaultBreakerMaxWait)
	return b
}

func (b Breaker) check() error {
	if b.Failures < 0 || b.Rate <= 0 || b.Rate > 1 || b.Slow < 0 || b.MaxWait < minProbeWait {
		return fmt.Errorf("the breaker %+v: failures and slow are positive, the rate is more than 0 and at most 1, the longest wait is at least %s", b, minProbeWait)
	}
	return nil
}

// verdict is what the end of a call says of the backend.
type verdict uint8

const (
	// undecided: nothing; its caller left, or it was never made.
	undecided verdict = iota
	// answered: the backend works, whatever it answered.
	answered
	// aside: it has answered, of one key that it cannot serve. So it is there; whether
	// it serves others is not said.
	aside
	// slow: its answer came, or its caller left, when it had taken too long.
	slow
	// failed: the backend was not reached, gave no answer, or a broken one.
	failed
)

// ticket is the leave to make one call. What a call says counts only in the
// generation that it was let through in.
type ticket struct {
	generation uint64
	trial      bool
}

// turn is that a breaker opened or closed.
type turn struct {
	to         Circuit
	generation uint64
	refusal    error // to: Open; for those who wait
	again      bool  // it was half-open
	why        string
	// wait is the time until the first probe, or how long it was not closed.
	wait    time.Duration
	refused uint64
}

// breaker keeps calls from a backend that cannot serve them: they fail at once
// instead of after their time, and the backend is given time. It is safe for
// concurrent use.
type breaker struct {
	cfg  Breaker
	name string

	mu         sync.Mutex
	circuit    Circuit // mu guards circuit and what follows
	generation uint64  // grows when the breaker opens, and when it is half-open
	since      time.Time
	window     window
	run        int       // failures in a row
	bad        int       // calls in a row that failed or were slow, also those not in run
	slowUntil  time.Time // the end of the last slow call in run
	pause      backoff
	due        time.Time // Open: when the backend is asked
	held       time.Time // the backend wants no call before
	why        string
	trial      chan struct{} // HalfOpen: closed when the call that is under way has ended; else nil
	passed     int           // HalfOpen: calls that were answered, or aside, and
	unclear    int           // those that were undecided

	refused, opened uint64
	refusedBefore   uint64 // it opened
}

func newBreaker(cfg Breaker, name string) *breaker {
	return &breaker{
		cfg: cfg, name: name, circuit: Closed, since: time.Now(), window: window{start: time.Now()},
		pause: backoff{min: minProbeWait, max: cfg.MaxWait},
	}
}

// admit lets a call through, or says when it may come again: at once, but for a moment's
// wait where another call tries how the backend is. settle follows where the error is nil.
func (b *breaker) admit(ctx context.Context) (ticket, error) {
	var over <-chan time.Time
	for {
		t, trial, err := b.admitNow()
		if trial == nil {
			return t, err
		}
		if over == nil {
			timer := time.NewTimer(trialPatience)
			defer timer.Stop()
			over = timer.C
		}
		select {
		case <-trial:
			continue
		case <-over:
		case <-ctx.Done():
		}
		b.refusedMore(1)
		return ticket{}, err
	}
}

// admitNow returns the end of another's trial with the refusal that is because of it.
func (b *breaker) admitNow() (t ticket, trial <-chan struct{}, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.circuit == Open:
		b.refused++
		return ticket{}, nil, b.refusalLocked(time.Until(b.due), plugins.ErrBreakerOpen)
	case !b.held.IsZero() && time.Now().Before(b.held):
		b.refused++
		return ticket{}, nil, b.refusalLocked(time.Until(b.held), plugins.ErrThrottled)
	case b.circuit != HalfOpen:
		return ticket{generation: b.generation}, nil, nil
	case b.trial != nil:
		return ticket{}, b.trial, b.refusalLocked(0, plugins.ErrBreakerOpen)
	}
	b.trial = make(chan struct{})
	return ticket{generation: b.generation, trial: true}, nil, nil
}

// refusalLocked has a little chance in it: who comes back should not do so at the
// same time as all the others.
func (b *breaker) refusalLocked(wait time.Duration, sentinel error) error {
	wait = max(wait, 0) + probeTime
	return &plugins.Error{
		Class: plugins.Unavailable, RetryAfter: wait + rand.N(wait/10+probeTime), //nolint:gosec // jitter
		Detail: "backend " + b.name + ": " + b.why, Err: sentinel,
	}
}

// refusedMore counts calls that were let through and did not get to the backend.
func (b *breaker) refusedMore(calls int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refused += uint64(calls)
}

// settle takes what a call that admit let through says of the backend: it began
// then, and has ended now with err.
func (b *breaker) settle(t ticket, v verdict, began time.Time, err error) *turn {
	b.mu.Lock()
	defer b.mu.Unlock()
	if v == failed {
		b.holdLocked(err)
	}
	switch {
	case t.generation != b.generation:
		return nil // it began in other times
	case t.trial:
		return b.triedLocked(v, err)
	case v == undecided, v == aside:
		return nil
	}
	now := time.Now()
	b.window.add(now, v != answered)
	b.bad++
	switch v {
	case answered:
		b.run, b.bad = 0, 0
		return nil
	case slow:
		// All that are under way when this host stalls are slow at once: that is one
		// sign and not many.
		if began.Before(b.slowUntil) {
			break
		}
		b.run, b.slowUntil = b.run+1, now
	default:
		b.run++
	}
	if why := b.reasonLocked(); why != "" {
		return b.openLocked(now, why+lastFailure(v, err))
	}
	return nil
}

// reasonLocked says why the breaker must open, if it must.
func (b *breaker) reasonLocked() string {
	all := b.window.sum
	enough := b.cfg.Failures
	before := tally{max(all.calls-b.bad, 0), max(all.failures-b.bad, 0)}
	if before.calls >= minLossy && before.rate() > lossyRate && before.rate() < b.cfg.Rate {
		enough *= lossyRun
	}
	switch {
	case b.run >= enough:
		return fmt.Sprintf("%d calls in a row failed or were slow", b.run)
	case all.calls >= minRated && all.rate() >= b.cfg.Rate:
		return fmt.Sprintf("%.0f%% of %d calls failed or were slow", 100*all.rate(), all.calls)
	}
	return ""
}

func lastFailure(v verdict, err error) string {
	if v == slow {
		return ", the last was slow"
	}
	return ", the last: " + plugins.Printable(err.Error(), maxCause)
}

// holdLocked obeys a backend that asks to be left alone.
func (b *breaker) holdLocked(err error) {
	var e *plugins.Error
	if !errors.As(err, &e) || e.Class != plugins.Unavailable || e.RetryAfter <= 0 {
		return
	}
	if until := time.Now().Add(e.RetryAfter); until.After(b.held) {
		b.held = until
		if b.circuit == Closed {
			b.why = "it has asked for patience"
		}
	}
}

// triedLocked takes how a call in the half-open state went. Those that say nothing
// must not keep it in that state for ever. Nor must one key that is ill: that the backend
// tells of it is an answer.
func (b *breaker) triedLocked(v verdict, err error) *turn {
	close(b.trial)
	b.trial = nil
	switch v {
	case failed, slow:
		return b.openLocked(time.Now(), "it answers Check, but not calls"+lastFailure(v, err))
	case answered, aside:
		b.passed++
	default:
		b.unclear++
	}
	if b.passed < trials && b.unclear < maxUndecided {
		return nil
	}
	return b.closeLocked()
}

// openLocked begins, or goes on with, the time in which no call is made.
func (b *breaker) openLocked(now time.Time, why string) *turn {
	was, ran := b.circuit, time.Duration(0)
	if was == Closed {
		ran = now.Sub(b.since)
		b.since, b.refusedBefore = now, b.refused
		b.opened++
	}
	b.circuit, b.why, b.run, b.bad = Open, why, 0, 0
	b.generation++
	b.due = now.Add(b.pause.after(ran))
	if b.held.After(b.due) {
		b.due = b.held
	}
	t := &turn{to: Open, generation: b.generation, again: was == HalfOpen, why: why, wait: b.due.Sub(now)}
	t.refusal = &plugins.Error{
		Class: plugins.Unavailable, RetryAfter: t.wait + probeTime, Detail: "backend " + b.name + ": " + why, Err: plugins.ErrBreakerOpen,
	}
	return t
}

func (b *breaker) closeLocked() *turn {
	now := time.Now()
	t := &turn{to: Closed, wait: now.Sub(b.since), refused: b.refused - b.refusedBefore}
	b.circuit, b.since, b.run, b.bad, b.window = Closed, now, 0, 0, window{start: now}
	return t
}

// probeDue returns a channel that tells when the backend is to be asked how it
// is; nil where it is not.
func (b *breaker) probeDue() <-chan time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.circuit != Open {
		return nil
	}
	return time.After(time.Until(b.due))
}

// checked takes what the backend said of itself: well enough for a trial, or not.
func (b *breaker) checked(fault error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.circuit != Open:
	case fault != nil:
		b.holdLocked(fault)
		b.due = time.Now().Add(b.pause.after(0))
		if b.held.After(b.due) {
			b.due = b.held
		}
		b.why = "Check: " + plugins.Printable(fault.Error(), maxCause)
	default:
		b.circuit, b.passed, b.unclear = HalfOpen, 0, 0
		b.generation++
	}
}

// renewed takes what the first Check of another process said: a good word is as
// good as one that was asked for.
func (b *breaker) renewed(fault error) {
	if fault == nil {
		b.checked(nil)
	}
}

// lost takes that the process died: what its last calls said was about that, and
// not about what is behind it.
func (b *breaker) lost() *turn {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.run, b.bad = 0, 0
	if b.circuit != Open || time.Since(b.since) > excuse {
		return nil
	}
	b.generation++
	return b.closeLocked()
}

// release forgets that the backend asked for patience.
func (b *breaker) release() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held = time.Time{}
}

// fault says why no calls are made; nil where they are.
func (b *breaker) fault() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.circuit != Open {
		return nil
	}
	return fmt.Errorf("%w: %s", plugins.ErrBreakerOpen, b.why)
}

func (b *breaker) status() BreakerStatus {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	b.window.advance(now)
	s := BreakerStatus{
		Circuit: b.circuit, Since: b.since, Refused: b.refused, Opened: b.opened,
		FailureRate: b.window.sum.rate(),
	}
	switch {
	case b.circuit == Open:
		s.Next = b.due
	case b.held.After(now):
		s.Next = b.held
	}
	return s
}
