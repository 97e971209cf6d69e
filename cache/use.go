package cache

import (
	"context"
	"sync/atomic"
	"time"
)

// Source says how a data key is known to be good.
type Source uint8

// The sources.
const (
	// Upstream: a call that this request waited for confirmed it.
	Upstream Source = iota + 1
	// Cached: it was confirmed within max_age.
	Cached
	// Grace: an outage upstream, within the key's grace.
	Grace
)

// String returns "upstream", "cached", "grace" or "".
func (s Source) String() string {
	switch s {
	case Upstream:
		return "upstream"
	case Cached:
		return "cached"
	case Grace:
		return "grace"
	}
	return ""
}

// Freshness says how fresh the key behind an answer is.
type Freshness struct {
	Source Source
	// Age is the time since the last confirmation.
	Age time.Duration
	// GraceLeft is the time until grace ends; zero but with Grace.
	GraceLeft time.Duration
}

// Use is a data key in use. It must be released.
type Use struct {
	secret    *secret
	origin    any
	freshness Freshness
	released  atomic.Bool
}

// DataKey returns the data key: DataKeySize bytes of protected memory, valid
// until Release and not to be changed.
func (u *Use) DataKey() []byte { return u.secret.bytes }

// Origin returns what came with the data key's Material.
func (u *Use) Origin() any { return u.origin }

// Freshness returns how fresh the data key was when it was handed out.
func (u *Use) Freshness() Freshness { return u.freshness }

// Release ends the use. It is idempotent.
func (u *Use) Release() {
	if u.released.CompareAndSwap(false, true) {
		u.secret.release()
	}
}

// Encrypt returns the current data key of a slot, made by Fill where there is
// none. It counts one message of r.Bytes against the data key's limits.
func (c *Cache) Encrypt(ctx context.Context, r EncryptRequest) (*Use, error) {
	if r.Limits.MaxBytes != 0 && r.Bytes > r.Limits.MaxBytes {
		return nil, ErrTooLarge
	}
	return c.get(ctx, request{
		caller: r.Caller, key: r.Slot.Key, id: r.Slot, authority: r.Slot.Authority, limits: r.Limits,
		maxStale: r.MaxStale, arrived: r.Arrived, fill: r.Fill, encrypt: true, bytes: r.Bytes,
	})
}

// Decrypt returns the data key behind an encrypted data key, asked for by Fill
// where it is not cached.
func (c *Cache) Decrypt(ctx context.Context, r DecryptRequest) (*Use, error) {
	return c.get(ctx, request{
		caller: r.Caller, key: r.Key, id: r.ID, authority: r.Authority, limits: r.Limits,
		maxStale: r.MaxStale, arrived: r.Arrived, fill: r.Fill,
	})
}

// request is what both directions have in common.
type request struct {
	caller, key string
	id          any // Slot or DecryptID
	authority   Authority
	limits      Limits
	maxStale    *time.Duration
	arrived     time.Duration
	fill        Fill
	encrypt     bool
	bytes       uint64
}

// needed is the time that the last confirmation must not be before.
func (r *request) needed(now time.Duration) time.Duration {
	needed := now - r.limits.MaxAge
	if r.maxStale != nil {
		needed = max(needed, r.arrived-*r.maxStale)
	}
	return needed
}

