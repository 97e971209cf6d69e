package host

import (
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

const (
	// callsPerRetry is how many calls earn one repeat.
	callsPerRetry = 10
	// retryReserve is how many repeats may be saved up, and are there at first: what
	// was under way when a process died may be repeated at once.
	retryReserve = 100
	// retriesPerSecond may be made in any case.
	retriesPerSecond = 3
)

// budget bounds the repeats of calls to a share of the calls, so that an outage
// does not double the load on what is out. It is safe for concurrent use.
type budget struct {
	earned atomic.Int64 // in calls
	floor  *rate.Limiter
	spent  atomic.Uint64 // repeats
}

func newBudget() *budget {
	b := &budget{floor: rate.NewLimiter(rate.Every(time.Second/retriesPerSecond), retriesPerSecond)}
	b.earned.Store(retryReserve * callsPerRetry)
	return b
}

// earn notes a call.
func (b *budget) earn() {
	if b.earned.Load() < retryReserve*callsPerRetry { // a few more do no harm
		b.earned.Add(1)
	}
}

// spend tells whether one more repeat may be made.
func (b *budget) spend() bool {
	if b.earned.Add(-callsPerRetry) < 0 {
		b.earned.Add(callsPerRetry)
		if !b.floor.Allow() {
			return false
		}
	}
	b.spent.Add(1)
	return true
}
