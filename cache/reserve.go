package cache

import (
	"math"
	"time"
)

// A data key that is on disk is used only as far as disk says that it may have been:
// so that after a crash, which forgets what was used, the next process goes on from
// there. One that was never saved is lost in a crash, and needs no reservation.

// amount is how much of its limits a data key has used, or may use.
type amount struct{ messages, bytes uint64 }

const (
	// blockPart is the part of a limit that is reserved ahead at first; as much as the
	// process has used where that is more, so that a data key costs few saves in all.
	blockPart = 1024
	// A small limit is reserved in blocks of so many messages or bytes, but not of more
	// than a leastPart of it.
	leastMessages = 64
	leastBytes    = 64 << 10
	leastPart     = 16
)

// block is how much is reserved ahead of what is used, of which the process itself has
// used own.
func block(limit, least, own uint64) uint64 {
	return max(1, limit/blockPart, min(least, limit/leastPart), own)
}

// capacity is what the limits allow in all.
func (l Limits) capacity() amount {
	all := amount{l.messages(), l.MaxBytes}
	if all.bytes == 0 {
		all.bytes = math.MaxUint64
	}
	return all
}

// reserve returns the mark up to which a data key is to be reserved, ahead of what it
// has used by a share of its block, and of those who wait.
func (e *entry) reserve(share uint64) amount {
	limit := e.limits.capacity()
	mark := func(used, restored, waiting, limit, least uint64) uint64 {
		ahead := max(block(limit, least, used-min(used, restored))/share, waiting)
		if ahead >= limit || used >= limit-ahead {
			return limit
		}
		return used + ahead
	}
	return amount{
		mark(e.messages, e.restored.messages, e.waiting.messages, limit.messages, leastMessages),
		mark(e.bytes, e.restored.bytes, e.waiting.bytes, limit.bytes, leastBytes),
	}
}

func (a amount) covers(b amount) bool { return a.messages >= b.messages && a.bytes >= b.bytes }

func (a amount) raised(b amount) amount {
	return amount{max(a.messages, b.messages), max(a.bytes, b.bytes)}
}

// covered tells whether one more message of so many bytes is within what is reserved.
func (e *entry) covered(bytes uint64) bool {
	return !e.durable || e.messages < e.granted.messages && e.bytes <= e.granted.bytes && bytes <= e.granted.bytes-e.bytes
}

// reserveAheadLocked has more reserved before it is needed.
func (c *Cache) reserveAheadLocked(e *entry, now time.Duration) {
	const half = 2
	d := c.disk
	if !e.durable || e.promised.covers(e.reserve(half)) || d.wanted || d.blocked(now) || !d.affordable(now) {
		return
	}
	d.credit--
	d.wanted = true
	c.startSaveLocked()
}

// obtainableLocked tells whether more can be reserved now.
func (c *Cache) obtainableLocked(now time.Duration) bool {
	d := c.disk
	return !c.closed && !d.blocked(now) && (d.next != nil || d.wanted || d.affordable(now))
}

// reservationLocked returns the save that reserves what a request needs.
func (c *Cache) reservationLocked(e *entry, r *request, now time.Duration) *flight {
	d := c.disk
	e.limits = r.limits
	e.waiting.messages++
	if e.waiting.bytes += r.bytes; e.waiting.bytes < r.bytes {
		e.waiting.bytes = math.MaxUint64
	}
	if d.next == nil {
		if !d.wanted && d.affordable(now) {
			d.credit--
		}
		d.next = c.newSave()
	}
	c.startSaveLocked()
	return d.next
}
