package hsm

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// attachment is one life of the connection to a token, from C_Initialize and login
// until it is broken. The anchor session stays open and idle: when the last session
// is closed, a token logs out.
type attachment struct {
	token  *Token
	since  int64 // by the token's now
	slot   uint
	info   cryptoki.Token
	anchor cryptoki.Session      // of who has login
	places chan struct{}         // one for each session that may still be used
	spare  [spares]chan struct{} // one more for lookers, and one for askers; none where there is but one place
	broken chan struct{}         // closed by breaks
	worked atomic.Bool           // key material was wrapped or unwrapped
	wraps  atomic.Bool           // key material was wrapped
	failed atomic.Bool           // a wrap failed, which may have broken it
	read   atomic.Bool           // manage did something
	unread atomic.Bool           // what manage does has broken it
	login  chan struct{}         // has room for who logs in, in the anchor session
	logins atomic.Int64          // when the login under way began
	epoch  atomic.Int64          // one more before each login again: handles do not outlive the one before
	// witness is when a version wrapped to tell whether the token does.
	witness atomic.Pointer[testimony]

	mu      sync.Mutex
	why     error // mu guards why and what follows
	idle    []*worker
	live    map[*worker]struct{}
	empty   chan struct{} // closed when broken and live is empty
	short   int           // workers among live that got no session
	away    int           // places without a session, for now
	noSpare [spares]bool  // the same of the spare ones
	shortAt int64         // when the token last had no session for us
}

// awayFor is how long the token is not asked for more sessions when it had none.
const awayFor = 4 * time.Second

func newAttachment(t *Token, slot uint, info cryptoki.Token, anchor cryptoki.Session, sessions, spare int) *attachment {
	a := &attachment{
		token: t, since: t.now(), slot: slot, info: info, anchor: anchor, places: make(chan struct{}, sessions),
		broken: make(chan struct{}), login: make(chan struct{}, 1), live: map[*worker]struct{}{}, empty: make(chan struct{}),
	}
	for range sessions {
		a.places <- struct{}{}
	}
	for i := range a.spare {
		a.spare[i] = make(chan struct{}, 1)
		if i >= spares-spare {
			a.spare[i] <- struct{}{}
		}
	}
	return a
}

// role is what an operation is for.
type role uint8

const (
	caller   role = iota
	bounced       // the same, of one who has waited for a look
	verifier      // one who waits for what a look comes to, and wants no guess
	looker        // a look at a version
	asker         // a question whether the token serves another version
)

// spares are the sessions beside those for callers: who finds out what is wrong does not
// wait for calls that may be slow for that very reason.
const spares = 2

type roleKey struct{}

func as(ctx context.Context, r role) context.Context { return context.WithValue(ctx, roleKey{}, r) }

func roleOf(ctx context.Context) role {
	r, _ := ctx.Value(roleKey{}).(role)
	return r
}

// acquire returns a worker that is the caller's until release or discard.
func (a *attachment) acquire(ctx context.Context) (*worker, error) {
	place := a.places
	select {
	case <-place:
	default:
		var spare chan struct{}
		if r := roleOf(ctx); r >= looker {
			spare = a.spare[r-looker]
		}
		select {
		case <-place:
		case <-spare:
			place = spare
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-a.broken:
			return nil, a.cause()
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.why != nil {
		place <- struct{}{}
		return nil, a.why
	}
	if n := len(a.idle); n > 0 {
		w := a.idle[n-1]
		a.idle = a.idle[:n-1]
		w.place = place
		return w, nil
	}
	w, err := newWorker(a)
	if err != nil {
		place <- struct{}{}
		return nil, errorf(Unavailable, err, "a session's memory")
	}
	w.place = place
	a.live[w] = struct{}{}
	return w, nil
}

// release gives back a worker whose session is well. Its memory is clean.
func (a *attachment) release(w *worker) {
	a.mu.Lock()
	if a.why != nil {
		a.mu.Unlock()
		a.discard(w)
		return
	}
	a.idle = append(a.idle, w)
	a.vacates(w.place)
	a.mu.Unlock()
}

// vacates gives a place back. A spare one is for callers where places of theirs were taken
// away, as it may be the one that has a session. mu is held.
func (a *attachment) vacates(place chan struct{}) {
	if place != a.places && a.away > 0 {
		a.away--
		a.noSpare[slices.Index(a.spare[:], place)] = true
		place = a.places
	}
	place <- struct{}{} // it has room
}

// closeIdle gives up the sessions that are idle since before a time. Each takes a place of
// callers until it is closed, as if it were in use.
func (a *attachment) closeIdle(since int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.idle = slices.DeleteFunc(a.idle, func(w *worker) bool {
		if !w.usedBefore(since) {
			return false
		}
		select {
		case <-a.places:
			w.place = a.places
			close(w.start)
			return true
		default:
			return false // it is for one of the spare places, or somebody is about to take it
		}
	})
}

// discard gives up a session. Its place is free once the module has let go of it.
func (a *attachment) discard(w *worker) {
	w.clean()
	close(w.start)
}

// gone is a worker's last word.
func (a *attachment) gone(w *worker) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.live, w)
	if w.short {
		a.short--
	}
	if a.why != nil { // nobody waits for a place any more
		if len(a.live) == 0 {
			close(a.empty)
		}
		return
	}
	if !w.short || len(a.live) <= a.short {
		a.vacates(w.place)
	} else if i := slices.Index(a.spare[:], w.place); i >= 0 {
		a.noSpare[i] = true
	} else {
		a.away++ // others have sessions, for which is waited
	}
}

