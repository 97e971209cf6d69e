package host

import (
	"math/rand/v2"
	"time"
)

// backoff is how long to wait before the next start: twice as long each time,
// with up to half of it added by chance, never outside of its bounds.
type backoff struct {
	min, max time.Duration
	base     time.Duration
}

// after returns the wait after a process that ran for that long, with its
// start. One that ran for max was well: the count begins anew.
func (b *backoff) after(ran time.Duration) time.Duration {
	base := max(b.base, b.min)
	if ran >= b.max {
		base = b.min
	}
	b.base = min(2*base, b.max*2/3)          // leaves room for chance at the end too
	return min(base+rand.N(base/2+1), b.max) //nolint:gosec // jitter is no secret
}
