package cache

import (
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
	entry     *entry // its secret and origin never change
	freshness Freshness
	bytes     uint64 // that were reserved; guarded by Cache.mu
	reserved  bool   // guarded by Cache.mu
	released  atomic.Bool
}

// DataKey returns the data key: DataKeySize bytes of protected memory, valid
// until Release and not to be changed or copied.
func (u *Use) DataKey() []byte { return u.entry.secret.bytes }

// Origin returns what came with the data key's Material.
func (u *Use) Origin() any { return u.entry.origin }

// Authority returns what upstream said yes to.
func (u *Use) Authority() Authority { return u.entry.place.Authority }

// Freshness returns how fresh the data key was when it was handed out.
func (u *Use) Freshness() Freshness { return u.freshness }

// Proven notes that the data key has opened what it should.
func (u *Use) Proven() {
	if p := &u.entry.proven; !p.Load() { // not written to each time: many share it
		p.Store(true)
	}
}

// Doubt destroys a data key that does not open what it should, so that the next request
// asks upstream, unless it has opened something before: then what it was given is wrong.
func (c *Cache) Doubt(u *Use) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := u.entry; !e.proven.Load() && c.entries[e.place] == e {
		c.removeLocked(e) // no eviction: it was good for nothing
	}
}

// Release ends the use. It is idempotent.
func (u *Use) Release() {
	if u.released.CompareAndSwap(false, true) {
		u.entry.secret.release()
	}
}

// GiveBack ends the reservation of an EncryptRequest: so many of its bytes were
// not encrypted, nor will be. More than were reserved are not given back, nor
// anything twice.
func (c *Cache) GiveBack(u *Use, bytes uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !u.reserved {
		return
	}
	u.reserved = false
	u.entry.reserved--
	u.entry.bytes -= min(bytes, u.bytes)
}
