package cache

import (
	"container/list"
	"time"
)

// entry is one data key in the cache. Its fields are guarded by Cache.mu.
type entry struct {
	secret    *secret
	origin    any
	key       string
	authority *authority
	limits    Limits
	// id is the Slot or DecryptID under which it stands.
	id              any
	created, used   time.Duration
	messages, bytes uint64
	owner           *share
	place           *list.Element
}

// share is what one caller holds of the cache.
type share struct {
	caller string
	// entries, the most recently used first.
	entries *list.List
	misses  int
}

func (c *Cache) shareLocked(caller string) *share {
	s := c.callers[caller]
	if s == nil {
		s = &share{caller: caller, entries: list.New()}
		c.callers[caller] = s
	}
	return s
}

func (c *Cache) forgetShareLocked(s *share) {
	if s.entries.Len() == 0 && s.misses == 0 {
		delete(c.callers, s.caller)
	}
}

// insertLocked puts an entry in, in place of what stands there, and makes room
// for it.
func (c *Cache) insertLocked(e *entry, caller string) {
	if old := c.findLocked(e.id); old != nil {
		c.removeLocked(old)
	}
	e.owner = c.shareLocked(caller)
	c.makeRoomLocked(e.owner)
	e.place = e.owner.entries.PushFront(e)
	e.authority.entries[e] = struct{}{}
	switch id := e.id.(type) {
	case Slot:
		c.encryption[id] = e
	case DecryptID:
		c.decryption[id] = e
	}
}

func (c *Cache) findLocked(id any) *entry {
	switch id := id.(type) {
	case Slot:
		return c.encryption[id]
	case DecryptID:
		return c.decryption[id]
	}
	return nil
}

// makeRoomLocked evicts the least recently used entry of whoever has too many:
// the caller itself over its own limit, else the one that holds the most. So
// nobody can flush another's data keys.
func (c *Cache) makeRoomLocked(owner *share) {
	if owner.entries.Len() >= c.cfg.MaxEntriesPerCaller {
		c.evictOldestLocked(owner)
	}
	if len(c.encryption)+len(c.decryption) < c.cfg.MaxEntries {
		return
	}
	// The newcomer counts what it is about to hold: with equal shares it is the
	// one to give way.
	most, held := owner, owner.entries.Len()+1
	for _, s := range c.callers {
		if n := s.entries.Len(); n > held {
			most, held = s, n
		}
	}
	if most.entries.Len() == 0 {
		// More callers than entries: the newcomer has nothing to give way with.
		for _, s := range c.callers {
			if s.entries.Len() > 0 {
				most = s
				break
			}
		}
	}
	c.evictOldestLocked(most)
}

func (c *Cache) evictOldestLocked(s *share) {
	if oldest := s.entries.Back(); oldest != nil {
		e, _ := oldest.Value.(*entry)
		c.removeLocked(e)
		c.stats.Evictions++
	}
}

// removeLocked takes an entry out. Its data key is destroyed when it is no
// longer in use.
func (c *Cache) removeLocked(e *entry) {
	switch id := e.id.(type) {
	case Slot:
		delete(c.encryption, id)
	case DecryptID:
		delete(c.decryption, id)
	}
	delete(e.authority.entries, e)
	e.owner.entries.Remove(e.place)
	c.forgetShareLocked(e.owner)
	e.secret.release()
}

// evictLocked removes every entry that match accepts, and counts them.
func (c *Cache) evictLocked(match func(*entry) bool) int {
	n := 0
	for _, e := range c.encryption {
		if match(e) {
			c.removeLocked(e)
			n++
		}
	}
	for _, e := range c.decryption {
		if match(e) {
			c.removeLocked(e)
			n++
		}
	}
	c.stats.Evictions += uint64(n)
	return n
}

// EvictKey destroys the data keys of a logical key and returns how many.
func (c *Cache) EvictKey(key string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.evictLocked(func(e *entry) bool { return e.key == key })
}

// EvictAuthority destroys the data keys that an Authority covers and returns
// how many.
func (c *Cache) EvictAuthority(a Authority) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.evictLocked(func(e *entry) bool { return e.authority.Authority == a })
}

// EvictAll destroys every data key and returns how many.
func (c *Cache) EvictAll() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.evictLocked(func(*entry) bool { return true })
}
