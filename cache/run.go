package cache

import (
	"context"
	"time"
)

const (
	// sweepEvery is how often the cache looks for what is due.
	sweepEvery = time.Second
	// refreshFrom is the part of max_age after which a confirmation in use is
	// renewed ahead; jitter adds up to refreshJitter of it.
	refreshFrom   = 0.8
	refreshJitter = 0.1
	// maxRefreshes bounds the confirmations ahead in flight.
	maxRefreshes = 4
)

// Run renews confirmations in use before they are too old, and forgets data
// keys that nobody has used for max_idle. It returns when ctx ends.
func (c *Cache) Run(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			c.sweep()
		}
	}
}

func (c *Cache) sweep() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	now := c.cfg.Now()
	for _, e := range c.encryption {
		if e.expired(now) || e.limits.MaxLifetime != 0 && now-e.created >= e.limits.MaxLifetime {
			c.removeLocked(e)
		}
	}
	for _, e := range c.decryption {
		if e.expired(now) {
			c.removeLocked(e)
		}
	}
	inFlight := 0
	for id, a := range c.authorities {
		switch {
		case a.flight != nil:
			inFlight++
		case a.due(now) && inFlight < maxRefreshes:
			c.askLocked(context.Background(), a)
			inFlight++
		case len(a.entries) == 0 && !a.suspended && (!a.known || now-a.confirmed > max(a.maxAge, time.Hour)):
			delete(c.authorities, id)
		}
	}
}

// due tells whether a confirmation should be renewed ahead of its age.
func (a *authority) due(now time.Duration) bool {
	part := refreshFrom + refreshJitter*a.jitter
	return a.used && !a.suspended && a.known && now-a.confirmed >= time.Duration(part*float64(a.maxAge))
}
