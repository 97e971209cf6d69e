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

// note takes the outcome of a call. overrun tells that it was given its time
// and had no answer.
func (o *outcomes) note(err error, overrun bool) {
	if errors.Is(err, context.Canceled) || !overrun && errors.Is(err, context.DeadlineExceeded) {
		return // the caller's own end says nothing of the process
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if !overrun && plugins.ClassOf(err) != plugins.Internal {
		o.overruns, o.internals = 0, 0
	}
	if !overrun && plugins.IsKeyOnly(err) {
		return // what is behind the process is as well, or as ill, as was told before
	}
	o.calls++
	o.judge(err, overrun, isFailure(err))
}

// noteCheck takes the outcome of a Check of our own: every fault counts. That
// this method works is no sign that the others do.
func (o *outcomes) noteCheck(err error, overrun bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.judge(err, overrun, err != nil)
}

// judge is called under mu.
func (o *outcomes) judge(err error, overrun, failure bool) {
	before, beforeBroken := o.last != nil, o.broken != nil
	o.last = nil
	if failure {
		o.last = err
	}
	switch {
	case overrun:
		o.overruns++
	case plugins.ClassOf(err) == plugins.Internal:
		o.internals++
	}
	switch {
	case o.broken != nil:
	case o.overruns >= maxOverruns:
		o.broken = plugins.Errorf(plugins.Unavailable, "%d calls in a row had no answer in time", o.overruns)
	case o.internals >= maxInternals:
		o.broken = plugins.Errorf(plugins.Internal, "%d answers in a row were broken, the last: %w", o.internals, err)
	}
	if before == (o.last != nil) && beforeBroken == (o.broken != nil) {
		return
	}
	select {
	case o.changed <- struct{}{}:
	default:
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
	case plugins.Unavailable:
		return !plugins.IsKeyOnly(err)
	case plugins.Unauthenticated, plugins.Internal:
		return true
	default:
		return false
	}
}
