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
	now := a.token.now()
	passes := b.unfit != nil || v.Suite.asymmetric()
	if time.Duration(now-b.opened) >= most || wrap && passes && time.Duration(now-b.tested) >= most {
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
	select {
	case v.search <- struct{}{}:
	default:
		// Somebody else opens the canary just now. What it said a moment ago will do.
		if b := v.provenWithin(a, wrap, 2*provenFor); b != nil {
			return b.serve(wrap)
		}
		select {
		case v.search <- struct{}{}:
		case <-ctx.Done():
			return handles{}, context.Cause(ctx)
		}
	}
	defer func() { <-v.search }()
	b := v.proven(a, false)
	if b == nil {
		var err error
		if b, err = t.prove(ctx, a, v); err != nil {
			return handles{}, err
		}
	}
	if wrap && v.proven(a, true) == nil {
		var err error
		if b, err = t.test(ctx, a, v, b); err != nil {
			return handles{}, err
		}
	}
	return b.serve(wrap)
}

// prove binds keys that open the canary now. Where they do not there is no binding. The
// caller has v.search.
func (t *Token) prove(ctx context.Context, a *attachment, v *Version) (*binding, error) {
	b := &binding{a: a, epoch: a.epoch.Load(), opened: t.now()}
	err := error(nil)
	if before := v.bound(a, false); before != nil {
		b.keys, b.tested, b.unfit = before.keys, before.tested, before.unfit
	} else {
		b.keys, err = t.locate(ctx, a, v, v.find)
	}
	if err == nil {
		if err = t.openCanary(ctx, a, v, b.keys); err != nil {
			err = t.strange(ctx, a, v, b.keys, err)
		}
	}
	if err != nil {
		if !isCallers(err) {
			v.unbind(a)
		}
		return nil, err
	}
	v.handles.Store(b)
	return b, nil
}

// test finds out whether the keys of a binding wrap. What it fails with is about a wrap:
// they go on opening. The caller has v.search.
func (t *Token) test(ctx context.Context, a *attachment, v *Version, b *binding) (*binding, error) {
	next := *b
	next.unfit, next.tested = nil, t.now()
	keys, err := t.try(ctx, a, v, b.keys)
	switch {
	case err == nil:
		next.keys = keys
	case denied(err):
		next.unfit = refusal(err) // a key whose CKA_ENCRYPT was taken away opens all the same
	default:
		if !isCallers(err) && ctx.Err() == nil && !errors.As(err, new(uncounted)) {
			next.tested = 0 // nobody wraps with what has just failed
			v.handles.CompareAndSwap(b, &next)
		}
		return nil, err
	}
	v.handles.CompareAndSwap(b, &next) // else somebody found them stale meanwhile
	return &next, nil
}

// errNoPublic says that nothing can be wrapped. It is no word about the key: everybody who
// reaches the token can delete public keys, without a PIN.
var errNoPublic = errors.New("the token has no public key that goes with the private one")

// try tests keys that are said to open. It returns them with those that are for wraps
// alone.
func (t *Token) try(ctx context.Context, a *attachment, v *Version, keys handles) (handles, error) {
	if v.Suite.asymmetric() {
		var err error
		keys, err = t.locate(ctx, a, v, func(s cryptoki.Session) (handles, error) { return v.findPublic(s, keys) })
		if kind := KindOf(err); kind == KeyNotFound || kind == KeyUnusable {
			return keys, errorf(Broken, errNoPublic, "version %d of key %s: rotate the key with 'kms-agent hsm rotate %s'", v.Number, v.Key, v.Key)
		}
		if err != nil {
			return keys, err
		}
	}
	return keys, t.selfTest(ctx, a, v, keys)
}

// denied tells whether the token has answered that it does not allow this use of a key.
// What stands in an outage is of something else.
func denied(err error) bool {
	var code cryptoki.Error
	return errors.As(err, &code) && code.Policy() && !errors.As(err, new(*Error))
}

