package serve

import (
	"fmt"
	"sync"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
)

// Limits bound what a door takes on.
type Limits struct {
	// MaxPayload is the plaintext of one request or chunk, in bytes.
	MaxPayload int
	// DefaultDeadline is for requests without one, MaxDeadline caps the others.
	// Streams have MaxDeadline only between two of their messages.
	DefaultDeadline, MaxDeadline time.Duration
	// MaxConcurrent and MaxConcurrentPerCaller count operations under way.
	MaxConcurrent, MaxConcurrentPerCaller int
	// MaxConnections counts connections of one door, MaxConnectionsPerUser those
	// of one user of the host.
	MaxConnections, MaxConnectionsPerUser int
}

// Gate counts operations under way, in total and for each caller.
type Gate struct {
	limits Limits

	mu       sync.Mutex // guards total and byCaller
	total    int
	byCaller map[string]int
}

// NewGate returns a gate that nobody has entered.
func NewGate(l Limits) *Gate { return &Gate{limits: l, byCaller: map[string]int{}} }

// Enter counts one more operation of the caller, or says that it is too many.
// Each nil answer needs one Leave.
func (g *Gate) Enter(caller string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.total >= g.limits.MaxConcurrent {
		return tooMany("the agent has %d operations under way, its limit; retry later", g.total)
	}
	if n := g.byCaller[caller]; n >= g.limits.MaxConcurrentPerCaller {
		return tooMany("the caller has %d operations under way, its limit; send fewer at once", n)
	}
	g.total++
	g.byCaller[caller]++
	return nil
}

// Leave takes back one Enter.
func (g *Gate) Leave(caller string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.total--
	if g.byCaller[caller]--; g.byCaller[caller] == 0 {
		delete(g.byCaller, caller)
	}
}

func tooMany(format string, n int) error {
	return &kms.Error{Reason: kms.ReasonTooManyRequests, RetryAfter: 100 * time.Millisecond, Message: fmt.Sprintf(format, n)}
}
