package cache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

const (
	// probePause is how often, at most, an authority that upstream said no to is
	// asked about again, and how often a caller may try for itself.
	probePause = time.Second
	// maxAsking bounds the confirmations of one backend in flight that no
	// request waits for.
	maxAsking = 8
	// maxContexts is how many authorities of contexts may be remembered that cover nothing:
	// anybody can make contexts up.
	maxContexts = 4096
	// maxTurns is how many callers are remembered that ask about what is refused.
	maxTurns = 1024
)

// standing is what upstream's last definite word makes of an authority.
type standing uint8

const (
	good standing = iota
	// suspended: upstream said no.
	suspended
	// revoked: it said no again when it was asked with the agent's own means.
	revoked
)

// authority is what is known of an Authority. Its fields are guarded by
// Cache.mu.
type authority struct {
	Authority
	reach *reach
	// confirmed is when the last call that upstream said yes to began.
	confirmed time.Duration
	known     bool
	// doubted: what was known was forgotten at unconfirmed, and what began before that
	// confirms nothing.
	doubted     bool
	unconfirmed time.Duration

	standing standing
	// suspendedAt is when the first no was heard, refusedAt when the last was.
	suspendedAt, refusedAt time.Duration
	refusal                error
	// nextProbe and nextSweepProbe are when a request and the sweep may have it
	// asked about again.
	nextProbe, nextSweepProbe time.Duration
	// nextAsked is when Ask may have it asked about again.
	nextAsked time.Duration
	// turns are when callers may ask for themselves again, while it is refused.
	turns map[string]time.Duration

	// used since the last confirmation, last at usedAt: only those are refreshed
	// ahead. maxAge is the smallest of the limits they were used with, jitter
	// the part of the spread of refreshes at which this one is.
	used                bool
	usedAt, nextRefresh time.Duration
	// grace is the largest of the limits that it was used with.
	grace time.Duration
	// tries counts the confirmations that failed in a row.
	tries  int
	maxAge time.Duration
	jitter float64

	// entries are the data keys that it covers; hand is where the sweep of them
	// goes on. sample is the origin of the last one that came.
	entries []*entry
	hand    int
	sample  any
	// kept: it covers, or did, something that is stored.
	kept bool
	// flight is the confirmation under way, fills counts the fills.
	flight  *flight
	fills   int
	touched time.Duration
}

func (c *Cache) authorityLocked(name Authority) *authority {
	a := c.authorities[name]
	if a == nil {
		if name.Context != "" {
			c.newContextLocked()
		}
		a = &authority{Authority: name, reach: c.reachLocked(name)}
		a.reach.authorities++
		c.authorities[name] = a
	}
	a.touched = c.cfg.Now()
	return a
}

// newContextLocked counts one more context, and forgets those that cover nothing
// where there are too many.
func (c *Cache) newContextLocked() {
	if c.contexts++; c.contexts <= maxContexts+len(c.entries)+c.spares {
		return
	}
	for name, a := range c.authorities {
		if name.Context != "" && a.idle() {
			c.forgetLocked(name, a)
		}
	}
}

// idle tells whether nothing depends on what is known of an authority. A tombstone lasts
// until a yes; one of a context, of which there may be any number, while it is used:
// upstream is asked anyway where nothing is cached.
func (a *authority) idle() bool {
	return len(a.entries) == 0 && a.fills == 0 && a.flight == nil && (!a.kept || a.standing == good || a.Context != "")
}

// confirmLocked notes a yes to a call that began then. A yes from before a no
// proves nothing.
func (c *Cache) confirmLocked(a *authority, began time.Duration) {
	if a.standing != good && began < a.refusedAt {
		return
	}
	a.reach.answeredLocked(began)
	a.standing, a.refusal, a.nextProbe, a.turns = good, nil, 0, nil
	c.keptLocked(a, ordinary)
	if a.doubted && began < a.unconfirmed {
		return
	}
	if !a.known || began > a.confirmed {
		a.known, a.confirmed = true, began
		a.used, a.jitter, a.nextRefresh, a.tries = false, c.cfg.Rand(), 0, 0
	}
}

// givenLocked notes that upstream gave a data key, in a call that began then.
func (c *Cache) givenLocked(a *authority, began time.Duration, m Material) {
	if m.Unconfirmed {
		a.reach.answeredLocked(began)
		return
	}
	c.confirmLocked(a, began)
}

// refuseLocked notes a no: nothing that it covers is used from here on. That
// is made sure of.
func (c *Cache) refuseLocked(a *authority, err error) {
	a.refusedAt = c.cfg.Now()
	if a.standing == good {
		a.standing, a.suspendedAt = suspended, a.refusedAt
		c.keptLocked(a, soon)
	}
	if err != nil {
		a.refusal = err
	}
	if c.asking[a.Backend] < maxAsking && (a.Context == "" || len(a.entries) > 0) {
		c.probeLocked(context.Background(), a)
	}
}

