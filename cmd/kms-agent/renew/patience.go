package renew

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kms-agent/kms-agent/client"
)

// The time between two attempts where the agent does not say how long.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 5 * time.Second
)

// errLeft is a file that was given up because the run ends.
var errLeft = errors.New("the run was ended")

// patience repeats calls while the agent, or a backend behind it, cannot answer
// yet, and knows when to stop.
type patience struct {
	most     time.Duration
	progress *Progress

	mu sync.Mutex // guards what follows
	// outages has since when the agent ("") or some wrapping keys do not answer.
	outages map[string]time.Time
	// until is when the next call of anybody may be made: the agent has asked for
	// that.
	until time.Time
}

func newPatience(most time.Duration, p *Progress) *patience {
	return &patience{most: most, progress: p, outages: map[string]time.Time{}}
}

// call does something until it succeeds or fails for good. What only concerns
// the wrapping keys behind group fails the file when it has lasted too long;
// what concerns the agent is a *StoppedError then. When ctx ends, waiting ends
// with errLeft; an attempt under way does not.
func (p *patience) call(ctx context.Context, group string, do func() error) error {
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		if wait := p.asked(); wait > 0 && !pauseFor(ctx, wait) {
			return errLeft
		}
		err := do()
		at, again := judge(err, group)
		if !again {
			p.answered(group, err)
			return err
		}
		wait, ok := p.bear(at, err, pause)
		switch {
		case !ok && at == "":
			return &StoppedError{err}
		case !ok:
			return err
		}
		p.waitingFor(err)
		if !pauseFor(ctx, wait) {
			return errLeft
		}
	}
}

// judge tells whether an error may pass, and whose it is: the agent's, "", or
// that of the group.
func judge(err error, group string) (at string, again bool) {
	var e *client.Error
	if !errors.As(err, &e) {
		return "", false
	}
	switch e.Reason {
	case client.ErrTooManyRequests, client.ErrQuotaUnavailable, client.ErrAuditUnavailable, client.ErrShuttingDown, client.ErrCallerUnidentified:
		return "", true
	case client.ErrQuotaExceeded:
		return "", e.RetryAfter > 0 // else no wait helps this one
	case client.ErrBackendUnavailable, client.ErrBackendBroken, client.ErrKeySuspended, client.ErrDeadlineExceeded:
		return group, true
	case "":
		if e.Code == codes.DeadlineExceeded {
			return group, true
		}
		return "", e.Code == codes.Unavailable
	default:
		return "", false
	}
}

// asked is how long the agent has asked to be left in peace.
func (p *patience) asked() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Until(p.until)
}

// bear tells how long to wait now, and whether to wait at all.
func (p *patience) bear(at string, err error, pause time.Duration) (time.Duration, bool) {
	wait := pause/2 + rand.N(pause/2+1) //nolint:gosec // jitter
	var e *client.Error
	if errors.As(err, &e) && e.RetryAfter > 0 {
		wait = e.RetryAfter + rand.N(e.RetryAfter/8+1) //nolint:gosec // jitter
	}
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	since, known := p.outages[at]
	if !known {
		since = now
		p.outages[at] = now
	}
	if now.Add(wait).Sub(since) > p.most {
		return 0, false
	}
	if until := now.Add(wait); at == "" && e != nil && e.RetryAfter > 0 && until.After(p.until) {
		p.until = until
	}
	return wait, true
}

// answered ends the outages that an answer proves over: any answer that of the
// agent, a good one that of the group.
func (p *patience) answered(group string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.outages, "")
	if err == nil {
		delete(p.outages, group)
	}
	p.progress.waiting.Store(nil)
}

// waitingFor tells whoever looks.
func (p *patience) waitingFor(err error) {
	var e *client.Error
	if errors.As(err, &e) {
		text := reasonOf(e)
		p.progress.waiting.Store(&text)
	}
}

// pauseFor waits, unless ctx ends.
func pauseFor(ctx context.Context, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
