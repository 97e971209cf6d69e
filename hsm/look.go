package hsm

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// look is one examination of a version: whether its keys open its canary and, where that
// is wanted, wrap. All who want to know share it, and it goes on when they leave: what ails
// a key that is slow is found out though no caller has the time for it.
type look struct {
	v     *Version
	a     *attachment
	epoch int64
	began int64         // by the token's now
	wrap  bool          // whether they wrap, too
	anew  bool          // whatever is known: a call has failed
	opens chan struct{} // closed when they have opened it
	told  chan struct{} // closed when there is an answer
	ended chan struct{}

	doubt atomic.Bool // it takes long, and a call has failed

	mu    sync.Mutex
	late  bool  // mu guards late and what follows; it takes long
	guess guess // what is told then
	open  *binding
	b     *binding
	err   error
	done  bool // b or err is the answer
}

// guess is what a look says as long as it does not know.
type guess struct {
	err      error
	remember func() // so that nobody else need ask
}

const (
	// lookPatience is how long those who wait for a look get the answer that it comes to,
	// and no guess.
	lookPatience = 250 * time.Millisecond
	// lookTime bounds a look of so many calls, none of which hangs.
	lookTime = 30 * time.Second
)

// look tells whether the keys of a version open its canary and, where that is wanted,
// wrap: what is known, or is found out just now. anew takes nothing that anybody began to
// find out before.
func (t *Token) look(ctx context.Context, a *attachment, v *Version, wrap, anew bool) (*binding, error) {
	now := t.now()
	for {
		if err := v.out(a, wrap); err != nil {
			return nil, err
		}
		if b := v.proven(a, wrap); b != nil && !anew {
			return b, nil
		}
		l := t.looking(ctx, a, v, wrap, anew)
		fits := l.a == a && l.epoch == a.epoch.Load() && (l.wrap || !wrap) && (l.anew && l.began >= now || !anew)
		for _, until := range []chan struct{}{l.told, l.ended} {
			if err := l.wait(ctx, until, fits && !wrap); err != nil {
				return nil, err
			}
			if fits {
				return l.answer(wrap)
			}
			if err := v.out(a, wrap); err != nil {
				return nil, err
			}
		}
	}
}

// wait waits for a moment of a look, or until the canary is opened.
func (l *look) wait(ctx context.Context, moment chan struct{}, opened bool) error {
	opens := l.opens
	if !opened {
		opens = nil
	}
	select {
	case <-opens:
	case <-moment:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// looking returns the look at a version that is under way; it begins one where there is none.
func (t *Token) looking(ctx context.Context, a *attachment, v *Version, wrap, anew bool) *look {
	v.mu.Lock()
	defer v.mu.Unlock()
	if l := v.look.Load(); l != nil {
		return l
	}
	l := &look{
		v: v, a: a, epoch: a.epoch.Load(), began: t.now(), wrap: wrap, anew: anew,
		opens: make(chan struct{}), told: make(chan struct{}), ended: make(chan struct{}), guess: guess{err: v.lately(a)},
	}
	v.look.Store(l)
	go t.lookOn(context.WithoutCancel(ctx), l)
	return l
}

// lookOn looks.
func (t *Token) lookOn(ctx context.Context, l *look) {
	ctx, cancel := context.WithTimeout(as(ctx, looker), lookTime)
	defer cancel()
	timer := time.AfterFunc(lookPatience, l.isLate)
	defer timer.Stop()
	b, err := t.lookAt(ctx, l)
	if isCallers(err) {
		err = errorf(Unavailable, errSlow, "version %d of key %s was not examined within %v", l.v.Number, l.v.Key, lookTime)
	}
	l.v.look.Store(nil)
	l.mu.Lock()
	l.tell(b, err)
	l.mu.Unlock()
	close(l.ended)
}

func (t *Token) lookAt(ctx context.Context, l *look) (b *binding, err error) {
	if !l.anew {
		b = l.v.proven(l.a, false)
	}
	if b == nil {
		if b, err = t.prove(ctx, l); err != nil {
			return nil, err
		}
	}
	l.opened(b)
	if l.wrap && (l.anew || l.v.proven(l.a, true) == nil) {
		return t.test(ctx, l, b)
	}
	return b, nil
}

// tell answers those who wait. mu is held.
func (l *look) tell(b *binding, err error) {
	if !l.done {
		l.done, l.b, l.err = true, b, err
		close(l.told)
	}
}

func (l *look) answer(wrap bool) (*binding, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !wrap && l.open != nil {
		return l.open, nil
	}
	return l.b, l.err
}

// opened says that the canary was opened. What is guessed from then on is about wraps.
func (l *look) opened(b *binding) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open, l.guess = b, guess{}
	close(l.opens)
	if OfVersion(b.unfit) {
		l.guess.err = b.unfit
		l.tellGuess()
	}
}

// suspects says what a look will most likely come to; those who have waited long are told.
func (l *look) suspects(err error, remember func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.guess = guess{err, remember}
	l.tellGuess()
}

func (l *look) isLate() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.late = true
	l.doubt.Store(l.anew)
	l.tellGuess()
}

// tellGuess is called under mu.
func (l *look) tellGuess() {
	if !l.late || l.guess.err == nil || l.done {
		return
	}
	if l.guess.remember != nil {
		l.guess.remember()
	}
	l.tell(nil, l.guess.err)
}

// doubted tells whether a look takes long that was begun because a call failed: another
// call would take as long, and a place.
func (v *Version) doubted() bool {
	l := v.look.Load()
	return l != nil && l.doubt.Load()
}

// awaitLook waits for what such a look comes to.
func (v *Version) awaitLook(ctx context.Context, a *attachment, wrap bool) error {
	if l := v.look.Load(); l != nil && l.a == a {
		if err := l.wait(ctx, l.told, !wrap); err != nil {
			return err
		}
		if b, err := l.answer(wrap); err != nil {
			return err
		} else if l.wrap || !wrap {
			_, err := b.serve(wrap)
			return err
		}
	}
	return nil
}
