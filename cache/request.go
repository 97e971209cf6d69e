package cache

import (
	"context"
	"errors"
	"time"
)

// request is what both directions have in common.
type request struct {
	place  place
	caller string
	limits Limits
	bytes  uint64
	// reserve: GiveBack will follow.
	reserve bool
	// hold: the data key becomes the agent's own.
	hold bool
	fill Fill
	// began is when the cache was asked. notBefore is the time that max_stale
	// wants the last confirmation not to be before.
	began, notBefore time.Duration
	// alone: another caller's question was answered for that caller only, so
	// that this request asks for itself.
	alone bool
}

func newRequest(p place, caller string, l Limits, bytes uint64, fill Fill, now time.Duration, maxStale *time.Duration, arrived time.Duration) request {
	r := request{place: p, caller: caller, limits: l, bytes: bytes, fill: fill, began: now, notBefore: -1 << 62}
	if arrived == 0 || arrived > now {
		arrived = now
	}
	if maxStale != nil {
		r.notBefore = arrived - max(0, *maxStale)
	}
	return r
}

// needed is the time that the last confirmation must not be before. A
// confirmation that began after the request is always good enough: else a slow
// upstream, or a max_age of zero, would be asked for ever.
func (r *request) needed(now time.Duration) time.Duration {
	return max(min(now-max(0, r.limits.MaxAge), r.began), r.notBefore)
}

// Encrypt returns the current data key of a slot, made by Fill where there is
// none. It counts one message of r.Bytes against the data key's limits.
func (c *Cache) Encrypt(ctx context.Context, r EncryptRequest) (*Use, error) {
	if r.Limits.MaxBytes != 0 && r.Bytes > r.Limits.MaxBytes {
		return nil, ErrTooLarge
	}
	req := newRequest(place{Slot: r.Slot}, r.Caller, r.Limits, r.Bytes, r.Fill, c.cfg.Now(), r.MaxStale, r.Arrived)
	req.reserve = r.Reserve
	return c.get(ctx, &req)
}

// Decrypt returns the data key behind an encrypted data key, asked for by Fill
// where it is not cached.
func (c *Cache) Decrypt(ctx context.Context, r DecryptRequest) (*Use, error) {
	p := place{Slot: Slot{Key: r.Key, Authority: r.Authority}, id: r.ID}
	req := newRequest(p, r.Caller, r.Limits, 0, r.Fill, c.cfg.Now(), r.MaxStale, r.Arrived)
	req.hold = r.Hold
	return c.get(ctx, &req)
}

// get serves from the cache, or else asks upstream.
func (c *Cache) get(ctx context.Context, r *request) (*Use, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		if u := c.serveLocked(r, r.began); u != nil {
			c.stats.Hits++
			return u, nil
		}
	}
	slow := *r // so that the request of a hit needs no allocation
	return c.fetchLocked(ctx, &slow)
}

