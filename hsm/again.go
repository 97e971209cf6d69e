package hsm

import (
	"context"
	"errors"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// manage runs a function in a session, again where the session was lost. So the function
// may be run after it has done what it does: an answer may be lost, too.
func (t *Token) manage(ctx context.Context, f func(*worker) error) error {
	var last error
	var a *attachment
	for range attempts {
		var err error
		if a, err = t.attached(ctx); err != nil {
			return err
		}
		if err = t.do(ctx, a, f); err == nil {
			a.read.Store(true)
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if known := (*Error)(nil); errors.As(err, &known) && known.Kind != Unavailable {
			return err
		}
		if err := t.again(ctx, a, err); err != nil {
			return err
		}
		last = err
	}
	if errors.As(last, new(cryptoki.Error)) && stepFor(last) != fewer {
		a.unread.Store(true)
		a.breaks(errorf(Unavailable, last, "new sessions and logins do not help"))
	}
	return errorf(Unavailable, last, "tried %d times", attempts)
}

// again does what the failure of a function of manage asks for, and returns an error
// where it is final.
func (t *Token) again(ctx context.Context, a *attachment, err error) error {
	if a.over() {
		return nil
	}
	switch stepFor(err) {
	case newSession, findAgain:
	case fewer:
		a.pause(ctx)
	case loginAgain:
		if err := t.relogin(ctx, a); KindOf(err) == Unauthenticated {
			return err
		}
	case reconnect:
		a.unread.Store(true)
		a.breaks(errorf(Unavailable, err, "the connection to the token is lost"))
	case askCanary:
		if t.examine(ctx, a) == nil {
			return errorf(Broken, err, "the token refuses this, and is well otherwise")
		}
	case giveUp, refuse, fixPIN:
		return errorf(Broken, err, "the token refuses this")
	}
	return nil
}

// relogin logs in again, once for all who lost the login. Who does not wait for it
// leaves it to itself.
func (t *Token) relogin(ctx context.Context, a *attachment) error {
	var w *worker
	if a.alone() {
		var err error
		if w, err = a.acquire(ctx); err != nil {
			return err
		}
	}
	return t.reloginFrom(ctx, a, w)
}

// alone tells whether there is but one session beside that of the login. Then who logs in
// keeps it: the module may be one that must be alone with its thread.
func (a *attachment) alone() bool { return cap(a.places) == 1 }

// reloginFrom is relogin for who has the one session that there is, which it discards; nil
// where there are more.
func (t *Token) reloginFrom(ctx context.Context, a *attachment, w *worker) error {
	leave := func() {
		if w != nil {
			a.discard(w)
		}
	}
	select {
	case a.login <- struct{}{}:
	case <-a.broken:
		leave()
		return nil
	case <-ctx.Done():
		leave()
		return context.Cause(ctx)
	}
	done := make(chan error, 1)
	go func() { // detach waits for it
		done <- t.enterAgain(a)
		leave()
		<-a.login
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// loginLost returns what it means that an operation, begun in an epoch, failed: where the
// token says that nobody is logged in it is seen to that somebody is. It discards the
// session.
func (t *Token) loginLost(ctx context.Context, w *worker, epoch int64, err error) error {
	a := w.a
	if stepFor(err) != loginAgain {
		a.discard(w)
		return err
	}
	if a.alone() {
		w.clean()
	} else {
		a.discard(w)
		w = nil
	}
	switch lost := t.reloginFrom(ctx, a, w); {
	case lost != nil && KindOf(lost) == Unauthenticated:
		return lost
	case lost != nil, a.epoch.Load() != epoch:
		return err
	}
	return unmoved{err}
}

// unmoved is that a token says nobody is logged in where somebody was all the time: another
// login is no cure. Some say so of a key that wants a PIN of its own each time.
type unmoved struct{ error }

func (u unmoved) Unwrap() error { return u.error }

// enterAgain logs in, in another anchor session where that is lost too. The caller has
// a.login.
func (t *Token) enterAgain(a *attachment) error {
	if a.over() {
		return nil
	}
	mark := func(do func() error) error {
		a.logins.Store(t.now())
		defer a.logins.Store(0)
		return do()
	}
	lost := mark(func() error { _, err := a.anchor.State(); return err })
	if stepFor(lost) == newSession {
		if err := mark(func() (err error) { a.anchor, err = t.module.Open(a.slot); return err }); err != nil {
			err := errorf(Unavailable, err, "open a session to log in")
			a.breaks(err)
			return err
		}
	}
	err := t.logIn(a.anchor, a.slot, &a.logins, func() { a.epoch.Add(1) })
	if err != nil && KindOf(err) != Unauthenticated {
		a.breaks(err)
	}
	return err
}
