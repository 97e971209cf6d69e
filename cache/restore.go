package cache

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kms-agent/kms-agent/cache/seal"
)

// Accept tells which logical key an Authority belongs to now, and the limits of its
// data keys; false: what is stored of it is dropped.
type Accept func(a Authority) (key string, l Limits, ok bool)

// Restored is what came out of the store.
type Restored struct {
	// DataKeys and Spares were taken in, Dropped were not: their key is configured no
	// more, or otherwise, or their limits are over.
	DataKeys, Spares, Dropped int
	// Refused are the authorities that upstream had said no to, Down the wrapping keys
	// and directions that were in an outage.
	Refused, Down int
	// Age is how long ago the store was saved, if ClockBehind does not say that nobody
	// knows: the time of day is before one that has been. Nothing serves then before
	// upstream has confirmed it.
	Age         time.Duration
	ClockBehind bool
}

// errBefore: it was the last word before the restart.
var errBefore = errors.New("the backend did not answer before the agent was restarted")

// contents is a store, decoded.
type contents struct {
	keys     []storedKey
	standing []standingRecord
	notes    []Note
	clock    clockRecord
}

type storedKey struct {
	keyRecord
	secret []byte // of the store's memory
	origin any
}

// Restore takes in what was saved before, as far as it is accepted; fit is given what
// was noted. From here on the cache saves, whatever the error, which wraps one of
// package seal's: what is in a store that is refused is replaced by the next save.
// Without a store it does nothing.
func (c *Cache) Restore(fit func([]Note) Accept) (Restored, error) {
	if c.disk == nil {
		return Restored{}, nil
	}
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.disk.restored = true
		if c.disk.pending == atOnce {
			c.changedLocked(atOnce)
		}
	}()
	loaded, err := c.disk.File.Load()
	if errors.Is(err, seal.ErrNotExist) {
		return Restored{}, nil
	}
	if err != nil {
		return Restored{}, err
	}
	defer loaded.Free()
	all, err := c.disk.decode(loaded.Records)
	if err != nil {
		return Restored{}, fmt.Errorf("sealed store: %w", err)
	}
	return c.takeIn(all, fit), nil
}

// decode reads every record, or none.
func (d *disk) decode(records []seal.Record) (*contents, error) {
	all := &contents{}
	var err error
	clocks := 0
	for _, r := range records {
		switch r.Type {
		case seal.DataKey:
			var k storedKey
			if k.keyRecord, k.secret, err = decodeKey(r.Value); err == nil {
				k.origin, err = d.Unmarshal(k.keyRecord.origin)
			}
			if errors.Is(err, ErrUnfit) {
				err = nil // it has no place any more, which says nothing of the rest
				continue
			}
			all.keys = append(all.keys, k)
		case seal.Confirmation, seal.Tombstone:
			var s standingRecord
			s, err = decodeStanding(r.Value)
			all.standing = append(all.standing, s)
		case seal.Note:
			var n Note
			n, err = decodeNote(r.Value)
			all.notes = append(all.notes, n)
		case seal.Clock:
			all.clock, err = decodeClock(r.Value)
			clocks++
		}
		if err != nil {
			return nil, err
		}
	}
	if clocks != 1 {
		return nil, fmt.Errorf("%w: it has %d clocks, not one", seal.ErrDamaged, clocks)
	}
	return all, nil
}

// takeIn is Restore for what could be read.
func (c *Cache) takeIn(all *contents, fit func([]Note) Accept) Restored {
	c.mu.Lock()
	shift, age, ok := c.disk.since(&all.clock, c.cfg.Now())
	c.mu.Unlock()
	for i := range all.notes {
		all.notes[i].At += shift
		if !ok {
			all.notes[i].At = longAgo
		}
	}
	accept := fit(all.notes) // without mu: it may ask the cache
	c.mu.Lock()
	defer c.mu.Unlock()
	t := &taking{c: c, accept: accept, shift: shift, clock: ok, now: c.cfg.Now()}
	t.restored = Restored{Age: age, ClockBehind: !ok}
	for i := range all.standing {
		t.authorityLocked(&all.standing[i])
	}
	for _, o := range all.clock.outages {
		t.outageLocked(o)
	}
	// The least recently used first, as they came.
	slices.SortStableFunc(all.keys, func(a, b storedKey) int { return int(min(1, max(-1, a.used-b.used))) })
	for _, spares := range []bool{true, false} {
		for i := range all.keys {
			if k := &all.keys[i]; k.spare == spares {
				t.keyLocked(k)
			}
		}
	}
	c.disk.pending = max(c.disk.pending, ordinary)
	return t.restored
}

