package cache

import (
	"context"
	"time"
)

const (
	// maxPreparing bounds the spares of one backend that are being made.
	maxPreparing = 4
	// preparePause is how long after a failure the next spare of a place is tried.
	preparePause = 10 * time.Second
)

// pool has the spares of one place. Its fields are guarded by Cache.mu.
type pool struct {
	ready     []*entry
	preparing bool
	owner     string        // the caller whose share of spares they count on
	used      time.Duration // when the place was
	wanted    int           // by the limits of the last use
	next      time.Duration // when another may be tried, after a failure
}

// maxSpares is how many data keys may be spares at most, of all and of each caller:
// the rest is for what is in use.
func (c *Cache) maxSpares() (all, caller int) {
	return c.cfg.MaxEntries / 2, max(1, c.cfg.MaxEntriesPerCaller/4)
}

// takeSpareLocked makes a spare the current data key of the request's place; nil
// where there is none that is good for the request.
func (c *Cache) takeSpareLocked(r *request, now time.Duration) *entry {
	p := c.pools[r.place]
	for p != nil && len(p.ready) > 0 {
		e := p.ready[0]
		if e.over(r.limits, now) {
			c.removeLocked(e)
			continue
		}
		if e.authority.standing != good || r.bytes > e.bytesLeft(r.limits) || !e.covered(r.bytes) && !c.obtainableLocked(now) {
			return nil
		}
		c.unprepareLocked(e)
		e.spare, e.created, e.used = false, now, now
		if e.durable {
			c.changedLocked(soon) // its lifetime begins
		}
		c.replaceLocked(e, c.shareLocked(r.caller))
		return e
	}
	return nil
}

// replaceLocked puts a data key that is covered already in the place of another.
func (c *Cache) replaceLocked(e *entry, owner *share) {
	if old := c.entries[e.place]; old != nil {
		c.removeLocked(old)
	}
	c.entries[e.place] = e
	e.owner, e.element = owner, owner.entries.PushFront(e)
}

// unprepareLocked takes a spare out of its pool.
func (c *Cache) unprepareLocked(e *entry) {
	for i, other := range e.pool.ready {
		if other == e {
			e.pool.ready = append(e.pool.ready[:i:i], e.pool.ready[i+1:]...)
			c.spares--
			return
		}
	}
}

// prepareLocked sees to it that the place of a data key in use has its spares.
func (c *Cache) prepareLocked(e *entry, r *request, now time.Duration) {
	p := e.pool
	if p == nil {
		if r.limits.Spares <= 0 {
			return
		}
		p = &pool{owner: r.caller}
		c.pools[e.place], e.pool = p, p
	}
	p.used, p.wanted = now, max(0, r.limits.Spares)
	for len(p.ready) > p.wanted {
		c.removeLocked(p.ready[len(p.ready)-1])
	}
	if !p.wants(r.limits, now) || p.preparing || now < p.next {
		return
	}
	c.makeSpareLocked(e.authority, e.place, p, r.limits, r.fill)
}

// wants tells whether another spare is to be made: for one that is missing, or for the
// oldest, which has waited for as long as a data key lives and goes when the new one is
// there.
func (p *pool) wants(l Limits, now time.Duration) bool {
	if len(p.ready) < p.wanted {
		return true
	}
	return len(p.ready) > 0 && l.MaxLifetime != 0 && now-p.ready[0].created >= l.MaxLifetime
}

// makeSpareLocked asks upstream for one more spare, in the time of nobody, and then
// for the next one.
func (c *Cache) makeSpareLocked(a *authority, where place, p *pool, l Limits, fill Fill) {
	all, _ := c.maxSpares()
	if c.closed || a.standing != good || a.reach.down || c.spares >= all || c.preparing[a.Backend] >= maxPreparing || c.ownedSpares(p.owner) {
		return
	}
	p.preparing = true
	a.fills++
	c.preparing[a.Backend]++
	f := c.newFlight(context.Background())
	f.place, f.caller = where, p.owner
	c.filling[f] = struct{}{}
	c.work.Go(func() {
		material, err := fill(f.ctx)
		defer clear(material.DataKey)
		encoded := c.encode(material, err, l)
		verdict := c.verdict(err)
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.filling, f)
		p.preparing = false
		a.fills--
		if c.preparing[a.Backend]--; c.preparing[a.Backend] == 0 {
			delete(c.preparing, a.Backend)
		}
		switch verdict {
		case Yes:
			err = c.preparedLocked(a, where, p, l, f, material, encoded)
		case No:
			a.reach.answeredLocked(f.began)
			c.refuseLocked(a, err)
		case Unreachable:
			c.failedLocked(a, f.began, err)
		case Other:
		}
		c.landLocked(f, err)
		switch {
		case verdict == Unreachable: // the end of the outage is worth waiting for
		case err != nil:
			p.next = c.cfg.Now() + preparePause
		case p.wants(l, c.cfg.Now()):
			c.makeSpareLocked(a, where, p, l, fill)
		}
	})
}

// ownedSpares tells whether a caller has as many spares as it may have. It is asked
// when one is about to be made, which is seldom.
func (c *Cache) ownedSpares(caller string) bool {
	_, most := c.maxSpares()
	n := 0
	for _, p := range c.pools {
		if p.owner == caller {
			n += len(p.ready)
		}
	}
	return n >= most
}

// preparedLocked takes a spare in. One that upstream gave before it said no, or for a
// place that was evicted meanwhile, is not kept.
func (c *Cache) preparedLocked(a *authority, where place, p *pool, l Limits, f *flight, m Material, encoded []byte) error {
	if c.closed {
		return ErrClosed
	}
	s, err := c.arena.put(m.DataKey)
	if err != nil {
		return err
	}
	c.givenLocked(a, f.began, m)
	if a.standing != good || f.dropped || c.pools[where] != p {
		s.release()
		return errUnwanted
	}
	if len(p.ready) > 0 && len(p.ready) >= p.wanted {
		c.removeLocked(p.ready[0])
	}
	c.shrinkLocked(c.shareLocked(p.owner))
	now := c.cfg.Now()
	c.addSpareLocked(&entry{place: where, secret: s, origin: m.Origin, encoded: encoded, authority: a, limits: l, created: now, used: now, pool: p})
	return nil
}

func (c *Cache) addSpareLocked(e *entry) {
	e.spare = true
	e.pool.ready = append(e.pool.ready, e)
	c.spares++
	c.coverLocked(e)
}

// sweepPoolsLocked forgets the pools of places that have neither a data key nor
// spares any more.
func (c *Cache) sweepPoolsLocked() {
	for where, p := range c.pools {
		if len(p.ready) == 0 && !p.preparing && c.entries[where] == nil {
			delete(c.pools, where)
		}
	}
}
