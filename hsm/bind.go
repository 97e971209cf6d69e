package hsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"time"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// binding is where the keys of a version are during one login of one attachment. It does
// not change; what is found out makes another.
type binding struct {
	a      *attachment
	epoch  int64
	keys   handles
	opened int64 // when they opened the canary, by the token's now
	tested int64 // when it was tried whether they wrap; 0 where nobody wanted to wrap yet
	unfit  error // why the token does not let them wrap, though they open the canary
}

// provenFor is how long a canary speaks for the keys that opened it: a token may put
// another key behind a handle that stays, as NSS does with a key of the same ID.
const provenFor = 8 * time.Second

// bound returns the binding of the version, nil where its keys are to be looked for or,
// for a wrap, to be tested.
func (v *Version) bound(a *attachment, wrap bool) *binding {
	b := v.handles.Load()
	if b == nil || b.a != a || b.epoch != a.epoch.Load() || wrap && b.tested == 0 {
		return nil
	}
	return b
}

// out returns why a version, or wraps under it, are left alone for now.
func (v *Version) out(a *attachment, wrap bool) error {
	if err := v.pausing(a); err != nil {
		return err
	}
	if err := v.suspected(a, wrap); err != nil || !wrap {
		return err
	}
	if b := v.proven(a, true); b != nil && OfVersion(b.unfit) {
		return b.unfit
	}
	return nil
}

// proven is bound where the canary was opened lately. What was found out about wraps
// lasts as long as the binding, but for two things: who may not wrap may again some day,
// and a public key opens no canary.
func (v *Version) proven(a *attachment, wrap bool) *binding {
	return v.provenWithin(a, wrap, provenFor)
}

func (v *Version) provenWithin(a *attachment, wrap bool, most time.Duration) *binding {
	b := v.bound(a, wrap)
	if b == nil {
		return nil
	}
	now, tested := a.token.now(), most
	if b.unfit != nil && KindOf(b.unfit) != KeyUnusable {
		tested = min(most, illPause) // an illness, or an outage, which may be over
	}
	passes := b.unfit != nil || v.Suite.asymmetric()
	if time.Duration(now-b.opened) >= most || wrap && passes && time.Duration(now-b.tested) >= tested {
		return nil
	}
	return b
}

// serve returns the keys of a binding for what it was asked for.
func (b *binding) serve(wrap bool) (handles, error) {
	if wrap && b.unfit != nil {
		return handles{}, b.unfit
	}
	return b.keys, nil
}

func (v *Version) unbind(a *attachment) {
	if b := v.handles.Load(); b != nil && b.a == a {
		v.handles.CompareAndSwap(b, nil)
	}
}

// bind returns the handles of a version. The first time in a login it looks for the
// keys and lets them open the canary: a key of the same name, or even of the same ID,
// may be another. From time to time it lets them open the canary again. The first who
// wraps has them tested.
func (t *Token) bind(ctx context.Context, a *attachment, v *Version, wrap bool) (handles, error) {
	if b := v.proven(a, wrap); b != nil {
		return b.serve(wrap)
	}
	if v.look.Load() != nil {
		if err := v.out(a, wrap); err != nil && roleOf(ctx) != verifier {
			return handles{}, err
		}
		// Somebody opens the canary just now. What it said a moment ago will do.
		if b := v.provenWithin(a, wrap, 2*provenFor); b != nil {
			return b.serve(wrap)
		}
	}
	b, err := t.look(ctx, a, v, wrap, false)
	if err != nil {
		return handles{}, err
	}
	return b.serve(wrap)
}

// prove binds keys that open the canary now. Where they do not there is no binding.
func (t *Token) prove(ctx context.Context, l *look) (*binding, error) {
	a, v := l.a, l.v
	b := &binding{a: a, epoch: l.epoch, opened: t.now()}
	err := error(nil)
	if before := v.bound(a, false); before != nil {
		b.keys, b.tested, b.unfit = before.keys, before.tested, before.unfit
		if err = t.openCanary(ctx, a, v, b.keys); t.mayBeOthers(ctx, l, err) {
			b.tested, b.unfit = 0, nil
			err = t.proveFound(ctx, l, b)
		}
	} else {
		err = t.proveFound(ctx, l, b)
	}
	if denied(err) {
		err = refusal(err)
	}
	switch {
	case err == nil:
		if l.of(a) { // else another look is the one that counts
			v.illness.Store(nil)
			v.handles.Store(b)
		}
		return b, nil
	case OfVersion(err):
		v.pause(a, l.epoch, err)
	}
	if !saysNothing(err) {
		v.unbind(a)
	}
	return nil, err
}

// mayBeOthers tells whether handles that are known may be those of another key, by what
// their canary failed with. Where that may be the token's doing, another key is asked first.
func (t *Token) mayBeOthers(ctx context.Context, l *look, err error) bool {
	s := stepFor(err)
	switch {
	case err == nil, isCallers(err):
		return false
	case s == refuse, s == giveUp:
		return true
	case s != askCanary && s != reconnect:
		return false
	}
	switch said := t.ask(ctx, l.a, l.v, false); {
	case said == unwell, said == nobody && s == reconnect && !errors.As(err, new(unmoved)):
		_ = l.a.lost(err)
		return false
	case said == well:
		l.suspects(l.v.ailing(err, nil))
	}
	return true
}

