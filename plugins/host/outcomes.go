package host

import (
	"context"
	"errors"
	"sync"

	"github.com/kms-agent/kms-agent/plugins"
)

const (
	// maxOverruns and maxInternals are how many calls in a row may have no
	// answer in time, or a broken one, before the process is replaced.
	maxOverruns  = 3
	maxInternals = 5
)

// outcomes judge a process by its answers.
type outcomes struct {
	changed chan struct{} // one place: there is something new

	mu        sync.Mutex
	overruns  int // mu guards overruns and what follows: in a row
	internals int
	calls     uint64
	last      error // of the last call, where it speaks against process or upstream
	broken    error // why the process must be replaced
}

func newOutcomes() outcomes { return outcomes{changed: make(chan struct{}, 1)} }

// note takes the outcome of one call. overrun tells that it was given its time
// and had no answer.
func (o *outcomes) note(err error, overrun bool) {
	if errors.Is(err, context.Canceled) || !overrun && errors.Is(err, context.DeadlineExceeded) {
		return // the caller's own end says nothing of the process
	}
	o.mu.Lock()
	before, beforeBroken := o.last, o.broken
	o.calls++
	o.judge(err, overrun)
	news := (before == nil) != (o.last == nil) || o.broken != beforeBroken //nolint:errorlint // the same value is meant
	o.mu.Unlock()
	if news {
		select {
		case o.changed <- struct{}{}:
		default:
		}
	}
}

func (o *outcomes) judge(err error, overrun bool) {
	o.last = nil
	if isFailure(err) {
		o.last = err
	}
	switch {
	case overrun:
		o.overruns++
	case plugins.ClassOf(err) == plugins.Internal:
		o.internals, o.overruns = o.internals+1, 0
	default:
		o.internals, o.overruns = 0, 0
	}
	switch {
	case o.broken != nil:
	case o.overruns >= maxOverruns:
		o.broken = plugins.Errorf(plugins.Unavailable, "%d calls in a row had no answer in time", o.overruns)
	case o.internals >= maxInternals:
		o.broken = plugins.Errorf(plugins.Internal, "%d answers in a row were broken, the last: %w", o.internals, err)
	}
}

// verdict returns how many calls there were, what the last one says against
// the backend, and why the process must be replaced.
func (o *outcomes) verdict() (calls uint64, last, broken error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.calls, o.last, o.broken
}

// isFailure tells errors of the backend from its answers about keys and
// requests.
func isFailure(err error) bool {
	switch plugins.ClassOf(err) {
	case plugins.Unavailable, plugins.Unauthenticated, plugins.Internal:
		return true
	default:
		return false
	}
}
