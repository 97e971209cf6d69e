package quota

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Held is what one request has been admitted by. The zero value holds nothing.
// It is for one goroutine, and is not to be copied.
type Held struct {
	uses []use // sorted by rule
	room [2]use
	// caller is set with the first use.
	caller string
}

// use is what a request holds of one rule.
type use struct {
	rule    *Rule
	counter *counter
}

// Take counts one request of so many bytes by caller against the limits of all of
// rules, or against none of them where one refuses. A rule that already counted
// this request does not count it again. now is the Keeper's boot time. Where a
// block of a daily limit is used up, it waits until the next is stored, at most
// until ctx ends. The error is an *Exceeded, wraps ErrUnavailable, or is the
// context's. What is held must be released. The slice is not kept.
func (h *Held) Take(ctx context.Context, now time.Duration, rules []*Rule, caller string, bytes uint64) error {
	var space [2]use
	uses := space[:0]
	for _, r := range rules {
		if !slices.ContainsFunc(h.uses, func(u use) bool { return u.rule == r }) {
			uses = append(uses, use{rule: r})
		}
	}
	// In one order for everybody, who could otherwise wait for each other.
	slices.SortFunc(uses, func(a, b use) int { return strings.Compare(a.rule.name, b.rule.name) })
	if len(uses) == 0 {
		return nil
	}
	if err := count(ctx, now, uses, caller, amount{requests: 1, bytes: bytes, slot: true}); err != nil {
		return err
	}
	if h.uses == nil {
		h.uses = h.room[:0]
	}
	h.uses, h.caller = append(h.uses, uses...), caller
	slices.SortFunc(h.uses, func(a, b use) int { return strings.Compare(a.rule.name, b.rule.name) })
	return nil
}

// Add counts further bytes of a request that goes on, against every rule that
// admitted it or none. Waiting and errors are those of Take.
func (h *Held) Add(ctx context.Context, now time.Duration, bytes uint64) error {
	if len(h.uses) == 0 || bytes == 0 {
		return nil
	}
	return count(ctx, now, h.uses, h.caller, amount{bytes: bytes})
}

// Release ends the request. What was counted stays counted, whatever became of
// it. It is idempotent.
func (h *Held) Release() {
	for _, u := range h.uses {
		if u.counter == nil {
			continue // the Keeper has closed meanwhile
		}
		u.counter.mu.Lock()
		u.counter.running--
		u.counter.mu.Unlock()
	}
	*h = Held{}
}

// maxTurns bounds how often a request waits for a block that others then use up;
// its context ends long before.
const maxTurns = 1000

var errClosed = fmt.Errorf("%w: the agent is shutting down", ErrUnavailable)

// count counts n for all of uses or for none.
func count(ctx context.Context, now time.Duration, uses []use, caller string, n amount) error {
	for range maxTurns {
		if err := find(uses, caller); err != nil {
			return err
		}
		again, wait, err := attempt(now, uses, n)
		if err != nil || !again {
			return err
		}
		if wait == nil {
			continue
		}
		if err := wait.finish(ctx); err != nil {
			return err
		}
	}
	return fmt.Errorf("%w fast enough", ErrUnavailable)
}

// find gives each use its counter, where it has none.
func find(uses []use, caller string) error {
	for i := range uses {
		u := &uses[i]
		if u.counter != nil {
			continue
		}
		if u.rule.keeper.closed.Load() {
			return errClosed
		}
		if u.counter = u.rule.counter(caller); u.counter == nil {
			u.rule.refuse(Callers)
			return u.rule.full()
		}
	}
	return nil
}

// attempt counts n for all of uses at once, unless one of them refuses. With
// again nothing was counted and nothing refuses: count again, after wait where
// there is one.
func attempt(now time.Duration, uses []use, n amount) (again bool, wait *batch, err error) {
	for i := range uses {
		uses[i].counter.mu.Lock()
	}
	defer func() {
		for i := range uses {
			if c := uses[i].counter; c != nil {
				c.mu.Unlock()
			}
		}
	}()
	for i := range uses {
		if c := uses[i].counter; c.gone {
			c.mu.Unlock()
			uses[i].counter, again = nil, true
		}
	}
	if again {
		return true, nil, nil
	}
	if refusal := look(now, uses, n); refusal != nil {
		return false, nil, refusal
	}
	for i := range uses {
		if b := uses[i].cover(n); b != nil {
			wait = b
		}
	}
	if wait != nil {
		return true, wait, nil
	}
	for i := range uses {
		uses[i].counter.take(n)
		uses[i].prepare()
	}
	return false, nil, nil
}

// look returns the refusal of n that lasts longest, nil for none; one that never
// ends lasts longest. It requires the counters' mu.
func look(now time.Duration, uses []use, n amount) error {
	var longest *Exceeded
	for i := range uses {
		u := &uses[i]
		l := u.rule.limits.Load()
		u.counter.follow(l, now)
		var left time.Duration
		if l.daily() {
			var day int64
			day, left = u.rule.keeper.clock.day()
			u.counter.turn(day)
		}
		limit, wait := u.counter.refuses(n, left)
		if limit == "" {
			continue
		}
		u.rule.refuse(limit)
		if longest == nil || wait == 0 || longest.RetryAfter != 0 && wait > longest.RetryAfter {
			longest = &Exceeded{Rule: u.rule.name, Limit: limit, RetryAfter: wait}
		}
	}
	if longest == nil {
		return nil
	}
	return longest
}

// cover returns what to wait for before n can be counted by the day; nil for
// nothing. It requires the counter's mu, and that nothing refuses n.
func (u *use) cover(n amount) *batch {
	c := u.counter
	if !c.limits.daily() {
		return nil
	}
	needed := c.limits.bounded(daily{c.used.requests + n.requests, c.used.bytes + n.bytes})
	if c.stored.covers(needed) {
		return nil
	}
	c.want(needed, n)
	return u.rule.keeper.storing()
}

// prepare has the next block stored before it is needed. It requires the
// counter's mu.
func (u *use) prepare() {
	c := u.counter
	if c.limits.daily() && c.wanted == c.stored && c.limits.low(c.used, c.stored) {
		c.want(c.limits.bounded(c.used), amount{})
		u.rule.keeper.storing()
	}
}