// proveFound looks for the keys of a version, and has them open its canary.
func (t *Token) proveFound(ctx context.Context, l *look, b *binding) (err error) {
	if b.keys, err = t.locate(ctx, l.a, l.v, l.v.find); err != nil {
		return err
	}
	if err = t.openCanary(ctx, l.a, l.v, b.keys); err != nil {
		err = t.strange(ctx, l, b.keys, err)
	}
	return err
}

// test finds out whether the keys of a binding wrap. What it fails with is about a wrap:
// they go on opening.
func (t *Token) test(ctx context.Context, l *look, b *binding) (*binding, error) {
	next := *b
	next.unfit, next.tested = nil, t.now()
	keys, err := t.try(ctx, l.a, l.v, b.keys)
	if mayBeToken(err) {
		keys, err = t.tryAgain(ctx, l, b.keys, err)
	}
	switch {
	case err == nil:
		next.keys = keys
	case isCallers(err), ctx.Err() != nil, errors.As(err, new(uncounted)):
		return nil, err
	case denied(err):
		next.unfit = refusal(err) // a key whose CKA_ENCRYPT was taken away opens all the same
	case errors.Is(err, errNoPublic), OfVersion(err):
		next.unfit = err
	default:
		next.tested = 0 // nobody wraps with what has just failed
		l.v.handles.CompareAndSwap(b, &next)
		return nil, err
	}
	l.v.handles.CompareAndSwap(b, &next) // else somebody found them stale meanwhile
	return &next, nil
}

// mayBeToken tells whether what a wrap failed with may be the token's matter as well as the
// key's.
func mayBeToken(err error) bool {
	switch stepFor(err) {
	case reconnect, askCanary:
		return true
	case refuse, giveUp: // else it is what we say of it
		return errors.As(err, new(cryptoki.Error)) && !errors.As(err, new(*Error)) && !denied(err)
	case newSession, findAgain, loginAgain, fixPIN, fewer:
	}
	return false
}

// retest has the keys tested before they wrap again.
func (v *Version) retest(a *attachment) { v.tests(a, 0, nil) }

// tests notes when the keys were tested, and why they do not wrap.
func (v *Version) tests(a *attachment, at int64, unfit error) {
	if b := v.bound(a, false); b != nil {
		next := *b
		next.tested, next.unfit = at, unfit
		v.handles.CompareAndSwap(b, &next)
	}
}

// denied tells whether the token has answered that it does not allow this use of a key.
// What stands in an outage is of something else.
func denied(err error) bool {
	var code cryptoki.Error
	return errors.As(err, &code) && code.Policy() && !errors.As(err, new(*Error))
}

// search finds keys, of the login that there is now.
func (t *Token) search(ctx context.Context, a *attachment, find func(cryptoki.Session) (handles, error)) (handles, error) {
	found, epoch := new(handles), a.epoch.Load() // found is the worker's, until it is done
	if err := t.do(ctx, a, func(w *worker) (err error) {
		*found, err = find(w.session)
		return err
	}); err != nil {
		return handles{}, err
	}
	found.epoch = epoch
	return *found, nil
}

// locate finds keys of a version on the token. That they are not there is a no only where the
// token is.
func (t *Token) locate(ctx context.Context, a *attachment, v *Version, find func(cryptoki.Session) (handles, error)) (handles, error) {
	found, err := t.search(ctx, a, find)
	if !errors.Is(err, errNoKey) {
		return found, err
	}
	if err := t.there(ctx, a); err != nil { // no key, or no token?
		return handles{}, err
	}
	if t.cfg.Catalogue != nil && a.since < v.seen {
		// Another process may have made it, and some modules see only what was there
		// when they were initialised.
		return handles{}, t.renew(a)
	}
	return handles{}, errorf(KeyNotFound, nil, "the token has no key with the ID %x of version %d of key %s", v.ID, v.Number, v.Key)
}

// selfTestAAD is what tests of keys are bound to: what they wrap is nobody's.
const selfTestAAD = "kms-agent self-test 1"

// selfTest wraps twice and opens: what a mechanism claims proves nothing, and of a public
// key this alone tells that it goes with the private one.
func (t *Token) selfTest(ctx context.Context, a *attachment, v *Version, keys handles) error {
	material := make([]byte, 32)
	if _, err := rand.Read(material); err != nil {
		return err
	}
	defer clear(material)
	aad := []byte(selfTestAAD)
	var wrapped [2][]byte
	for i := range wrapped {
		var err error
		if wrapped[i], err = t.once(ctx, a, v, v.header(), keys, material, nil, aad, false); err != nil {
			return err
		}
	}
	_, iv, _, _ := parseWrapped(wrapped[0])
	h, other, ciphertext, err := parseWrapped(wrapped[1])
	if err != nil || v.Suite == GCM && bytes.Equal(iv, other) {
		return errorf(Broken, err, "the token used one initialization vector twice: it must not be used")
	}
	out, err := t.once(ctx, a, v, h, keys, ciphertext, other, aad, true)
	if err != nil && !errors.Is(err, errOpen) && stepFor(err) != refuse {
		return err
	}
	defer clear(out)
	if err != nil || !bytes.Equal(out, material) {
		return errorf(Broken, err, "what the token wrapped does not open again: it must not be used")
	}
	return nil
}