// revokeLocked believes a no: what it covers is destroyed.
func (c *Cache) revokeLocked(a *authority, err error) {
	news := a.standing != revoked // else it is on disk
	a.standing, a.refusal, a.refusedAt = revoked, err, c.cfg.Now()
	c.stats.Evictions += uint64(len(a.entries))
	for _, e := range slices.Backward(a.entries) {
		c.removeLocked(e)
	}
	if news {
		c.keptLocked(a, atOnce)
	}
}

// keptLocked has what is known of an authority saved, if it concerns the store.
func (c *Cache) keptLocked(a *authority, u urgency) {
	if a.kept {
		c.changedLocked(u)
	}
}

// suspension says why an authority that is not good is not used.
func (a *authority) suspension() error {
	switch {
	case a.standing == revoked:
		return fmt.Errorf("%w: %w", ErrRevoked, a.refusal)
	case a.refusal != nil:
		return fmt.Errorf("%w: %w", ErrSuspended, a.refusal)
	}
	return ErrSuspended
}

// Observe tells the cache what calls past it have learned of an Authority: why is what
// upstream said, nil where that is not known, and began when the call began. A no
// suspends it, and is made sure of.
func (c *Cache) Observe(a Authority, v Verdict, why error, began time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	switch v {
	case Yes, No:
		if a.Context != "" && c.authorities[a] == nil {
			if r := c.reaches[a.span()]; r != nil {
				r.answeredLocked(began) // beside that it concerns what is not cached
			}
			return
		}
		known := c.authorityLocked(a)
		if v == Yes {
			c.confirmLocked(known, began)
			return
		}
		known.reach.answeredLocked(began)
		c.refuseLocked(known, why)
	case Unreachable:
		if known := c.authorities[a]; known != nil {
			c.failedLocked(known, began, cmp.Or(why, errObserved))
		}
	case Other:
	}
}

// Ask has an Authority that covers something asked about, unless that was done just now:
// what a call past the cache has heard may concern it too.
func (c *Cache) Ask(name Authority) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, now := c.authorities[name], c.cfg.Now()
	if a == nil || c.closed || len(a.entries) == 0 || now < a.nextAsked || c.asking[a.Backend] >= maxAsking {
		return
	}
	a.nextAsked = now + probePause
	c.askLocked(context.Background(), a)
}

// Revisit has an Authority asked about that upstream has refused, or does not answer for, where
// nobody else does: what it covers is gone, or serves nobody any more.
func (c *Cache) Revisit(name Authority) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.authorities[name]
	if a == nil || c.closed || a.standing == good && !a.reach.down || a.awaited(c.cfg.Now()) || c.asking[a.Backend] >= maxAsking {
		return
	}
	c.askLocked(context.Background(), a)
}

// Turn tells whether a caller may ask upstream past the cache about an Authority that it
// has said no to: not too often. Each has its own turns, as with fills.
func (c *Cache) Turn(name Authority, caller string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, now := c.authorities[name], c.cfg.Now()
	switch {
	case a == nil || a.standing == good:
		return true
	case now < a.turns[caller]:
		return false
	case a.turns == nil || len(a.turns) >= maxTurns:
		a.turns = map[string]time.Duration{}
	}
	a.turns[caller] = now + probePause
	return true
}

// errObserved stands for an error that is known to who made the call alone.
var errObserved = errors.New("a call past the cache failed")

// Recheck tells whether an Authority may still be used: it returns ErrSuspended
// or ErrRevoked from when upstream says no until it says yes.
func (c *Cache) Recheck(name Authority) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.authorities[name]
	if a == nil {
		return nil
	}
	a.touched = c.cfg.Now()
	if a.standing != good {
		return a.suspension()
	}
	return nil
}

// Confirmed returns how long ago upstream confirmed an Authority: when the last
// call that it said yes to began.
func (c *Cache) Confirmed(name Authority) (age time.Duration, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.authorities[name]
	if a == nil || !a.known {
		return 0, false
	}
	return max(0, c.cfg.Now()-a.confirmed), true
}

// Unconfirm forgets when upstream confirmed the authorities that match accepts: each is
// asked about before it is used again, also in grace.
func (c *Cache) Unconfirm(match func(Authority) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.cfg.Now()
	for name, a := range c.authorities {
		if match(name) {
			a.known, a.doubted, a.unconfirmed, a.touched = false, true, now, now
			c.keptLocked(a, atOnce)
		}
	}
}

