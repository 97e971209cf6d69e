package quota

import (
	"crypto/sha256"
	"hash/maphash"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// counter is what one caller has used under one rule.
type counter struct {
	mu   sync.Mutex // guards what follows
	gone bool       // forgotten: look it up again

	limits  *Limits       // that limiter has
	limiter *rate.Limiter // nil without a rate
	at      time.Duration // the latest time that limiter was told
	running uint64

	day int64 // that the rest is of
	// used is never more than stored, nor that more than wanted, which the next
	// save stores.
	used, stored, wanted daily
}

// follow makes c count by l from now on. It requires c.mu.
func (c *counter) follow(l *Limits, now time.Duration) {
	c.at = max(c.at, now)
	if c.limits == l {
		return
	}
	c.limits = l
	switch {
	case l.Rate == 0:
		c.limiter = nil
	case c.limiter == nil:
		c.limiter = rate.NewLimiter(rate.Limit(l.Rate), l.Burst)
	default:
		c.limiter.SetLimitAt(instant(c.at), rate.Limit(l.Rate))
		c.limiter.SetBurstAt(instant(c.at), l.Burst)
	}
}

// instant is a boot time for package rate, which only looks at differences.
func instant(boot time.Duration) time.Time { return time.Unix(0, int64(boot)) }

// turn begins a new day. One that is over never comes back, since clock never
// goes back. It requires c.mu.
func (c *counter) turn(day int64) {
	if day > c.day {
		c.day, c.used, c.stored, c.wanted = day, daily{}, daily{}, daily{}
	}
}

// refuses returns the limit that does not admit n, and how long to wait for it;
// empty where all do. It requires c.mu, follow and turn.
func (c *counter) refuses(n amount, left time.Duration) (Limit, time.Duration) {
	l := c.limits
	if n.requests > 0 && l.PerDay > 0 && c.used.requests+n.requests > l.PerDay {
		return PerDay, left
	}
	if n.bytes > 0 && l.BytesPerDay > 0 && (n.bytes > l.BytesPerDay || c.used.bytes > l.BytesPerDay-n.bytes) {
		if n.bytes > l.BytesPerDay {
			left = 0
		}
		return BytesPerDay, left
	}
	if n.requests > 0 && c.limiter != nil {
		missing := float64(n.requests) - c.limiter.TokensAt(instant(c.at))
		if wait := time.Duration(missing / l.Rate * float64(time.Second)); wait > 0 {
			return Rate, wait
		}
	}
	if n.slot && l.Concurrency > 0 && c.running >= l.Concurrency {
		return Concurrency, retryGuess
	}
	return "", 0
}

// take counts n, which nothing refuses. It requires c.mu.
func (c *counter) take(n amount) {
	if c.limiter != nil && n.requests > 0 {
		c.limiter.AllowN(instant(c.at), int(n.requests)) // as refuses found
	}
	if n.slot {
		c.running++
	}
	if c.limits.daily() {
		c.used = daily{c.used.requests + n.requests, c.used.bytes + n.bytes}
	}
}

// want has a block more than needed stored by the next save; where that is
// wanted already, n more. It requires c.mu.
func (c *counter) want(needed daily, n amount) {
	l, more := c.limits, daily{n.requests, n.bytes}
	if c.wanted == c.stored {
		more = l.block()
	}
	next := func(wanted, needed, more, most uint64) uint64 {
		return max(wanted, min(most, max(wanted, needed)+more))
	}
	c.wanted = daily{
		next(c.wanted.requests, needed.requests, more.requests, l.PerDay),
		next(c.wanted.bytes, needed.bytes, more.bytes, l.BytesPerDay),
	}
}

// idle reports whether forgetting c would change nothing. It requires c.mu.
func (c *counter) idle(now time.Duration, day int64) bool {
	c.at = max(c.at, now)
	full := c.limiter == nil || c.limiter.TokensAt(instant(c.at)) >= float64(c.limiter.Burst())
	return full && c.running == 0 && (c.day < day || c.wanted == daily{})
}

// callerKey stands for a caller in the state file: nothing in it is of a length
// that callers choose.
type callerKey [sha256.Size]byte

const shards = 16

// Rule has the counters of one rule. Its name is its identity: a reload keeps
// the counters of the rules that keep theirs.
type Rule struct {
	name   string
	keeper *Keeper
	unused time.Duration          // keeper.mu guards it: since when it is not in use; -1: it is
	limits atomic.Pointer[Limits] // of the last configuration that had some; never nil
	// callers counts those in shards and in restored.
	callers atomic.Int64
	swept   atomic.Int64 // when it was last, as time.Duration
	refused [kindCount]atomic.Uint64
	shards  [shards]shard

	mu sync.Mutex // guards restored; locked after a shard's
	// restored are counts that an earlier process left, of restoredDay, of callers
	// who have not come yet.
	restored    map[callerKey]daily
	restoredDay int64
}

type shard struct {
	mu       sync.RWMutex // guards counters; locked before a counter's
	counters map[string]*counter
}

func (r *Rule) shard(caller string) *shard {
	return &r.shards[maphash.String(r.keeper.seed, caller)%shards]
}

// counter returns that of a caller, nil where there is no room for another.
func (r *Rule) counter(caller string) *counter {
	s := r.shard(caller)
	s.mu.RLock()
	c := s.counters[caller]
	s.mu.RUnlock()
	if c != nil {
		return c
	}
	if r.callers.Load() >= MaxCallers {
		r.sweep()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.counters[caller]; c != nil {
		return c
	}
	c, known := r.restore(caller)
	if !known && r.callers.Add(1) > MaxCallers {
		r.callers.Add(-1)
		return nil
	}
	s.counters[strings.Clone(caller)] = c // not what it is a part of
	return c
}

// restore makes the counter of a caller who comes for the first time in this
// process; known: an earlier one has counted it.
func (r *Rule) restore(caller string) (c *counter, known bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.restored) == 0 {
		return &counter{}, false
	}
	key := keyOf(caller)
	d, known := r.restored[key]
	if !known {
		return &counter{}, false
	}
	delete(r.restored, key)
	return &counter{day: r.restoredDay, used: d, stored: d, wanted: d}, true
}

// sweepEvery keeps those who are refused from making sweep work all the time.
const sweepEvery = time.Second

// sweep forgets counters that nothing is to be remembered of.
func (r *Rule) sweep() {
	now := r.keeper.clock.boot()
	last := r.swept.Load()
	if last != 0 && now-time.Duration(last) < sweepEvery || !r.swept.CompareAndSwap(last, int64(max(now, 1))) {
		return
	}
	day, _ := r.keeper.clock.day()
	r.mu.Lock()
	if r.restoredDay < day {
		r.callers.Add(-int64(len(r.restored)))
		r.restored = nil
	}
	r.mu.Unlock()
	for i := range r.shards {
		r.callers.Add(-r.shards[i].sweep(now, day))
	}
}

func (s *shard) sweep(now time.Duration, day int64) (forgotten int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for caller, c := range s.counters {
		c.mu.Lock()
		if c.gone = c.idle(now, day); c.gone {
			delete(s.counters, caller)
			forgotten++
		}
		c.mu.Unlock()
	}
	return forgotten
}

// full is the refusal of a caller for whom there is no room: until the next
// sweep, or the next day where counts of the day take the room.
func (r *Rule) full() *Exceeded {
	e := &Exceeded{Rule: r.name, Limit: Callers, RetryAfter: sweepEvery}
	if r.limits.Load().daily() {
		_, e.RetryAfter = r.keeper.clock.day()
	}
	return e
}

// refuse counts a refusal.
func (r *Rule) refuse(limit Limit) {
	for i, kind := range kinds() {
		if kind == limit {
			r.refused[i].Add(1)
		}
	}
}