// shrinks says that the token has no session for a worker, which will be discarded. Places
// that have none either are taken away: who wants one waits for those that have. One
// place remains where there are none.
func (a *attachment) shrinks(w *worker) {
	a.mu.Lock()
	defer a.mu.Unlock()
	w.short = true
	a.short++
	a.shortAt = a.token.now()
	for len(a.places) > len(a.idle) {
		select {
		case <-a.places:
			a.away++
		default:
			return
		}
	}
}

// regains gives back the places that were taken away, some time after that: the sessions
// that the token did not have may have been somebody else's.
func (a *attachment) regains() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.why != nil || time.Duration(a.token.now()-a.shortAt) < awayFor {
		return
	}
	for ; a.away > 0; a.away-- {
		a.places <- struct{}{}
	}
	for i, no := range a.noSpare {
		if no {
			a.noSpare[i] = false
			a.spare[i] <- struct{}{}
		}
	}
}

// pause waits a moment where the token has no session for us at all: with all attempts
// it is as long as for a connection.
func (a *attachment) pause(ctx context.Context) {
	a.mu.Lock()
	some := len(a.live) > a.short
	a.mu.Unlock()
	if some {
		return // then a place is what is waited for
	}
	timer := time.NewTimer(a.token.cfg.Patience / attempts)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-a.broken:
	case <-ctx.Done():
	}
}

// breaks ends the attachment; the keeper sees to the next. Idle sessions end now,
// the others when the module lets go of them.
func (a *attachment) breaks(why error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.why != nil {
		return
	}
	a.why = why
	close(a.broken)
	for _, w := range a.idle {
		close(w.start)
	}
	a.idle = nil
	if len(a.live) == 0 {
		close(a.empty)
	}
}

// errRenewed is why an attachment ends that is well.
var errRenewed = errors.New("the module is initialised again, to see what is on the token")

// renew ends an attachment that is well, so that the next one begins at once: what a
// module keeps to itself, or does not see, may go with it. It returns the outage that
// this is until then.
func (t *Token) renew(a *attachment) error {
	a.works(true)
	outage := errorf(Unavailable, errRenewed, "the token is attached again")
	a.breaks(outage)
	return outage
}

// renewNow renews the attachment there is.
func (t *Token) renewNow(ctx context.Context) {
	if a, err := t.attached(ctx); err == nil {
		_ = t.renew(a)
	}
}

// works notes that the attachment was good for an unwrap, or a wrap. Most often that is known.
func (a *attachment) works(wraps bool) {
	if !a.worked.Load() {
		a.worked.Store(true)
	}
	if wraps && !a.wraps.Load() {
		a.wraps.Store(true)
	}
}

// proved tells whether the attachment was good for something: it did before what then
// broke it, or lasted. One that breaks as soon as it is used is as if there were none.
func (a *attachment) proved() bool {
	worked := &a.worked
	switch {
	case a.unread.Load():
		worked = &a.read
	case a.failed.Load(): // a token may open well, and break with each wrap
		worked = &a.wraps
	}
	return worked.Load() || time.Duration(a.token.now()-a.since) > reconnectMax
}

// over tells whether the attachment is broken.
func (a *attachment) over() bool {
	select {
	case <-a.broken:
		return true
	default:
		return false
	}
}

func (a *attachment) cause() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.why
}

// hung returns how long the longest call of the module has been under way.
func (a *attachment) hung(now int64) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	var longest time.Duration
	if began := a.logins.Load(); began != 0 {
		longest = time.Duration(now - began)
	}
	for w := range a.live {
		if began := w.began.Load(); began != 0 {
			longest = max(longest, time.Duration(now-began))
		}
	}
	return longest
}
