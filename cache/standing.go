package cache

import "time"

// Standing is what is known of an Authority.
type Standing struct {
	// Confirmed tells that upstream has said yes, in a call that began so long ago.
	Confirmed bool
	Age       time.Duration
	// Refused is ErrSuspended or ErrRevoked, as from Recheck; nil: neither.
	Refused error
	// Down tells that upstream does not answer for it, since so long ago. GraceLeft is
	// how long it serves still, whatever its age; it is given for Confirmed ones only.
	Down      bool
	Since     time.Duration
	GraceLeft time.Duration
	// DataKeys is how many there are for it, spares among them: without any nothing serves.
	DataKeys int
}

// Standing tells what is known of an Authority, and how long it would still serve
// under these limits if upstream did not answer from now on, or does not already.
func (c *Cache) Standing(name Authority, l Limits) Standing {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.standingLocked(name)
	if a == nil {
		return Standing{}
	}
	now := c.cfg.Now()
	s := Standing{Confirmed: a.known, Down: a.reach.down, DataKeys: len(a.entries)}
	if a.standing != good {
		s.Refused = a.suspension()
	}
	since := now
	if s.Down {
		since = a.reach.since
		s.Since = now - since
	}
	if s.Confirmed {
		s.Age = max(0, now-a.confirmed)
		s.GraceLeft = max(0, a.confirmed+max(0, l.MaxAge)-now)
		if l.Grace > 0 {
			s.GraceLeft = max(s.GraceLeft, a.graceEnd(l, since)-now)
		}
	}
	return s
}

// standingLocked returns what stands for an Authority in all contexts: where nothing
// without one is in use, the context that lasts the shortest.
func (c *Cache) standingLocked(name Authority) *authority {
	a := c.authorities[name]
	if c.contexts == 0 || name.Context != "" || a != nil && len(a.entries) > 0 {
		return a
	}
	least := a
	for other, bound := range c.authorities {
		other.Context = ""
		if other == name && len(bound.entries) > 0 && (least == a || bound.confirmed < least.confirmed) {
			least = bound
		}
	}
	return least
}

// SparesOf returns how many data keys of a logical key stand ready, and how many of
// the places that it is used in should have.
func (c *Cache) SparesOf(key string) (ready, wanted int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for where, p := range c.pools {
		if where.Key == key {
			ready, wanted = ready+len(p.ready), wanted+p.wanted
		}
	}
	return ready, wanted
}

// Reached tells the cache that a backend answers again, by a question that concerned
// no key, so that an outage of which nothing is left to be served does not last for
// ever: neither that of the backend nor those of its wrapping keys.
func (c *Cache) Reached(backend string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.cfg.Now()
	awaited := map[*reach]bool{}
	for name, a := range c.authorities {
		if name.Backend == backend && a.reach.down && a.awaited(now) {
			awaited[a.reach] = true // its own refresh will tell
		}
	}
	for of, r := range c.reaches {
		if of.backend == backend && r.down && !awaited[r] {
			r.down = false
			c.changedLocked(ordinary)
		}
	}
	if u := c.upstreams[backend]; u != nil && len(awaited) == 0 {
		u.down = false
	}
}

// Forget tells the cache that a backend is not used any more, so that an outage of it is
// over. Its data keys must have been evicted.
func (c *Cache) Forget(backend string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if u := c.upstreams[backend]; u != nil {
		u.down = false
	}
}