// get serves from the cache, and asks upstream until it can or an answer says
// that it must not.
func (c *Cache) get(ctx context.Context, r request) (*Use, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	waited := false
	for {
		if c.closed {
			return nil, ErrClosed
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		a := c.authorityLocked(r.authority)
		e := c.usableLocked(&r)
		if e != nil && !a.suspended && a.known && a.confirmed >= r.needed(c.cfg.Now()) {
			return c.useLocked(e, a, &r, waited), nil
		}
		f, err := c.callLocked(ctx, a, e, &r)
		if err != nil {
			return nil, err
		}
		if err := c.waitLocked(ctx, f); err != nil {
			return nil, c.explainLocked(ctx, a, f, err)
		}
		waited = true
	}
}

// usableLocked returns the entry that stands for the request, within its limits.
func (c *Cache) usableLocked(r *request) *entry {
	e := c.findLocked(r.id)
	if e == nil {
		return nil
	}
	if now := c.cfg.Now(); e.expired(now) || r.encrypt && e.usedUp(r, now) {
		c.removeLocked(e)
		return nil
	}
	return e
}

func (e *entry) expired(now time.Duration) bool {
	return e.limits.MaxIdle != 0 && now-e.used > e.limits.MaxIdle
}

func (e *entry) usedUp(r *request, now time.Duration) bool {
	l := r.limits
	return l.MaxLifetime != 0 && now-e.created >= l.MaxLifetime ||
		l.MaxMessages != 0 && e.messages >= l.MaxMessages ||
		l.MaxBytes != 0 && e.bytes > l.MaxBytes-r.bytes
}

// useLocked hands an entry's data key out, and counts.
func (c *Cache) useLocked(e *entry, a *authority, r *request, waited bool) *Use {
	now := c.cfg.Now()
	e.used, e.limits = now, r.limits
	e.owner.entries.MoveToFront(e.place)
	if r.encrypt {
		e.messages++
		e.bytes += r.bytes
	}
	a.used = true
	if a.maxAge == 0 || r.limits.MaxAge < a.maxAge {
		a.maxAge = r.limits.MaxAge
	}
	e.secret.hold()
	u := &Use{secret: e.secret, origin: e.origin, freshness: Freshness{Source: Cached, Age: now - a.confirmed}}
	if waited {
		u.freshness.Source = Upstream
	} else {
		c.stats.Hits++
	}
	return u
}

// callLocked begins, or joins, the call upstream that the request needs: a
// confirmation where the data key is there, else a fill.
func (c *Cache) callLocked(ctx context.Context, a *authority, e *entry, r *request) (*flight, error) {
	if e != nil {
		if a.suspended {
			if f := c.probeLocked(a); f != nil {
				return f, nil
			}
			return nil, a.suspension()
		}
		return c.askLocked(ctx, a), nil
	}
	if f := c.fills[r.id]; f != nil {
		return f, nil
	}
	if a.suspended {
		// With nothing cached the fill itself is the question, asked now and then.
		now := c.cfg.Now()
		if a.flight != nil || a.probed != 0 && now-a.probed < probePause {
			return nil, a.suspension()
		}
		a.probed = now
	}
	return c.fillLocked(ctx, a, r)
}

// fillLocked asks upstream for the data key, once for all who wait.
func (c *Cache) fillLocked(ctx context.Context, a *authority, r *request) (*flight, error) {
	s := c.shareLocked(r.caller)
	if c.misses >= c.cfg.MaxMisses || s.misses >= c.cfg.MaxMissesPerCaller {
		c.forgetShareLocked(s)
		return nil, ErrOverShare
	}
	s.misses++
	c.misses++
	c.stats.Misses++
	f := c.newFlight(ctx)
	c.fills[r.id] = f
	req := *r
	c.work.Go(func() {
		material, err := req.fill(f.ctx)
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.fills, req.id)
		s.misses--
		c.misses--
		if err == nil {
			err = c.filledLocked(a, &req, material, f.began)
		} else if c.cfg.Classify(err) == No {
			c.refuseLocked(a, err)
			c.probeLocked(a)
		}
		clear(material.DataKey)
		c.forgetShareLocked(s)
		f.finish(err)
	})
	return f, nil
}

// filledLocked takes a data key in. That upstream gave it is a confirmation.
func (c *Cache) filledLocked(a *authority, r *request, m Material, began time.Duration) error {
	if c.closed {
		return ErrClosed
	}
	s, err := c.arena.put(m.DataKey)
	if err != nil {
		return err
	}
	now := c.cfg.Now()
	c.confirmLocked(a, began)
	c.insertLocked(&entry{
		secret: s, origin: m.Origin, key: r.key, authority: a, limits: r.limits, id: r.id, created: now, used: now,
	}, r.caller)
	return nil
}

// explainLocked says why a request ends with the error of a flight: a no in
// answer to a confirmation is ErrSuspended too.
func (c *Cache) explainLocked(ctx context.Context, a *authority, f *flight, err error) error {
	if ctx.Err() != nil || f.err == nil {
		return err
	}
	if a.suspended && c.cfg.Classify(err) != No {
		return a.suspension()
	}
	return err
}
