package cache

import (
	"context"
	"time"
)

const (
	// sweepEvery is how often the cache looks for what is due.
	sweepEvery = time.Second
	// sweepRounds is how many sweeps look at every entry once, in parts, so that
	// none of them holds requests up; sweepAtLeast is the least part.
	sweepRounds  = 32
	sweepAtLeast = 512
	// refreshFrom is the part of max_age after which a confirmation in use is
	// renewed ahead; jitter adds up to refreshJitter of it.
	refreshFrom   = 0.8
	refreshJitter = 0.1
	// outageSpread and outageJitter shape the pause between refreshes in an outage.
	outageSpread = 0.7
	outageJitter = 0.6
	// sweepProbePause is how often the sweep asks about a suspended authority.
	sweepProbePause = 10 * time.Second
	// forgetAfter is how long what is known of an authority outlives its last
	// use.
	forgetAfter = time.Hour
)

// Run renews confirmations in use before they are too old, asks about what is
// suspended, and destroys data keys past their limits. It returns when ctx
// ends. It only looks once a second of the host's running time: what may be
// served is decided by Config.Now at each request, with or without Run.
func (c *Cache) Run(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			c.tell(c.sweep())
		}
	}
}

// tell tells of outages.
func (c *Cache) tell(news []Outage) {
	for _, o := range news {
		if c.cfg.OnOutage != nil {
			c.cfg.OnOutage(o)
		}
	}
}

func (c *Cache) sweep() []Outage {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	now := c.cfg.Now()
	for name, a := range c.authorities {
		c.sweepEntriesLocked(a, now)
		switch {
		case a.flight != nil:
		case c.asking[a.Backend] >= maxAsking:
		case a.standing == suspended && len(a.entries) > 0 && now >= a.nextSweepProbe:
			a.nextSweepProbe = now + sweepProbePause
			c.probeLocked(context.Background(), a)
		case a.due(now):
			c.askLocked(context.Background(), a)
		case a.forgettable(now):
			c.forgetLocked(name, a)
		}
	}
	c.sweepPoolsLocked()
	c.sweepStoreLocked(now)
	for caller, s := range c.callers {
		if s.entries.Len() == 0 && s.misses == 0 && now >= s.nextTry {
			delete(c.callers, caller)
		}
	}
	return c.outagesLocked(now)
}

// forgetLocked forgets an authority, and with the last one of its span whether
// upstream can be reached for it.
func (c *Cache) forgetLocked(name Authority, a *authority) {
	delete(c.authorities, name)
	if name.Context != "" {
		c.contexts--
	}
	if a.reach.authorities--; a.reach.authorities == 0 {
		delete(c.reaches, name.span())
	}
}

// sweepEntriesLocked looks at the next part of what an authority covers.
func (c *Cache) sweepEntriesLocked(a *authority, now time.Duration) {
	part := max(sweepAtLeast, len(a.entries)/sweepRounds)
	for range min(part, len(a.entries)) {
		// From the end: what takes the place of a removed entry was looked at.
		if a.hand--; a.hand < 0 || a.hand >= len(a.entries) {
			a.hand = len(a.entries) - 1
		}
		if e := a.entries[a.hand]; e.over(e.limits, now) {
			c.removeLocked(e)
		}
	}
}

// due tells whether a confirmation should be renewed ahead of its age: one that
// was used since, and lately; in an outage, of everything that waits for its end.
func (a *authority) due(now time.Duration) bool {
	if a.reach.down {
		return a.standing == good && now >= a.nextRefresh && a.awaited(now)
	}
	part := refreshFrom + refreshJitter*a.jitter
	return a.standing == good && a.used && a.known && a.maxAge > 0 && now >= a.nextRefresh && now-a.usedAt <= a.maxAge &&
		now-a.confirmed >= time.Duration(part*float64(a.maxAge))
}

// awaited tells whether the sweep asks about an authority in an outage until upstream
// answers: it covers what may serve somebody still, by the limits that it was used with and
// whenever the outage began, or what is suspended.
func (a *authority) awaited(now time.Duration) bool {
	if len(a.entries) == 0 {
		return false
	}
	return a.standing == suspended || a.standing == good && a.known && a.confirmed+a.maxAge+a.grace > now
}

// refreshPause is how long after so many refreshes that failed in a row the next
// one is tried: twice as long each time. At its longest it spreads the refreshes
// after a long outage over outageSpread of the time that they take as a rule, so
// that an upstream that comes back meets less than twice its usual load.
func refreshPause(maxAge time.Duration, tries int, jitter float64) time.Duration {
	first := (1 + jitter) * float64(max(sweepEvery, maxAge/64))
	longest := (1 + outageJitter*(jitter-0.5)) * outageSpread * refreshFrom * float64(maxAge)
	return time.Duration(min(first*float64(uint64(1)<<min(max(tries, 1)-1, 32)), max(longest, first)))
}

// forgettable tells whether an authority is not worth remembering.
func (a *authority) forgettable(now time.Duration) bool {
	if !a.idle() {
		return false
	}
	if now-a.touched > max(a.maxAge, forgetAfter) {
		return true
	}
	return !a.known && !a.doubted && a.standing == good
}
