package cache

import (
	"context"
	"fmt"
	"time"
)

// probePause is how often a suspended authority is asked about again.
const probePause = time.Second

// authority is what is known of an Authority. Its fields are guarded by
// Cache.mu.
type authority struct {
	Authority
	// confirmed is when the last call that upstream said yes to began.
	confirmed time.Duration
	known     bool
	// suspended since upstream said no; revoked when it was made sure of.
	suspended, revoked bool
	suspendedAt        time.Duration
	refusal            error
	// probed is when a suspended authority was last asked about.
	probed time.Duration
	// used since the last confirmation: only those are refreshed ahead.
	used bool
	// maxAge is the smallest of the limits it was used with, jitter the part of
	// it after which it is refreshed ahead.
	maxAge time.Duration
	jitter float64
	// entries are the data keys that it covers.
	entries map[*entry]struct{}
	flight  *flight
}

func (c *Cache) authorityLocked(a Authority) *authority {
	known := c.authorities[a]
	if known == nil {
		known = &authority{Authority: a, entries: map[*entry]struct{}{}}
		c.authorities[a] = known
	}
	return known
}

// confirmLocked notes a yes to a call that began then. A yes from before a no
// does not lift the suspension.
func (c *Cache) confirmLocked(a *authority, began time.Duration) {
	if a.suspended && began < a.suspendedAt {
		return
	}
	a.suspended, a.revoked, a.refusal = false, false, nil
	if !a.known || began > a.confirmed {
		a.known, a.confirmed = true, began
		a.used, a.jitter = false, c.cfg.Rand()
	}
}

// refuseLocked notes a no: nothing that it covers is used from here on.
func (c *Cache) refuseLocked(a *authority, err error) {
	if !a.suspended {
		a.suspended, a.suspendedAt = true, c.cfg.Now()
	}
	a.refusal = err
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
		known := c.authorityLocked(a)
		c.refuseLocked(known, nil)
		c.probeLocked(known)
	case Unreachable, Other:
	}
}

// Recheck tells whether an Authority may still be used: it returns ErrSuspended
// from when upstream says no until it says yes.
func (c *Cache) Recheck(a Authority) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if known := c.authorities[a]; known != nil && known.suspended {
		return known.suspension()
	}
	return nil
}

func (a *authority) suspension() error {
	if a.refusal == nil {
		return ErrSuspended
	}
	return fmt.Errorf("%w: %w", ErrSuspended, a.refusal)
}

// Confirmed returns how long ago upstream confirmed an Authority.
func (c *Cache) Confirmed(a Authority) (age time.Duration, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	known := c.authorities[a]
	if known == nil || !known.known {
		return 0, false
	}
	return c.cfg.Now() - known.confirmed, true
}

// probeLocked makes sure of a no, unless that is under way or was tried just
// now. The flight it returns may be nil.
func (c *Cache) probeLocked(a *authority) *flight {
	if a.flight != nil {
		return a.flight
	}
	now := c.cfg.Now()
	if a.probed != 0 && now-a.probed < probePause {
		return nil
	}
	a.probed = now
	return c.askLocked(context.Background(), a)
}

// askLocked asks upstream to confirm, once for all who wait. ctx is only where
// values come from.
func (c *Cache) askLocked(ctx context.Context, a *authority) *flight {
	if a.flight != nil {
		return a.flight
	}
	var sample any
	for e := range a.entries {
		sample = e.origin
		break
	}
	f := c.newFlight(ctx)
	// Nobody has to wait for a confirmation for it to be worth having.
	f.waiters++
	a.flight = f
	c.work.Go(func() {
		err := c.cfg.Confirm(f.ctx, a.Authority, sample)
		c.mu.Lock()
		defer c.mu.Unlock()
		a.flight = nil
		c.stats.Refreshes++
		c.answeredLocked(a, err, f.began)
		f.finish(err)
	})
	return f
}

// answeredLocked draws the consequences of a confirmation's answer: the second
// no in a row is believed.
func (c *Cache) answeredLocked(a *authority, err error, began time.Duration) {
	if err == nil {
		c.confirmLocked(a, began)
		return
	}
	if c.cfg.Classify(err) != No {
		return
	}
	if a.suspended && began >= a.suspendedAt {
		a.revoked, a.refusal = true, err
		c.evictLocked(func(e *entry) bool { return e.authority == a })
		return
	}
	c.refuseLocked(a, err)
	c.probeLocked(a)
}
