package host

import (
	"math/rand/v2"
	"time"
)

// wellFor is how many times the wait before it a process must have run to have been
// well.
const wellFor = 5

// backoff is how long to wait before the next start: twice as long each time,
// with up to half of it added by chance, never outside of its bounds. After a
// process that was well the next one starts almost at once, and the count begins
// anew: what killed it may have had nothing to do with it.
type backoff struct {
	min, max time.Duration
	base     time.Duration // of the next wait
	last     time.Duration // the wait before
}

// anew forgets the waits before: they had other causes.
func (b *backoff) anew() { b.base, b.last = b.min, 0 }

// after returns the wait after a process that ran for that long, with its start.
func (b *backoff) after(ran time.Duration) time.Duration {
	if ran >= min(wellFor*max(b.last, b.min), b.max) {
		b.anew()
		return rand.N(b.min/10 + 1) //nolint:gosec // jitter is no secret
	}
	base := max(b.base, b.min)
	b.base = min(2*base, b.max*2/3)            // leaves room for chance at the end too
	b.last = min(base+rand.N(base/2+1), b.max) //nolint:gosec // jitter is no secret
	return b.last
}
