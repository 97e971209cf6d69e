package identity

import (
	"maps"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// What the signatures of bad tokens may cost. Verifying one takes at most a
// millisecond (P-521; P-256 and RSA a tenth of that), so that a user who sends nothing else
// gets 2 % of a processor in the long run. Honest tokens that do not hold, since
// they have expired or their key was rotated, are refused before that and do not count.
const (
	failuresPerSecond = 20
	failuresAtOnce    = 100
	// maxFailingUsers bounds how many users are counted apart. A user of the host
	// who has more (by a user namespace) shares one count with whoever fails then.
	maxFailingUsers = 64
)

// tokenFailures counts tokens whose signatures did not hold, by the user whose
// processes sent them: the one thing that a sender of bad tokens cannot make up.
// Processes of one user share the count, so that one of them can delay others,
// but only until they bring a token that is already known. The zero value is ready.
// Safe for concurrent use.
type tokenFailures struct {
	mu    sync.Mutex // guards the rest
	byUID map[uint32]*rate.Limiter
	// others is for users who have no limiter while there is no room for more.
	others *rate.Limiter
}

// allow says whether another token of a user may be verified.
func (f *tokenFailures) allow(uid uint32, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.byUID[uid]
	if l == nil && len(f.byUID) >= maxFailingUsers {
		l = f.others
	}
	return l == nil || l.TokensAt(now) >= 1
}

// note counts a failure. Of several tokens that are verified at once all count,
// and those over the bound are paid for later.
func (f *tokenFailures) note(uid uint32, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.limiter(uid, now).ReserveN(now, 1)
}

// limiter requires f.mu.
func (f *tokenFailures) limiter(uid uint32, now time.Time) *rate.Limiter {
	if l := f.byUID[uid]; l != nil {
		return l
	}
	if len(f.byUID) >= maxFailingUsers {
		// Who has not failed for long is as one who never has.
		maps.DeleteFunc(f.byUID, func(_ uint32, l *rate.Limiter) bool { return l.TokensAt(now) >= failuresAtOnce })
	}
	fresh := rate.NewLimiter(failuresPerSecond, failuresAtOnce)
	switch {
	case len(f.byUID) < maxFailingUsers:
		if f.byUID == nil {
			f.byUID = make(map[uint32]*rate.Limiter)
		}
		f.byUID[uid] = fresh
		return fresh
	case f.others == nil:
		f.others = fresh
	}
	return f.others
}