// fetchLocked asks upstream until an answer suffices for the request or says
// that it must not be served. It ends: an answer to a question that was asked
// for this request suffices, unless others have used the data key up, who then
// are done, or upstream said no.
func (c *Cache) fetchLocked(ctx context.Context, r *request) (*Use, error) {
	for {
		if c.closed {
			return nil, ErrClosed
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		f, err := c.callLocked(ctx, r)
		if err != nil {
			return nil, err
		}
		u, err := c.waitLocked(ctx, f, r)
		if err != nil && c.anothersLocked(ctx, f, r, err) {
			r.alone, err = true, nil
		}
		switch {
		case err != nil:
			u, err = c.unansweredLocked(ctx, f, r, err)
		case u == nil:
			u = c.serveLocked(r, c.cfg.Now())
		}
		if u != nil || err != nil {
			return u, err
		}
	}
}

// unansweredLocked serves a request in grace whose question failed, or says why it
// is not served; neither where it has to wait on.
func (c *Cache) unansweredLocked(ctx context.Context, f *flight, r *request, err error) (*Use, error) {
	if ctx.Err() != nil || c.closed || c.verdict(err) != Unreachable {
		return nil, c.explainLocked(ctx, f, r, err)
	}
	if u := c.serveLocked(r, c.cfg.Now()); u != nil {
		return u, nil
	}
	if errors.Is(err, errSlow) {
		return nil, nil
	}
	if r.caller != own {
		c.stats.Unserved++
		c.upstreamLocked(r.place.Authority.Backend).refused++
	}
	return nil, c.explainLocked(ctx, f, r, err)
}

// usableLocked returns the entry that stands for the request, when its limits
// allow one more use.
func (c *Cache) usableLocked(r *request, now time.Duration) *entry {
	e := c.entries[r.place]
	switch {
	case e == nil:
	case e.over(r.limits, now):
		c.removeLocked(e)
	case r.bytes <= e.bytesLeft(r.limits) && (e.covered(r.bytes) || c.obtainableLocked(now)):
		return e
	}
	// One that is too small for this message, or of which the store cannot reserve
	// more now, stays for others until there is another.
	if r.place.Authority.Direction == Encrypt {
		return c.takeSpareLocked(r, now)
	}
	return nil
}

// serveLocked hands out the data key that stands for the request, and counts
// it. It returns nil where upstream has to be asked first.
func (c *Cache) serveLocked(r *request, now time.Duration) *Use {
	e := c.usableLocked(r, now)
	if e == nil || !e.covered(r.bytes) {
		return nil
	}
	a := e.authority
	freshness, ok := c.freshnessLocked(a, r, now)
	if !ok {
		return nil
	}
	if freshness.Source == Grace && r.caller != own {
		c.stats.InGrace++
		a.reach.upstream.grace++
	}
	switch {
	case e.owner.caller == r.caller:
	case r.hold:
		c.handToLocked(e, c.shareLocked(r.caller))
	default:
		e.other = r.caller
	}
	e.owner.entries.MoveToFront(e.element)
	e.used, e.limits = max(now, e.used), r.limits
	if r.place.Authority.Direction == Encrypt {
		e.messages++
		e.bytes += r.bytes
		c.reserveAheadLocked(e, now)
		c.prepareLocked(e, r, now)
	}
	if r.reserve {
		e.reserved++
	}
	a.usedLocked(r.limits, now)
	e.secret.hold()
	return &Use{entry: e, bytes: r.bytes, reserved: r.reserve, freshness: freshness}
}

// freshnessLocked returns how fresh an authority is; false where it is not fresh
// enough for the request.
func (c *Cache) freshnessLocked(a *authority, r *request, now time.Duration) (Freshness, bool) {
	if a.standing != good || !a.known {
		return Freshness{}, false
	}
	age := max(0, now-a.confirmed)
	if a.confirmed >= r.needed(now) {
		return Freshness{Source: Cached, Age: age}, true
	}
	left := a.graceLeft(r.limits, now)
	if left <= 0 || a.confirmed < r.notBefore {
		return Freshness{}, false
	}
	return Freshness{Source: Grace, Age: age, GraceLeft: left}, true
}

func (a *authority) usedLocked(l Limits, now time.Duration) {
	if !a.used || l.MaxAge < a.maxAge {
		a.maxAge = l.MaxAge
	}
	if !a.used || l.Grace > a.grace {
		a.grace = l.Grace
	}
	a.used, a.usedAt, a.touched = true, now, now
}

// callLocked begins, or joins, the call upstream that the request needs: a
// confirmation where the data key is there, else a fill.
func (c *Cache) callLocked(ctx context.Context, r *request) (*flight, error) {
	now := c.cfg.Now()
	a := c.authorityLocked(r.place.Authority)
	e := c.usableLocked(r, now)
	cached := e != nil
	switch {
	case cached && a.standing == good && !e.covered(r.bytes):
		return c.reservationLocked(e, r, now), nil
	case cached && a.standing == good:
		return c.askLocked(ctx, a), nil
	case cached:
	case c.fills[r.place] != nil && !r.alone:
		return c.fills[r.place], nil
	case a.standing == good:
		return c.fillLocked(ctx, a, r)
	default:
		// With nothing cached the caller's own question may be the one that hears
		// a yes again. Each caller has its own turn: nobody can take another's.
		if s := c.shareLocked(r.caller); now >= s.nextTry {
			s.nextTry = now + probePause
			return c.fillLocked(ctx, a, r)
		}
	}
	if f := c.probeLocked(ctx, a); f != nil {
		return f, nil
	}
	return nil, a.suspension()
}

// fillLocked asks upstream for the data key, once for all who wait.
func (c *Cache) fillLocked(ctx context.Context, a *authority, r *request) (*flight, error) {
	s := c.shareLocked(r.caller)
	// As many are left for the others as anybody has: whatever some of them do,
	// there is room for one more.
	if s.misses >= min(c.cfg.MaxMissesPerCaller, c.cfg.MaxMisses-c.misses) {
		return nil, ErrOverShare
	}
	s.misses++
	c.misses++
	a.fills++
	c.stats.Misses++
	f := c.newFlight(ctx)
	f.place, f.caller = r.place, r.caller
	c.filling[f] = struct{}{}
	if c.fills[r.place] == nil {
		c.fills[r.place] = f
	}
	c.work.Go(func() {
		material, err := r.fill(f.ctx)
		defer clear(material.DataKey)
		encoded := c.encode(material, err, r.limits)
		verdict := c.verdict(err)
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.filling, f)
		c.closeFillLocked(f)
		switch verdict {
		case Yes:
			err = c.filledLocked(a, s, r, f, material, encoded)
		case No:
			a.reach.answeredLocked(f.began)
			c.refuseLocked(a, err)
		case Unreachable:
			c.failedLocked(a, f.began, err)
		case Other:
		}
		s.misses--
		c.misses--
		a.fills--
		c.landLocked(f, err)
	})
	return f, nil
}