// Withhold suspends an authority of which the caller knows that upstream has refused it,
// and has not allowed it since, though upstream has not been asked just now. why says what
// is known of that.
func (c *Cache) Withhold(name Authority, why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a := c.authorityLocked(name); !c.closed && a.standing == good {
		c.refuseLocked(a, why)
	}
}

// Renew returns how fresh an Authority is when upstream confirmed it no longer
// than l.MaxAge ago, or may be used in grace, and asks where neither is so. It is
// for a Use that lasts: what keeps one for longer than MaxAge asks now and then.
// maxStale is as in EncryptRequest. Its error is ErrSuspended, ErrRevoked,
// ErrClosed, that of Config.Confirm, or of ctx.
func (c *Cache) Renew(ctx context.Context, name Authority, l Limits, maxStale *time.Duration) (Freshness, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := newRequest(place{Slot: Slot{Authority: name}}, "", l, 0, nil, c.cfg.Now(), maxStale, 0)
	for {
		if c.closed {
			return Freshness{}, ErrClosed
		}
		a, now := c.authorityLocked(name), c.cfg.Now()
		if a.standing != good {
			return Freshness{}, a.suspension()
		}
		if f, ok := c.freshnessLocked(a, &r, now); ok {
			a.usedLocked(l, now)
			return f, nil
		}
		err := c.awaitLocked(ctx, c.askLocked(ctx, a), &r)
		if err == nil {
			continue
		}
		if f, ok := c.freshnessLocked(a, &r, c.cfg.Now()); ok && ctx.Err() == nil && a.standing == good && !c.closed {
			return f, nil
		}
		if errors.Is(err, errSlow) {
			continue // there is no grace any more: for as long as it takes
		}
		return Freshness{}, err
	}
}

// probeLocked makes sure of a no, unless that was tried just now: then it
// returns nil.
func (c *Cache) probeLocked(ctx context.Context, a *authority) *flight {
	if a.flight != nil {
		return a.flight
	}
	now := c.cfg.Now()
	if c.closed || now < a.nextProbe {
		return nil
	}
	a.nextProbe = now + probePause
	return c.askLocked(ctx, a)
}

// askLocked asks upstream to confirm, once for all who wait.
func (c *Cache) askLocked(ctx context.Context, a *authority) *flight {
	if a.flight != nil {
		return a.flight
	}
	f := c.newFlight(ctx)
	a.flight = f
	c.asking[a.Backend]++
	c.stats.Refreshes++
	name, sample := a.Authority, a.sample
	c.work.Go(func() {
		err := c.cfg.Confirm(f.ctx, name, sample)
		verdict := c.verdict(err)
		c.mu.Lock()
		defer c.mu.Unlock()
		a.flight = nil
		if c.asking[a.Backend]--; c.asking[a.Backend] == 0 {
			delete(c.asking, a.Backend)
		}
		c.answeredLocked(a, verdict, err, f.began)
		if a.standing == revoked && a.kept {
			// Who waits is told when a crash cannot undo it any more.
			if saved := c.flushLocked(); saved != nil {
				_ = c.awaitSaveLocked(f.ctx, saved) // f lands anyway
			}
		}
		c.landLocked(f, err)
	})
	return f
}

// answeredLocked draws the consequences of a confirmation's answer. Only a no
// to a question that was asked because of a no is believed.
func (c *Cache) answeredLocked(a *authority, v Verdict, err error, began time.Duration) {
	switch v {
	case Yes:
		c.confirmLocked(a, began)
		if a.standing == suspended {
			c.probeLocked(context.Background(), a)
		}
	case No:
		a.reach.answeredLocked(began)
		if a.standing != good && began >= a.suspendedAt {
			c.revokeLocked(a, err)
		} else {
			c.refuseLocked(a, err)
		}
	case Unreachable, Other:
		if v == Unreachable {
			c.failedLocked(a, began, err)
		}
		a.tries++
		a.nextRefresh = c.cfg.Now() + refreshPause(a.maxAge, a.tries, c.cfg.Rand())
		if a.standing == suspended && began < a.suspendedAt {
			c.probeLocked(context.Background(), a)
		}
	}
}

// Refuse tells the cache that upstream said no, as why, in a call that began then, to all
// that match accepts of the authorities of a wrapping key.
func (c *Cache) Refuse(backend, wrappingKey string, match func(Authority) bool, why error, began time.Duration) {
	c.mu.Lock()
	var names []Authority
	for name := range c.authorities {
		if name.Backend == backend && name.WrappingKey == wrappingKey && match(name) {
			names = append(names, name)
		}
	}
	c.mu.Unlock()
	for _, name := range names {
		c.Observe(name, No, why, began)
	}
}
