package quota

import (
	"sync/atomic"
	"time"
)

const dayLength = 24 * time.Hour

// clock tells days of UTC. It never goes back: it shows the highest wall time
// there was, and goes on with the boot clock while the wall clock is behind.
type clock struct {
	boot func() time.Duration
	wall func() time.Time
	// ahead is by how much the clock is ahead of boot, in nanoseconds, shown the
	// latest time that now returned. They only grow.
	ahead, shown atomic.Int64
}

// set makes the clock show t, in nanoseconds of Unix time, at least.
func (c *clock) set(t int64) {
	raise(&c.ahead, t-int64(c.boot()))
}

// raise makes a at least n.
func raise(a *atomic.Int64, n int64) {
	for {
		known := a.Load()
		if n <= known || a.CompareAndSwap(known, n) {
			return
		}
	}
}

// now is in nanoseconds of Unix time.
func (c *clock) now() int64 {
	c.set(c.wall().UnixNano())
	now := c.ahead.Load() + int64(c.boot())
	raise(&c.shown, now)
	return now
}

// unlooked is how far the wall clock may be ahead of shown before the boot clock,
// which takes a system call, is read for a day.
const unlooked = int64(time.Second)

// day is the number of the present day since 1970, and what is left of it, give
// or take unlooked.
func (c *clock) day() (number int64, left time.Duration) {
	now, shown := c.wall().UnixNano(), c.shown.Load()
	if now < shown || now-shown > unlooked || dayOf(now) != dayOf(shown) {
		now = c.now()
	}
	number = dayOf(now)
	return number, time.Duration((number+1)*int64(dayLength) - now)
}

func dayOf(t int64) int64 { return t / int64(dayLength) }
