package cache

import (
	"container/list"
	"slices"
	"sync/atomic"
	"time"
)

// place is where a data key stands in the cache: a Slot, or in the other
// direction a DecryptID beside the key and the authority that it is under.
type place struct {
	Slot
	id DecryptID
}

// entry is one data key in the cache. Its fields are guarded by Cache.mu.
type entry struct {
	place     place
	secret    *secret
	origin    any
	authority *authority
	index     int // in authority.entries
	// limits are those of the last use, for the sweep.
	limits          Limits
	created, used   time.Duration
	messages, bytes uint64
	// reserved counts the uses that may give bytes back.
	reserved int
	// encoded is the origin as the store keeps it; nil: it does not. durable: the data
	// key may be on disk, so that it encrypts within granted only, which disk says.
	// promised is what the last save says, restored what it began with, waiting what
	// requests wait for.
	encoded                              []byte
	durable                              bool
	granted, promised, restored, waiting amount
	owner                                *share
	element                              *list.Element // of owner.entries
	// other is the last caller that used it and is not the owner.
	other string
	// pool is where the spares of its place are; nil while there were none.
	// spare: it is one of them, and has no owner yet.
	pool  *pool
	spare bool
	// proven: it has opened what it should. Not guarded.
	proven atomic.Bool
}

// over tells whether an entry may serve nobody any more, by the limits.
func (e *entry) over(l Limits, now time.Duration) bool {
	if !e.authority.reach.down && l.MaxIdle != 0 && now-e.lastUsed() > l.MaxIdle {
		return true
	}
	if e.spare {
		return false // its lifetime begins when it is taken
	}
	return e.place.Authority.Direction == Encrypt &&
		(l.MaxLifetime != 0 && now-e.created >= l.MaxLifetime || e.messages >= l.messages() || e.bytesLeft(l) == 0 && e.reserved == 0)
}

// lastUsed is when an entry was used last, or what it is a spare of.
func (e *entry) lastUsed() time.Duration {
	if e.spare {
		return e.pool.used
	}
	return e.used
}

// messages is the number of messages that one data key may encrypt.
func (l Limits) messages() uint64 {
	if l.MaxMessages == 0 {
		return MaxMessages
	}
	return min(l.MaxMessages, MaxMessages)
}

func (e *entry) bytesLeft(l Limits) uint64 {
	switch {
	case l.MaxBytes == 0:
		return ^uint64(0) - e.bytes
	case e.bytes >= l.MaxBytes:
		return 0
	}
	return l.MaxBytes - e.bytes
}

// own is the caller that the agent itself is: what it holds ready.
const own = ""

// share is what one caller has of the cache.
type share struct {
	caller string
	// entries, the most recently used first.
	entries list.List
	misses  int
	// nextTry is when the caller may ask upstream for itself for a data key of
	// an authority that is not good.
	nextTry time.Duration
}

func (c *Cache) shareLocked(caller string) *share {
	s := c.callers[caller]
	if s == nil {
		s = &share{caller: caller}
		c.callers[caller] = s
	}
	return s
}

// insertLocked puts an entry in, in place of what stands there, and makes room
// for it.
func (c *Cache) insertLocked(e *entry, owner *share) {
	if old := c.entries[e.place]; old != nil {
		c.removeLocked(old)
	}
	c.makeRoomLocked(owner)
	c.entries[e.place] = e
	e.pool = c.pools[e.place]
	e.owner, e.element = owner, owner.entries.PushFront(e)
	c.coverLocked(e)
}

// coverLocked puts an entry under its authority.
func (c *Cache) coverLocked(e *entry) {
	a := e.authority
	e.index, a.entries, a.sample = len(a.entries), append(a.entries, e), e.origin
	if e.stored() {
		a.kept = true
		c.changedLocked(ordinary)
	}
}

// makeRoomLocked evicts the least recently used entry of whoever has too many:
// the caller itself over its own bound, in a full cache the one that has the
// most. So nobody can flush another's data keys.
func (c *Cache) makeRoomLocked(owner *share) {
	if owner.caller != own && owner.entries.Len() >= c.cfg.MaxEntriesPerCaller {
		c.evictOldestLocked(owner)
	}
	c.shrinkLocked(owner)
}

// shrinkLocked makes room for one more data key of a share in a full cache. Spares
// stay.
func (c *Cache) shrinkLocked(owner *share) {
	if len(c.entries)+c.spares < c.cfg.MaxEntries {
		return
	}
	// The newcomer counts what it is about to have: with equal shares it is the
	// one to give way.
	// What is held gives way to nothing else.
	most, has := owner, owner.entries.Len()+1
	if owner.caller == own {
		has = 0
	}
	for _, s := range c.callers {
		if n := s.entries.Len(); s.caller != own && (n > has || most.entries.Len() == 0 && n > 0) {
			most, has = s, n
		}
	}
	c.evictOldestLocked(most)
}

