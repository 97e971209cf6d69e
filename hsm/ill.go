package hsm

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"
)

// strange says what a canary that does not open means: another key, or one or a token that
// is not well. It returns nil where it opens after all.
func (t *Token) strange(ctx context.Context, l *look, keys handles, err error) error {
	switch s := stepFor(err); {
	case saysNothing(err):
	case errors.Is(err, errOpen), s == refuse:
		return l.v.another(err)
	case s == askCanary:
		return t.ill(ctx, l, keys, err)
	case s == reconnect:
		return t.seemsLost(ctx, l, keys, err)
	}
	return err
}

// seemsLost returns what it means that a canary fails as those of lost connections do.
func (t *Token) seemsLost(ctx context.Context, l *look, keys handles, err error) error {
	if errors.As(err, new(unmoved)) { // a moment's matter?
		if again := t.openCanary(ctx, l.a, l.v, keys); !errors.As(again, new(unmoved)) {
			return t.strange(ctx, l, keys, again)
		}
	}
	if t.ask(ctx, l.a, l.v, false) != well {
		return l.a.lost(err)
	}
	l.suspects(l.v.ailing(err, nil))
	switch again := t.openCanary(ctx, l.a, l.v, keys); {
	case again == nil:
		return nil
	case stepFor(again) == reconnect:
		return l.v.ailing(err, nil)
	default:
		return t.strange(ctx, l, keys, again)
	}
}

// lost ends an attachment whose connection is lost.
func (a *attachment) lost(err error) error {
	why := errorf(Unavailable, err, "the connection to the token is lost")
	a.breaks(why)
	return why
}

// another says that the key of a version is another one.
func (v *Version) another(err error) error {
	return errorf(KeyUnusable, err, "the key with the ID %x is not the one that version %d of key %s was made with: it does not open its canary", v.ID, v.Number, v.Key)
}

// moreCanaries is how often a canary that did not open is tried again before that counts.
const moreCanaries = 2

// ill returns what ails keys that do not open their canary, with a code that may be the
// token's. They are others where they open what they wrap, and fail in the same way again
// and again; that they do not wrap proves nothing. Where no other version is served either
// it is an outage of the token.
func (t *Token) ill(ctx context.Context, l *look, keys handles, err error) error {
	a, v := l.a, l.v
	said, failed := t.ask(ctx, a, v, false), error(nil)
	if said == well {
		l.suspects(v.ailing(err, nil))
	}
	if said != unwell {
		failed = t.tryOwn(ctx, a, v, keys)
	}
	sick := func() error {
		a.breaks(errorf(Unavailable, err, "the token neither opens its canary nor anything else"))
		return errorf(Unavailable, err, "the token is not well")
	}
	switch {
	case saysNothing(failed):
		return failed
	case said == unwell, said == nobody && failed != nil:
		return sick()
	}
	for range moreCanaries {
		switch again := t.openCanary(ctx, a, v, keys); {
		case again == nil, saysNothing(again):
			return again // it opens after all: the token had a bad moment
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case again.Error() != err.Error():
			return v.ailing(err, again)
		}
	}
	if failed == nil {
		failed = t.tryOwn(ctx, a, v, keys) // still?
	}
	switch {
	case saysNothing(failed):
		return failed
	case failed != nil && said == nobody:
		return sick()
	case failed != nil:
		return v.ailing(err, failed)
	}
	return v.another(err)
}

// trial is a version's own test: what it came to, or what it wrapped, and until when there
// is none other.
type trial struct {
	until   int64 // by the token's now
	err     error
	wrapped []byte
	sum     [sha256.Size]byte // of what was wrapped
}

// trialPause is how long a version that may make so many wraps only is not tested again
// for those who read.
const trialPause = 10 * time.Minute

// failedPause is how long a test that failed counts.
const failedPause = time.Minute

// tryOwn tells whether keys open now what they wrap. Where wraps are counted it is for long
// the same that they open: reads must not use them up.
func (t *Token) tryOwn(ctx context.Context, a *attachment, v *Version, keys handles) error {
	if last := v.tried.Load(); last != nil && t.now() < last.until {
		if last.err != nil {
			return last.err
		}
		return t.reopen(ctx, a, v, keys, last)
	}
	material := make([]byte, 32)
	_, _ = rand.Read(material) // never fails
	defer clear(material)
	if v.Suite.maxWraps() == 0 {
		_, err := t.try(ctx, a, v, keys)
		return err
	}
	next := &trial{until: t.now() + int64(trialPause), sum: sha256.Sum256(material)}
	if next.wrapped, next.err = t.once(ctx, a, v, v.header(), keys, material, nil, []byte(selfTestAAD), false); next.err == nil {
		next.err = t.reopen(ctx, a, v, keys, next)
	}
	if next.err != nil {
		next.until = t.now() + int64(failedPause)
	}
	if begun(next.err) && !saysNothing(next.err) && !errors.As(next.err, new(uncounted)) {
		v.tried.Store(next)
	}
	return next.err
}

