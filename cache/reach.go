package cache

import (
	"errors"
	"slices"
	"strings"
	"time"
)

// errSlow: a confirmation has not come for so long that upstream is taken to be
// out of reach.
var errSlow = errors.New("the backend takes too long to confirm the key")

// span is what an outage is of: one wrapping key in one direction, in whatever
// version.
type span struct {
	backend, wrappingKey string
	direction            Direction
}

func (a Authority) span() span { return span{a.Backend, a.WrappingKey, a.Direction} }

// reach is whether upstream answers for a span. Its fields are guarded by Cache.mu.
type reach struct {
	upstream *upstream
	down     bool
	// since is when the first failed call of the outage began, failed when the last
	// one did; answered is when the last call began that upstream did answer.
	since, failed, answered time.Duration
	// authorities counts those that it is of.
	authorities int
}

// upstream is one backend, and what its present outage has cost.
type upstream struct {
	name    string
	down    bool
	told    bool // that it is down
	since   time.Duration
	failed  time.Duration
	err     error // the last
	grace   uint64
	refused uint64
}

// Outage is a time in which a backend does not answer.
type Outage struct {
	Backend string
	// Lasts is how long it has lasted, or lasted.
	Lasts time.Duration
	// Grace and Refused count the requests that were served in grace, and that
	// could not be served.
	Grace, Refused uint64
	// Err is how the last call failed.
	Err error
	// Over tells that upstream answers again.
	Over bool
}

// outageAfter is how long an outage lasts before anybody is told: calls that fail
// now and then are none.
const outageAfter = 2 * time.Second

func (c *Cache) reachLocked(a Authority) *reach {
	name := a.span()
	r := c.reaches[name]
	if r == nil {
		r = &reach{upstream: c.upstreamLocked(a.Backend)}
		c.reaches[name] = r
	}
	return r
}

func (c *Cache) upstreamLocked(name string) *upstream {
	u := c.upstreams[name]
	if u == nil {
		u = &upstream{name: name}
		c.upstreams[name] = u
	}
	return u
}

// failedLocked notes a call that upstream did not answer. One that Close cut short says
// nothing of upstream.
func (c *Cache) failedLocked(a *authority, began time.Duration, err error) {
	if c.closed {
		return
	}
	if !a.reach.down && a.kept {
		c.changedLocked(soon)
	}
	a.reach.failedLocked(began, err)
}

// failedLocked notes a call that upstream did not answer. One that began before
// another that it did answer says nothing new.
func (r *reach) failedLocked(began time.Duration, err error) {
	if began < r.answered {
		return
	}
	if !r.down {
		r.down, r.since = true, began
	}
	r.since, r.failed = min(r.since, began), max(r.failed, began)
	u := r.upstream
	if !u.down {
		*u = upstream{name: u.name, down: true, since: began}
	}
	u.since, u.failed, u.err = min(u.since, began), max(u.failed, began), err
}

// answeredLocked notes a call that upstream answered, with yes or with no. Only one
// that began after all that failed ends an outage.
func (r *reach) answeredLocked(began time.Duration) {
	r.answered = max(r.answered, began)
	if began >= r.failed {
		r.down = false
	}
	if u := r.upstream; began >= u.failed {
		u.down = false
	}
}

// graceLeft is how long what an authority covers may still be used in an outage:
// from its first failed call for as long as the limits say, and never longer than
// if the outage had begun when the last confirmation was too old. So an upstream
// that comes and goes adds no time.
func (a *authority) graceLeft(l Limits, now time.Duration) time.Duration {
	if !a.reach.down || l.Grace <= 0 {
		return 0
	}
	return a.graceEnd(l, a.reach.since) - now
}

func (a *authority) graceEnd(l Limits, since time.Duration) time.Duration {
	return min(since, a.confirmed+max(0, l.MaxAge)) + l.Grace
}

// patienceLocked is how long a request waits for a confirmation before it is served
// in grace; negative: as long as it takes, since it cannot be.
func (c *Cache) patienceLocked(f *flight, r *request) time.Duration {
	if f.save || f.place != (place{}) || !c.graciousLocked(f, r) || c.usableLocked(r, c.cfg.Now()) == nil {
		return -1
	}
	return c.untilSlow(f)
}

// graciousLocked tells whether there is grace for a request, if upstream were out of reach
// since it was asked.
func (c *Cache) graciousLocked(f *flight, r *request) bool {
	a := c.authorities[r.place.Authority]
	if a == nil || a.standing != good || !a.known || a.confirmed < r.notBefore || r.limits.Grace <= 0 {
		return false
	}
	since := f.began
	if a.reach.down {
		since = min(since, a.reach.since)
	}
	return a.graceEnd(r.limits, since) > c.cfg.Now()
}

// untilSlow is how long a confirmation may take still.
func (c *Cache) untilSlow(f *flight) time.Duration {
	return max(0, f.began+c.cfg.Patience-c.cfg.Now())
}

// outagesLocked returns what there is to tell since the last time.
func (c *Cache) outagesLocked(now time.Duration) []Outage {
	var news []Outage
	for _, u := range c.upstreams {
		lasts := now - u.since
		switch {
		case u.down && !u.told && lasts >= outageAfter:
			u.told = true
			news = append(news, u.outage(lasts))
		case !u.down && u.told:
			u.told = false
			over := u.outage(lasts)
			over.Over = true
			news = append(news, over)
		}
	}
	return news
}

func (u *upstream) outage(lasts time.Duration) Outage {
	return Outage{Backend: u.name, Lasts: lasts, Grace: u.grace, Refused: u.refused, Err: u.err}
}

// Outages returns the outages under way, by backend.
func (c *Cache) Outages() []Outage {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.cfg.Now()
	var out []Outage
	for _, u := range c.upstreams {
		if u.down {
			out = append(out, u.outage(now-u.since))
		}
	}
	slices.SortFunc(out, func(a, b Outage) int { return strings.Compare(a.Backend, b.Backend) })
	return out
}