// longAgo is before anything that could be too old.
const longAgo = time.Duration(-1 << 61)

// since returns what turns the times of a store into those of this process, and how
// long ago it was saved. It returns false where nobody knows that: then no time has
// passed.
func (d *disk) since(saved *clockRecord, now time.Duration) (shift, age time.Duration, ok bool) {
	wall := d.Wall().UnixNano()
	behind := wall < saved.highWater
	d.highWater = max(saved.highWater, wall)
	switch {
	case saved.boot == d.Boot && d.Boot != "" && saved.now <= now:
		return 0, now - saved.now, true
	case saved.boot == d.Boot || behind || wall < saved.wall:
		return now - saved.now, 0, false
	}
	age = time.Duration(wall - saved.wall)
	return now - age - saved.now, age, true
}

// taking is one Restore. Its methods require Cache.mu.
type taking struct {
	c        *Cache
	accept   Accept
	shift    time.Duration
	clock    bool // it is known how long ago the store was saved
	now      time.Duration
	restored Restored
}

// time turns a time of the store into one of this process; none is in the future.
func (t *taking) time(stored time.Duration) time.Duration { return min(stored+t.shift, t.now) }

func (t *taking) authorityLocked(r *standingRecord) {
	_, l, ok := t.accept(r.Authority)
	if !ok {
		return
	}
	a := t.c.authorityLocked(r.Authority)
	a.kept, a.known, a.confirmed, a.jitter = true, r.known && t.clock, t.time(r.confirmed), t.c.cfg.Rand()
	a.maxAge, a.grace = l.MaxAge, l.Grace
	if r.standing != good {
		a.standing, a.suspendedAt, a.refusedAt = r.standing, t.time(r.suspendedAt), t.time(r.refusedAt)
		if r.refusal != "" {
			a.refusal = errors.New(r.refusal)
		}
		t.restored.Refused++
	}
}

func (t *taking) outageLocked(o outageRecord) {
	r := t.c.reaches[o.span]
	if r == nil {
		return // nothing of it is accepted
	}
	r.down, r.since, r.failed = true, t.time(o.since), t.time(o.failed)
	u := r.upstream
	if !u.down {
		*u = upstream{name: u.name, down: true, since: r.since, failed: r.failed, err: errBefore}
	}
	u.since, u.failed = min(u.since, r.since), max(u.failed, r.failed)
	t.restored.Down++
}

// keyLocked takes a data key in. How long one has been in use is not known where the
// clock is not: it encrypts no more.
func (t *taking) keyLocked(k *storedKey) {
	c := t.c
	key, l, ok := t.accept(k.place.Authority)
	a := c.authorities[k.place.Authority]
	encrypts := k.place.Authority.Direction == Encrypt
	if !ok || key != k.place.Key || !l.Store || a == nil || a.standing == revoked || encrypts && !k.spare && !t.clock {
		t.restored.Dropped++
		return
	}
	e := &entry{
		place: k.place, origin: k.origin, encoded: k.keyRecord.origin, authority: a, limits: l, created: t.time(k.created), used: t.time(k.used),
		messages: k.uses.messages, bytes: k.uses.bytes, durable: encrypts, granted: k.uses, promised: k.uses, restored: k.uses,
	}
	if k.spare {
		e.spare, e.pool = true, c.poolLocked(k, e.used, l)
	}
	if e.over(l, t.now) || len(c.entries)+c.spares >= c.cfg.MaxEntries && k.spare {
		t.restored.Dropped++
		return
	}
	var err error
	if e.secret, err = c.arena.put(k.secret); err != nil {
		t.restored.Dropped++
		return
	}
	if k.spare {
		c.addSpareLocked(e)
		t.restored.Spares++
	} else {
		c.insertLocked(e, c.shareLocked(k.caller))
		t.restored.DataKeys++
	}
	if encrypts {
		c.disk.pending = atOnce // so that it may be used for more than disk has reserved
	}
}

// poolLocked is the pool that a stored spare goes back to.
func (c *Cache) poolLocked(k *storedKey, used time.Duration, l Limits) *pool {
	p := c.pools[k.place]
	if p == nil {
		p = &pool{owner: k.caller, wanted: l.Spares}
		c.pools[k.place] = p
	}
	p.used = max(p.used, used)
	return p
}