// reopen opens what a trial wrapped.
func (t *Token) reopen(ctx context.Context, a *attachment, v *Version, keys handles, own *trial) error {
	h, iv, ciphertext, err := parseWrapped(own.wrapped)
	if err != nil {
		return err
	}
	out, err := t.once(ctx, a, v, h, keys, ciphertext, iv, []byte(selfTestAAD), true)
	if err != nil {
		return err
	}
	defer clear(out)
	if sha256.Sum256(out) != own.sum {
		return errOpen
	}
	return nil
}

// outage is the outage of a version, or of wraps under it, while the token serves others.
// It is remembered: for a while the version is left alone.
func (v *Version) outage(a *attachment, err error, wraps bool) error {
	if !wraps {
		only := v.ailing(err, nil)
		v.pause(a, a.epoch.Load(), only)
		v.unbind(a) // else it is used while its canary counts
		return only
	}
	only := v.unableToWrap(err)
	v.tests(a, a.token.now(), only)
	return only
}

// unableToWrap is the outage of wraps under a version.
func (v *Version) unableToWrap(err error) error {
	if v.byPublic(err) {
		return v.noPublic(err)
	}
	return v.opensOnly(err)
}

// tryAgain says what it means that keys which open did not wrap, for a reason that may be
// the token's. They are tried again.
func (t *Token) tryAgain(ctx context.Context, l *look, keys handles, err error) (handles, error) {
	a, v := l.a, l.v
	said := t.ask(ctx, a, v, true)
	only := said == well || said == nobody && v.byPublic(err) // then it may be a stranger's doing
	switch {
	case a.over():
		return keys, err
	case only:
		l.suspects(v.unableToWrap(err))
	case stepFor(err) == reconnect && (a.wraps.Load() || time.Duration(t.now()-a.since) > reconnectMax):
		return keys, a.lost(err) // else another connection is no cure, and those who open need this one
	}
	if !only { // it may have been lost since the canary was opened
		if gone := t.openCanary(ctx, a, v, keys); isCallers(gone) {
			return keys, gone
		} else if s := stepFor(gone); gone != nil && (s == reconnect || s == askCanary) {
			return keys, a.lost(gone)
		}
	}
	found, again := t.try(ctx, a, v, keys)
	switch {
	case !mayBeToken(again):
		return found, again
	case only:
		return keys, v.unableToWrap(err)
	}
	return keys, v.leftAlone(a, true, errorf(Broken, err, "the token does not do this, and is well otherwise"))
}

// ailing is the outage of one version.
func (v *Version) ailing(err, failed error) error {
	if failed != nil {
		err = fmt.Errorf("%w (a test of the key: %w)", err, failed)
	}
	e := errorf(Unavailable, err, "the token serves other keys, and does not open the canary of version %d of key %s: "+
		"see what the HSM's own log says of the key with the ID %x; restore it from the HSM's backup if it is damaged, or rotate with 'kms-agent hsm rotate %s' to encrypt meanwhile",
		v.Number, v.Key, v.ID, v.Key)
	e.VersionOnly = true
	return e
}

// opensOnly is the outage of a version's wraps.
func (v *Version) opensOnly(err error) error {
	e := errorf(Unavailable, err, "version %d of key %s opens, and does not wrap, while other keys do: see what the HSM's own log says of the key with the ID %x; "+
		"rotate with 'kms-agent hsm rotate %s' to encrypt meanwhile", v.Number, v.Key, v.ID, v.Key)
	e.VersionOnly = true
	return e
}

// illPause is how long a version is not looked at again that was found ill.
const illPause = time.Second

// illness is what was found of a version, by whom.
type illness struct {
	a     *attachment
	epoch int64
	until int64 // by the token's now
	err   error
}

// lately returns what ailed a version a moment ago.
func (v *Version) lately(a *attachment) error {
	if i := v.illness.Load(); i != nil && i.a == a && i.epoch == a.epoch.Load() && a.token.now() < i.until+int64(10*illPause) {
		return i.err
	}
	return nil
}

func (v *Version) pause(a *attachment, epoch int64, err error) {
	v.illness.Store(&illness{a, epoch, a.token.now() + int64(illPause), err})
}

// pausing returns what ails a version that was looked at just now.
func (v *Version) pausing(a *attachment) error {
	if i := v.illness.Load(); i != nil && i.a == a && i.epoch == a.epoch.Load() && a.token.now() < i.until {
		return i.err
	}
	return nil
}