// evictOldestLocked destroys the least recently used entry of a share. One that
// somebody with less uses too goes over to that share instead: what one caller
// needs does not go when another who had it first floods its own.
func (c *Cache) evictOldestLocked(s *share) {
	for oldest := s.entries.Back(); oldest != nil; oldest = s.entries.Back() {
		e, _ := oldest.Value.(*entry)
		if !c.handOverLocked(e) {
			c.removeLocked(e)
			c.stats.Evictions++
			return
		}
	}
}

func (c *Cache) handOverLocked(e *entry) bool {
	if e.other == "" {
		return false
	}
	s := c.shareLocked(e.other)
	e.other = ""
	if s.entries.Len()+1 >= e.owner.entries.Len() {
		return false
	}
	c.handToLocked(e, s)
	return true
}

// handToLocked makes an entry another share's.
func (c *Cache) handToLocked(e *entry, s *share) {
	e.owner.entries.Remove(e.element)
	e.owner, e.element = s, s.entries.PushFront(e)
}

// removeLocked takes an entry out. Its data key is destroyed when it is no
// longer in use.
func (c *Cache) removeLocked(e *entry) {
	if e.spare {
		c.unprepareLocked(e)
	} else {
		delete(c.entries, e.place)
		e.owner.entries.Remove(e.element)
	}
	a, last := e.authority, len(e.authority.entries)-1
	a.entries[e.index] = a.entries[last]
	a.entries[e.index].index = e.index
	a.entries[last] = nil
	a.entries = a.entries[:last]
	e.secret.release()
}

// evictLocked removes every entry that match accepts, and counts them. What is
// being asked for is not kept either.
func (c *Cache) evictLocked(match func(Slot) bool) int {
	return c.evictOfLocked(match, func(any) bool { return true })
}

// evictOfLocked is evictLocked for the entries whose origin is accepted, too.
func (c *Cache) evictOfLocked(match func(Slot) bool, origin func(any) bool) int {
	n, kept := 0, false
	for _, a := range c.authorities {
		for _, e := range slices.Backward(a.entries) {
			if match(e.place.Slot) && origin(e.origin) {
				kept = kept || e.stored()
				c.removeLocked(e)
				n++
			}
		}
	}
	for f := range c.filling {
		if match(f.place.Slot) {
			f.dropped = true
			c.closeFillLocked(f)
		}
	}
	c.stats.Evictions += uint64(n)
	if kept && !c.closed {
		c.changedLocked(atOnce)
	}
	return n
}

// EvictKey destroys the data keys of a logical key and returns how many. Those
// in use are destroyed when they are released. On disk they are destroyed soon
// after, or when Flush returns.
func (c *Cache) EvictKey(key string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.evictLocked(func(s Slot) bool { return s.Key == key })
}

// Unstore takes the data keys of a logical key out of the store, and keeps them.
func (c *Cache) Unstore(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.authorities {
		for _, e := range a.entries {
			if e.place.Key == key && e.stored() {
				e.limits.Store = false
				c.changedLocked(atOnce)
			}
		}
	}
}

// EvictAuthority destroys the data keys that an Authority covers, like EvictKey.
func (c *Cache) EvictAuthority(a Authority) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.evictLocked(func(s Slot) bool { return s.Authority == a })
}

// EvictAll destroys every data key, like EvictKey.
func (c *Cache) EvictAll() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.evictLocked(func(Slot) bool { return true })
}

// Retire destroys the data keys for encryption of a wrapping key, in whatever version,
// whose Origin match accepts, and returns how many. Those in use are destroyed when
// they are released. What is being made for it is not kept either, since nobody knows yet.
func (c *Cache) Retire(backend, wrappingKey string, match func(origin any) bool) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for name, a := range c.authorities {
		if name.Backend != backend || name.WrappingKey != wrappingKey || name.Direction != Encrypt {
			continue
		}
		for _, e := range slices.Backward(a.entries) {
			if match(e.origin) {
				c.removeLocked(e)
				n++
			}
		}
	}
	for f := range c.filling {
		if a := f.place.Authority; a.Backend == backend && a.WrappingKey == wrappingKey && a.Direction == Encrypt {
			f.dropped = true
			c.closeFillLocked(f)
		}
	}
	return n
}

// EvictOrigins destroys the data keys for decryption of a wrapping key whose Origin match
// accepts, and returns how many: each is asked for again. What is being asked for is not kept.
func (c *Cache) EvictOrigins(backend, wrappingKey string, match func(origin any) bool) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.evictOfLocked(func(s Slot) bool {
		a := s.Authority
		return a.Backend == backend && a.WrappingKey == wrappingKey && a.Direction == Decrypt
	}, match)
}

// EvictVersions destroys the data keys for encryption of a wrapping key in every
// version but one.
func (c *Cache) EvictVersions(backend, wrappingKey, but string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.evictLocked(func(s Slot) bool {
		a := s.Authority
		return a.Backend == backend && a.WrappingKey == wrappingKey && a.Direction == Encrypt && a.Version != but
	})
}
