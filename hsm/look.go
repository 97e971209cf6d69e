package hsm

import (
	"context"
	"sync"
	"time"
)

// look is one examination of a version: whether its keys open its canary and, where that
// is wanted, wrap. All who want to know share it, and it goes on when they leave: what ails
// a key that is slow is found out though no caller has the time for it.
type look struct {
	v     *Version
	a     *attachment
	epoch int64
	wrap  bool          // whether they wrap, too
	anew  bool          // whatever is known
	opens chan struct{} // closed when they have opened it
	told  chan struct{} // closed when there is an answer, or it takes long and there is a guess
	ended chan struct{}

	mu    sync.Mutex
	late  bool  // mu guards late and what follows; it takes longer than it should
	guess error // what it will most likely come to
	said  bool  // told is closed
	open  *binding
	b     *binding
	err   error // b or err is the answer, when it has ended
	over  bool  // it has
}

const (
	// lookPatience is how long those who wait for a look get the answer that it comes to,
	// and no guess; it is longer, to a bound, for keys whose canaries take long when they
	// are well.
	lookPatience, mostPatience = 250 * time.Millisecond, time.Second
	usualTimes                 = 3
	// lookTime bounds a look of so many calls, none of which hangs.
	lookTime = 30 * time.Second
)

// look tells whether the keys of a version open its canary and, where that is wanted,
// wrap: what is known, or is found out just now. anew takes no canary that was opened
// before.
func (t *Token) look(ctx context.Context, a *attachment, v *Version, wrap, anew bool) (*binding, error) {
	final := roleOf(ctx) == verifier
	for {
		if err := v.out(a, wrap); err != nil && !final {
			return nil, err
		}
		if b := v.proven(a, wrap); b != nil && !anew {
			return b, nil
		}
		l, began := t.looking(ctx, a, v, wrap, anew)
		fits := began || (l.wrap || !wrap) && (!anew || l.anew && !l.hasOpened())
		if fits {
			return l.outcome(ctx, wrap, final)
		}
		for _, until := range []chan struct{}{l.told, l.ended} {
			if err := l.wait(ctx, until, false); err != nil {
				return nil, err
			}
			if err := v.out(a, wrap); err != nil && !final {
				return nil, err
			}
		}
	}
}

// outcome waits for what a look comes to, or for its guess unless that is final. A guess
// that was told and turned out wrong is none.
func (l *look) outcome(ctx context.Context, wrap, final bool) (b *binding, err error) {
	moments := []chan struct{}{l.told, l.ended}
	if final {
		moments = moments[1:]
	}
	for _, until := range moments {
		if err := l.wait(ctx, until, !wrap); err != nil {
			return nil, err
		}
		if b, err = l.answer(wrap); b != nil || err != nil {
			break
		}
	}
	return b, err
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

// looking returns the look at a version that is under way in this login; it begins one
// where there is none.
func (t *Token) looking(ctx context.Context, a *attachment, v *Version, wrap, anew bool) (l *look, began bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if l := v.look.Load(); l.of(a) {
		return l, false
	}
	l = &look{
		v: v, a: a, epoch: a.epoch.Load(), wrap: wrap, anew: anew,
		opens: make(chan struct{}), told: make(chan struct{}), ended: make(chan struct{}), guess: v.lately(a),
	}
	v.look.Store(l)
	go t.lookOn(context.WithoutCancel(ctx), l)
	return l, true
}

// of tells whether a look is one of the login that an attachment has now.
func (l *look) of(a *attachment) bool { return l != nil && l.a == a && l.epoch == a.epoch.Load() }

// lookOn looks.
func (t *Token) lookOn(ctx context.Context, l *look) {
	ctx, cancel := context.WithTimeout(as(ctx, looker), lookTime)
	defer cancel()
	timer := time.AfterFunc(min(max(lookPatience, usualTimes*time.Duration(l.v.took.Load())), mostPatience), l.isLate)
	defer timer.Stop()
	b, err := t.lookAt(ctx, l)
	l.mu.Lock()
	defer l.mu.Unlock()
	if isCallers(err) {
		if err = l.guess; err == nil {
			err = errorf(Unavailable, errSlow, "version %d of key %s was not examined within %v", l.v.Number, l.v.Key, lookTime)
		}
	}
	if l.late && l.open == nil && definite(err) { // who has not waited for it is told soon
		l.v.pause(l.a, l.epoch, err)
	}
	l.b, l.err, l.over = b, err, true
	l.v.look.CompareAndSwap(l, nil)
	if !l.said {
		l.said = true
		close(l.told)
	}
	close(l.ended)
}

// definite tells whether an error says of a version that it is not to be used.
func definite(err error) bool {
	kind := KindOf(err)
	return kind == KeyUnusable || kind == KeyNotFound
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

// answer is what a look came to for who wants it, or its guess; none of both where it is
// under way and there is none.
func (l *look) answer(wrap bool) (*binding, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case !wrap && l.open != nil:
		return l.open, nil
	case l.over:
		return l.b, l.err
	}
	return nil, l.guess
}

func (l *look) hasOpened() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.open != nil
}

// opened says that the canary was opened. What is guessed from then on is about wraps.
func (l *look) opened(b *binding) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open, l.guess = b, nil
	close(l.opens)
	if OfVersion(b.unfit) {
		l.suspect(b.unfit)
	}
}

// suspects says what a look will most likely come to; those who have waited long are told.
func (l *look) suspects(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.suspect(err)
}

// suspect is called under mu. What the last look came to in the end is the better guess.
func (l *look) suspect(err error) {
	if !definite(l.guess) {
		l.guess = err
	}
	l.tellGuess()
}

func (l *look) isLate() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.late = true
	l.tellGuess()
}

// tellGuess is called under mu.
func (l *look) tellGuess() {
	if l.late && l.guess != nil && !l.said {
		l.said = true
		close(l.told)
	}
}

// suspected returns what was told as a guess of a look that is under way, for who wants to
// open or wrap.
func (v *Version) suspected(a *attachment, wrap bool) error {
	l := v.look.Load()
	if !l.of(a) {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.said && !l.over && (wrap || l.open == nil) {
		return l.guess
	}
	return nil
}

// doubted tells whether a look takes long that finds out anew: another call would take as
// long, and a place.
func (v *Version) doubted(a *attachment) bool {
	l := v.look.Load()
	if !l.of(a) || !l.anew {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.late && l.open == nil
}

// awaitLook waits for what such a look comes to.
func (v *Version) awaitLook(ctx context.Context, a *attachment, wrap bool) error {
	l := v.look.Load()
	if !l.of(a) {
		return nil
	}
	b, err := l.outcome(ctx, wrap, false)
	if err == nil && l.wrap {
		_, err = b.serve(wrap)
	}
	return err
}