// closeFillLocked has no more requests wait for a fill.
func (c *Cache) closeFillLocked(f *flight) {
	if c.fills[f.place] == f {
		delete(c.fills, f.place)
	}
}

// anothersLocked tells whether an error concerns the caller only that a fill
// was begun for, who is not r's: its upstream calls wait for their turn behind
// its others, or its configuration is gone. Asking once more, and for itself,
// is the most that costs.
func (c *Cache) anothersLocked(ctx context.Context, f *flight, r *request, err error) bool {
	return f.caller != "" && f.caller != r.caller && !r.alone && f.landed && ctx.Err() == nil && c.verdict(err) == Other
}

// filledLocked takes a data key in. That upstream gave it is a confirmation.
// One that it gave before it said no is not kept: whoever waits asks again.
func (c *Cache) filledLocked(a *authority, owner *share, r *request, f *flight, m Material, encoded []byte) error {
	if c.closed {
		return ErrClosed
	}
	s, err := c.arena.put(m.DataKey)
	if err != nil {
		return err
	}
	c.givenLocked(a, f.began, m)
	if a.standing != good || f.dropped {
		s.release()
		return nil
	}
	now := c.cfg.Now()
	c.insertLocked(&entry{
		place: r.place, secret: s, origin: m.Origin, encoded: encoded, authority: a, limits: r.limits, created: now, used: now,
	}, owner)
	return nil
}

// explainLocked says why a request ends with the error of a flight: where
// upstream does not answer after it said no, or could not be asked, it is the no that
// counts.
func (c *Cache) explainLocked(ctx context.Context, f *flight, r *request, err error) error {
	if ctx.Err() != nil {
		return err
	}
	if c.closed {
		return ErrClosed
	}
	a := c.authorities[r.place.Authority]
	v := c.verdict(err)
	if a != nil && a.standing != good && (v == Unreachable || v == Other && f.place == (place{})) {
		return a.suspension()
	}
	return err
}
