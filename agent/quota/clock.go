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
	// ahead is by how much the clock is ahead of boot, in nanoseconds. It only
	// grows.
	ahead atomic.Int64
}

// set makes the clock show t, in nanoseconds of Unix time, at least.
func (c *clock) set(t int64) {
	ahead := t - int64(c.boot())
	for {
		known := c.ahead.Load()
		if ahead <= known || c.ahead.CompareAndSwap(known, ahead) {
			return
		}
	}
}

// now is in nanoseconds of Unix time.
func (c *clock) now() int64 {
	c.set(c.wall().UnixNano())
	return c.ahead.Load() + int64(c.boot())
}

// day is the number of the present day since 1970, and what is left of it.
func (c *clock) day() (number int64, left time.Duration) {
	now := c.now()
	number = dayOf(now)
	return number, time.Duration((number+1)*int64(dayLength) - now)
}

func dayOf(t int64) int64 { return t / int64(dayLength) }