// locate finds keys of a version on the token.
func (t *Token) locate(ctx context.Context, a *attachment, v *Version, find func(cryptoki.Session) (handles, error)) (handles, error) {
	found := new(handles) // the worker's, until it is done
	err := t.do(ctx, a, func(w *worker) (err error) {
		*found, err = find(w.session)
		return err
	})
	if err == nil {
		return *found, nil
	}
	if !errors.Is(err, errNoKey) {
		return handles{}, err
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

// strange says what a canary that does not open means: another key, or a token that
// is not well. It returns nil where it opens after all.
func (t *Token) strange(ctx context.Context, a *attachment, v *Version, keys handles, err error) error {
	if isCallers(err) || ctx.Err() != nil {
		return err
	}
	switch s := stepFor(err); {
	case errors.Is(err, errOpen), s == refuse:
	case s == askCanary:
		if ill := t.ill(ctx, a, v, keys, err); ill != nil {
			return ill
		}
		if again := t.openCanary(ctx, a, v, keys); again == nil || stepFor(again) != askCanary && stepFor(again) != refuse && !errors.Is(again, errOpen) {
			return again // it was not the key
		}
	default:
		return err
	}
	return errorf(KeyUnusable, err, "the key with the ID %x is not the one that version %d of key %s was made with: it does not open its canary", v.ID, v.Number, v.Key)
}

// errUndecided says that nothing tells whether it is the token or the key.
var errUndecided = errors.New("the token does not open its canary, and whether it is the token or the key cannot be told")

// Undecided tells of an outage of one version, of which nothing tells whether the token or
// the key is its cause.
func Undecided(err error) bool { return errors.Is(err, errUndecided) }

// ill returns why it may be the token's fault that keys do not open their canary; nil
// where the token is well. It wraps and opens with these keys. Where that may not be, the
// canary of another key speaks for the token.
func (t *Token) ill(ctx context.Context, a *attachment, v *Version, keys handles, err error) error {
	_, failed := t.try(ctx, a, v, keys)
	switch {
	case failed == nil, denied(failed):
		return nil
	case isCallers(failed), ctx.Err() != nil:
		return failed
	case errors.As(failed, new(uncounted)), errors.Is(failed, errNoPublic):
		if t.opensAnother(ctx, a, v) {
			return nil
		}
		return errorf(Unavailable, errors.Join(errUndecided, err, failed), "version %d of key %s", v.Number, v.Key)
	case t.opensAnother(ctx, a, v): // what it says of this one is no reason to leave it
		return errorf(Unavailable, errors.Join(errUndecided, err, failed), "version %d of key %s", v.Number, v.Key)
	}
	a.breaks(errorf(Unavailable, err, "the token neither opens its canary nor anything else"))
	return errorf(Unavailable, failed, "the token is not well")
}

// maxWitnesses is how many other versions are asked for their canaries.
const maxWitnesses = 4

// opensAnother tells whether the token opens the canary of another version in use.
func (t *Token) opensAnother(ctx context.Context, a *attachment, v *Version) bool {
	asked := 0
	for _, o := range t.keys.versions() {
		b := o.bound(a, false)
		if b == nil || o.ID == v.ID || o.mayUnwrap() != nil {
			continue
		}
		if asked++; asked > maxWitnesses || a.over() || ctx.Err() != nil {
			break
		}
		if t.openCanary(ctx, a, o, b.keys) == nil {
			return true
		}
	}
	return false
}

// selfTest wraps twice and opens: what a mechanism claims proves nothing, and of a public
// key this alone tells that it goes with the private one.
func (t *Token) selfTest(ctx context.Context, a *attachment, v *Version, keys handles) error {
	material := make([]byte, 32)
	if _, err := rand.Read(material); err != nil {
		return err
	}
	defer clear(material)
	aad := []byte("kms-agent self-test 1")
	var wrapped [2][]byte
	for i := range wrapped {
		err := t.count(v)
		if err != nil {
			return err
		}
		if wrapped[i], err = t.once(ctx, a, v, v.header(), keys, nil, material, nil, aad, false); err != nil {
			return err
		}
	}
	_, iv, _, _ := parseWrapped(wrapped[0])
	h, other, ciphertext, err := parseWrapped(wrapped[1])
	if err != nil || v.Suite == GCM && bytes.Equal(iv, other) {
		return errorf(Broken, err, "the token used one initialization vector twice: it must not be used")
	}
	out, err := t.once(ctx, a, v, h, keys, nil, ciphertext, other, aad, true)
	if err != nil && !errors.Is(err, errOpen) && stepFor(err) != refuse {
		return err
	}
	defer clear(out)
	if err != nil || !bytes.Equal(out, material) {
		return errorf(Broken, err, "what the token wrapped does not open again: it must not be used")
	}
	return nil
}
