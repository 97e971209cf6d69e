package cache

import (
	"context"
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
	// confirmed is when the last call that upstream said yes to began.
	confirmed time.Duration
	known     bool

	standing standing
	// suspendedAt is when the first no was heard, refusedAt when the last was.
	suspendedAt, refusedAt time.Duration
	refusal                error
	// nextProbe and nextSweepProbe are when a request and the sweep may have it
	// asked about again.
	nextProbe, nextSweepProbe time.Duration

	// used since the last confirmation, last at usedAt: only those are refreshed
	// ahead. maxAge is the smallest of the limits they were used with, jitter
	// the part of the spread of refreshes at which this one is.
	used                bool
	usedAt, nextRefresh time.Duration
	maxAge              time.Duration
	jitter              float64

	// entries are the data keys that it covers; hand is where the sweep of them
	// goes on. sample is the origin of the last one that came.
	entries []*entry
	hand    int
	sample  any
	// flight is the confirmation under way, fills counts the fills.
	flight  *flight
	fills   int
	touched time.Duration
}

func (c *Cache) authorityLocked(name Authority) *authority {
	a := c.authorities[name]
	if a == nil {
		a = &authority{Authority: name}
		c.authorities[name] = a
	}
	a.touched = c.cfg.Now()
	return a
}

// confirmLocked notes a yes to a call that began then. A yes from before a no
// proves nothing.
func (c *Cache) confirmLocked(a *authority, began time.Duration) {
	if a.standing != good && began < a.refusedAt {
		return
	}
	a.standing, a.refusal, a.nextProbe = good, nil, 0
	if !a.known || began > a.confirmed {
		a.known, a.confirmed = true, began
		a.used, a.jitter, a.nextRefresh = false, c.cfg.Rand(), 0
	}
}

// refuseLocked notes a no: nothing that it covers is used from here on. That
// is made sure of.
func (c *Cache) refuseLocked(a *authority, err error) {
	a.refusedAt = c.cfg.Now()
	if a.standing == good {
		a.standing, a.suspendedAt = suspended, a.refusedAt
	}
	if err != nil {
		a.refusal = err
	}
	if c.asking[a.Backend] < maxAsking {
		c.probeLocked(context.Background(), a)
	}
}

// revokeLocked believes a no: what it covers is destroyed.
func (c *Cache) revokeLocked(a *authority, err error) {
	a.standing, a.refusal, a.refusedAt = revoked, err, c.cfg.Now()
	c.stats.Evictions += uint64(len(a.entries))
	for _, e := range slices.Backward(a.entries) {
		c.removeLocked(e)
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

// Observe tells the cache what calls past it have learned of an Authority:
// began is when the call began. A no suspends it, and is made sure of.
func (c *Cache) Observe(a Authority, v Verdict, began time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	switch v {
	case Yes:
		c.confirmLocked(c.authorityLocked(a), began)
	case No:
		c.refuseLocked(c.authorityLocked(a), nil)
	case Unreachable, Other:
	}
}

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

// Renew returns nil when upstream confirmed an Authority no longer than maxAge
// ago, and asks where it did not. It is for a Use that lasts: what keeps one for
// longer than maxAge asks now and then. Its error is ErrSuspended, ErrRevoked,
// ErrClosed, that of Config.Confirm, or of ctx.
func (c *Cache) Renew(ctx context.Context, name Authority, maxAge time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	began := c.cfg.Now()
	for {
		if c.closed {
			return ErrClosed
		}
		a, now := c.authorityLocked(name), c.cfg.Now()
		if a.standing != good {
			return a.suspension()
		}
		// A confirmation that began after the question is always good enough.
		if a.known && a.confirmed >= min(now-max(0, maxAge), began) {
			a.usedLocked(maxAge, now)
			return nil
		}
		if err := c.awaitLocked(ctx, c.askLocked(ctx, a)); err != nil {
			return err
		}
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
		if a.standing != good && began >= a.suspendedAt {
			c.revokeLocked(a, err)
		} else {
			c.refuseLocked(a, err)
		}
	case Unreachable, Other:
		a.nextRefresh = c.cfg.Now() + refreshPause(a.maxAge, c.cfg.Rand())
		if a.standing == suspended && began < a.suspendedAt {
			c.probeLocked(context.Background(), a)
		}
	}
}
