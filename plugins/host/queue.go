package host

import (
	"context"
	"sync"

	"github.com/kms-agent/kms-agent/plugins"
)

// queue lets a bounded number of calls through at a time, the waiting callers
// in turn: who has many calls waiting delays its own, not those of others.
type queue struct {
	slots, maxWaiting int

	mu      sync.Mutex
	free    int                  // mu guards free and what follows: calls that may still begin
	waiting map[string][]*waiter // per caller, oldest first; never empty slices
	turn    []string             // the callers of waiting; the first is next
	length  int                  // waiters in all
	empty   chan struct{}        // made by idle
	idled   bool                 // empty is closed
}

type waiter struct {
	granted chan struct{} // closed when the waiter may go on
	done    bool          // granted, under the queue's mu
}

func newQueue(concurrent, maxWaiting int) *queue {
	return &queue{slots: concurrent, free: concurrent, maxWaiting: maxWaiting, waiting: map[string][]*waiter{}}
}

// enter waits for the caller's turn; leave follows each success. A full queue
// refuses at once the caller that has more waiting than its share.
func (q *queue) enter(ctx context.Context, caller string) error {
	if err := ctx.Err(); err != nil {
		return &plugins.Error{Class: plugins.Unavailable, Err: err}
	}
	w, err := q.join(caller)
	if w == nil {
		return err
	}
	select {
	case <-w.granted:
		return nil
	case <-ctx.Done():
	}
	if q.abandon(caller, w) {
		return &plugins.Error{Class: plugins.Unavailable, Detail: "waiting for the plugin's other calls", Err: ctx.Err()}
	}
	return nil // the turn came at the same moment: the call will notice its context
}

// join returns nil and nil where no wait is needed.
func (q *queue) join(caller string) (*waiter, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.free > 0 {
		q.free--
		return nil, nil
	}
	// Whoever has less than an even part waiting gets in even when others fill
	// the queue, so that the bound is at most twice maxWaiting.
	share := q.maxWaiting / (len(q.turn) + 1)
	if mine := len(q.waiting[caller]); q.length >= 2*q.maxWaiting || q.length >= q.maxWaiting && mine >= share {
		return nil, &plugins.Error{
			Class: plugins.Unavailable, RetryAfter: queueRetry, Detail: "too many calls wait for the plugin already",
		}
	}
	w := &waiter{granted: make(chan struct{})}
	if len(q.waiting[caller]) == 0 {
		q.turn = append(q.turn, caller)
	}
	q.waiting[caller] = append(q.waiting[caller], w)
	q.length++
	return w, nil
}

// idle returns a channel that is closed once no call runs any more. Calls that
// begin later are not waited for.
func (q *queue) idle() <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.empty == nil {
		q.empty = make(chan struct{})
	}
	if q.free == q.slots {
		q.signalIdle()
	}
	return q.empty
}

func (q *queue) signalIdle() {
	if q.empty != nil && !q.idled {
		q.idled = true
		close(q.empty)
	}
}

// leave ends a call and gives its place to the next caller in turn.
func (q *queue) leave() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.turn) == 0 {
		if q.free++; q.free == q.slots {
			q.signalIdle()
		}
		return
	}
	caller := q.turn[0]
	w := q.waiting[caller][0]
	q.turn = q.turn[1:]
	if rest := q.waiting[caller][1:]; len(rest) > 0 {
		q.waiting[caller] = rest
		q.turn = append(q.turn, caller)
	} else {
		delete(q.waiting, caller)
	}
	q.length--
	w.done = true
	close(w.granted)
}

// abandon takes a waiter out; false where its turn has come already.
func (q *queue) abandon(caller string, w *waiter) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if w.done {
		return false
	}
	q.length--
	q.waiting[caller] = without(q.waiting[caller], w)
	if len(q.waiting[caller]) == 0 {
		delete(q.waiting, caller)
		q.turn = without(q.turn, caller)
	}
	return true
}

func without[T comparable](list []T, gone T) []T {
	rest := make([]T, 0, len(list))
	for _, item := range list {
		if item != gone {
			rest = append(rest, item)
		}
	}
	return rest
}
