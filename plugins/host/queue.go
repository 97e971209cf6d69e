package host

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/kms-agent/kms-agent/plugins"
)

const (
	// waitersPerSlot bounds how many calls wait for each that runs.
	waitersPerSlot = 16
	// shedRetry is when a call that was refused for want of room may try again.
	shedRetry = time.Second
)

// queue admits a bounded number of calls at a time. Those that wait are grouped
// by caller, and callers take turns: one that asks for much waits longer, and
// not the others.
type queue struct {
	slots, room int // how many may run, and wait

	mu      sync.Mutex
	free    int // mu guards free and what follows
	waiting int
	flushed uint64               // the generation that the last flush has made
	refusal error                // of the last flush
	lines   map[string][]*waiter // by caller, first come first; never empty
	turn    []string             // the callers of lines; whose turn is next first
}

// waiter learns once: nil, it runs; else why it does not.
type waiter struct{ told chan error }

func newQueue(slots int) *queue {
	return &queue{slots: slots, free: slots, room: slots * waitersPerSlot, lines: map[string][]*waiter{}}
}

// acquire returns nil when the call may run; release follows. When ctx ends
// first the call has left the queue. generation is that of the call's ticket.
func (q *queue) acquire(ctx context.Context, caller string, generation uint64) error {
	w, err := q.join(caller, generation)
	if w == nil {
		return err
	}
	select {
	case err := <-w.told:
		return err
	case <-ctx.Done():
		q.leave(caller, w)
		return &plugins.Error{Class: plugins.Unavailable, Err: fmt.Errorf("%w: %w", plugins.ErrCrowded, ctx.Err())}
	}
}

// join returns nil and nil where the call may run at once.
func (q *queue) join(caller string, generation uint64) (*waiter, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if generation < q.flushed { // it was let through just before
		return nil, q.refusal
	}
	if q.free > 0 {
		q.free--
		return nil, nil
	}
	if q.waiting >= q.room && !q.makeRoom(caller) {
		return nil, errNoRoom()
	}
	w := &waiter{told: make(chan error, 1)}
	if len(q.lines[caller]) == 0 {
		q.turn = append(q.turn, caller)
	}
	q.lines[caller] = append(q.lines[caller], w)
	q.waiting++
	return w, nil
}

// makeRoom refuses the newest call of the longest line, unless the caller's own
// would then be as long: a flood must not keep others out of the queue.
func (q *queue) makeRoom(caller string) bool {
	longest := q.turn[0]
	for _, other := range q.turn {
		if len(q.lines[other]) > len(q.lines[longest]) {
			longest = other
		}
	}
	line := q.lines[longest]
	if len(line) <= len(q.lines[caller])+1 {
		return false
	}
	newest := line[len(line)-1]
	q.remove(longest, len(line)-1)
	newest.told <- errNoRoom()
	return true
}

// flush refuses all that wait, and those of older generations that still come. It
// returns how many waited.
func (q *queue) flush(generation uint64, refusal error) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	if generation < q.flushed {
		return 0
	}
	waiting := q.waiting
	q.flushed, q.refusal = generation, refusal
	for _, line := range q.lines {
		for _, w := range line {
			w.told <- refusal
		}
	}
	clear(q.lines)
	q.turn, q.waiting = nil, 0
	return waiting
}

func errNoRoom() error {
	return &plugins.Error{Class: plugins.Unavailable, RetryAfter: shedRetry, Err: plugins.ErrCrowded}
}

// release lets the next call run.
func (q *queue) release() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.turn) == 0 {
		q.free++
		return
	}
	caller := q.turn[0]
	next := q.lines[caller][0]
	q.remove(caller, 0)
	if len(q.lines[caller]) > 0 { // its next turn comes after the others'
		q.turn = append(q.turn[1:], caller)
	}
	next.told <- nil
}

// leave takes a waiter out, or gives back what it was granted meanwhile.
func (q *queue) leave(caller string, w *waiter) {
	q.mu.Lock()
	at := slices.Index(q.lines[caller], w)
	if at >= 0 {
		q.remove(caller, at)
	}
	q.mu.Unlock()
	if at < 0 && <-w.told == nil {
		q.release()
	}
}

// remove takes the waiter at that place out of a line, and with the last one
// the caller out of the turn. It is called under mu.
func (q *queue) remove(caller string, at int) {
	q.waiting--
	line := slices.Delete(q.lines[caller], at, at+1)
	if len(line) > 0 {
		q.lines[caller] = line
		return
	}
	delete(q.lines, caller)
	if i := slices.Index(q.turn, caller); i >= 0 {
		q.turn = slices.Delete(q.turn, i, i+1)
	}
}
