package hsm

import (
	"context"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// Check asks the token whether it could serve, with a canary where a key is in use.
// A connection that turns out to be lost is made anew, and one that is lost already is
// tried again soon.
func (t *Token) Check(ctx context.Context) error {
	ctx = as(ctx, looker)
	var last error
	for range attempts {
		a, err := t.attachedAgain(ctx)
		if err != nil {
			return err
		}
		if last = t.examine(ctx, a); last == nil || ctx.Err() != nil || !a.over() {
			break
		}
	}
	if last == nil || isCallers(last) || errors.As(last, new(*Error)) {
		return last
	}
	return errorf(Unavailable, last, "the token is not well")
}

// examine finds out whether the token is well, and sees to a new attachment where
// it is not. That a key is not well says nothing of the token.
func (t *Token) examine(ctx context.Context, a *attachment) error {
	v := t.used.Load()
	if v == nil || v.mayUnwrap() != nil {
		return t.answers(ctx, a)
	}
	return t.examineWith(ctx, a, v, false)
}

// examineWith is examine with a version, which wraps where that is what failed. What
// neither sessions, handles nor logins cure is cured by another connection, if at all.
func (t *Token) examineWith(ctx context.Context, a *attachment, v *Version, wrap bool) error {
	ctx = as(ctx, looker)
	var last error
	epoch := a.epoch.Load()
	for range attempts {
		b, err := t.look(ctx, a, v, false, true)
		if err != nil {
			_, err = t.judge(ctx, a, v, err, false, new(doubts))
		} else if wrap {
			if _, err = t.try(ctx, a, v, b.keys); errors.As(err, new(uncounted)) || denied(err) || OfVersion(err) {
				err = nil // the token answers
			}
		}
		known := (*Error)(nil)
		switch {
		case err == nil:
			a.works(false)
			return nil
		case isCallers(err), ctx.Err() != nil, KindOf(err) == Unauthenticated:
			return err
		case a.cause() != nil:
			return errorf(Unavailable, err, "the token is not well")
		case errors.As(err, &known) && (known.Kind == KeyNotFound || known.Kind == KeyUnusable), OfVersion(err):
			t.used.CompareAndSwap(v, nil)
			return t.answers(ctx, a)
		}
		last = err
	}
	last = errorf(Unavailable, last, "the token does not open what it has wrapped itself")
	if !errors.As(last, new(cryptoki.Error)) || stepFor(last) == fewer {
		return last // who has no session for us has not lost those that we have
	}
	wraps := wrap && v.bound(a, false) != nil
	if t.ask(ctx, a, v, wraps) != well {
		a.breaks(last)
		return last
	}
	if stepFor(last) == loginAgain && a.epoch.Load() != epoch {
		return last // a login that is lost again and again is no key's matter
	}
	_ = v.outage(a, last, wraps)
	t.used.CompareAndSwap(v, nil)
	return t.answers(ctx, a)
}

// answers finds out whether the token answers at all.
func (t *Token) answers(ctx context.Context, a *attachment) error {
	var err error
	for range attempts {
		err = t.do(ctx, a, func(w *worker) error {
			var b [1]byte
			return w.session.Random(b[:])
		})
		if noGenerator(err) {
			return nil // that is an answer
		}
		switch s := stepFor(err); {
		case err == nil, isCallers(err), s == giveUp:
			return err
		case s == fewer:
			a.pause(ctx)
			continue
		case s == newSession:
			continue
		}
		break
	}
	if stepFor(err) == fewer {
		return err // who has no session for us has not lost those that we have
	}
	a.breaks(errorf(Unavailable, err, "the token does not answer"))
	return err
}

// there returns nil where the token of the attachment is there. Where it is not, the
// attachment is over.
func (t *Token) there(ctx context.Context, a *attachment) error {
	err := t.do(ctx, a, func(*worker) error { return t.present(a) })
	if err == nil || isCallers(err) {
		return err
	}
	gone := errorf(Unavailable, err, "the token is gone")
	a.breaks(gone)
	return gone
}

// sure returns nil where the token is well, so that what it does not find is not
// there: only then is that a no, and not an outage.
func (t *Token) sure(ctx context.Context) error {
	a, err := t.attached(ctx)
	if err != nil {
		return err
	}
	if err := t.there(ctx, a); err != nil {
		return err
	}
	if err := t.examine(ctx, a); err != nil && !isCallers(err) {
		return errorf(Unavailable, err, "the token is not well")
	}
	return context.Cause(ctx)
}

// present tells whether the token is still the one that was attached.
func (t *Token) present(a *attachment) error {
	info, err := t.module.Token(a.slot)
	if err != nil {
		return err
	}
	if info.Label != a.info.Label || info.Serial != a.info.Serial || info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
		return fmt.Errorf("there is another token in its slot, %q", info.Label)
	}
	return nil
}
