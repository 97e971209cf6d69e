// Package quota counts what each caller uses of the limits of a rule.
//
// Counts of a day outlive the process: a block of them is stored before the
// first of it is used, so that a process that is killed has rather counted too
// much than too little.
package quota

import (
	"errors"
	"fmt"
	"time"
)

// MaxCallers bounds the callers that are counted for one rule at a time. A
// further one is refused, so that a flood of callers neither takes the memory nor
// escapes the limits.
const MaxCallers = 10_000

// Limits bound one caller under one rule. Zero is no limit.
type Limits struct {
	// Rate is requests per second in the long run, Burst how many of them may come
	// at once. Where there is a Rate, Burst is 1 at least.
	Rate  float64
	Burst int
	// PerDay and BytesPerDay are for one day of UTC: requests, and bytes.
	PerDay      uint64
	BytesPerDay uint64
	// Concurrency is how many requests may be under way at once.
	Concurrency uint64
}

// daily reports whether something is counted by the day.
func (l *Limits) daily() bool { return l.PerDay > 0 || l.BytesPerDay > 0 }

// Limit names one kind of limit, as the configuration does.
type Limit string

// The limits. Callers is MaxCallers.
const (
	Rate        Limit = "rate"
	PerDay      Limit = "per_day"
	BytesPerDay Limit = "bytes_per_day"
	Concurrency Limit = "concurrency"
	Callers     Limit = "callers"
)

const kindCount = 5

// kinds are the limits in the order of counts of refusals.
func kinds() [kindCount]Limit { return [5]Limit{Rate, PerDay, BytesPerDay, Concurrency, Callers} }

// Exceeded is the error of a request that a limit refuses. Nothing was counted.
type Exceeded struct {
	// Rule whose Limit it is. Where several refuse it is the one to wait for
	// longest.
	Rule  string
	Limit Limit
	// RetryAfter is when the same request can be admitted if nobody else comes
	// before it: exact for rates and days, a guess for what others hold, zero for
	// a request that is more than a whole day's limit.
	RetryAfter time.Duration
}

// Error says which limit of which rule it is.
func (e *Exceeded) Error() string {
	return fmt.Sprintf("the limit %s of rule %q is used up", e.Limit, e.Rule)
}

// ErrUnavailable is wrapped by the error of a request that would need a further
// block of a daily limit, which cannot be stored. Nothing was counted.
var ErrUnavailable = errors.New("the count of a daily limit cannot be stored")

// retryGuess is for what nobody knows the end of: requests under way.
const retryGuess = 100 * time.Millisecond

// amount is what a request counts for.
type amount struct {
	requests, bytes uint64
	// slot: it is under way until it is released.
	slot bool
}

// daily is requests and bytes of one day.
type daily struct{ requests, bytes uint64 }

func (d daily) covers(e daily) bool { return d.requests >= e.requests && d.bytes >= e.bytes }

// bounded leaves out of d what has no limit.
func (l *Limits) bounded(d daily) daily {
	if l.PerDay == 0 {
		d.requests = 0
	}
	if l.BytesPerDay == 0 {
		d.bytes = 0
	}
	return d
}

// blocks is how many blocks a daily limit is stored in: a process that is killed
// loses two of them at most.
const blocks = 64

func (l *Limits) block() daily {
	return daily{max(1, l.PerDay/blocks), max(1, l.BytesPerDay/blocks)}
}

// low reports whether less than half a block is left of a stored count that can
// still grow. It requires that stored covers used.
func (l *Limits) low(used, stored daily) bool {
	b := l.block()
	return l.PerDay > 0 && stored.requests < l.PerDay && stored.requests-used.requests < b.requests/2 ||
		l.BytesPerDay > 0 && stored.bytes < l.BytesPerDay && stored.bytes-used.bytes < b.bytes/2
}
