package hsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// CreateKey makes a key with its first version on the token. Suite 0 takes the
// first of Suites that works.
func (t *Token) CreateKey(ctx context.Context, name string, suite Suite) (*Key, error) {
	if err := checkName(name); err != nil {
		return nil, errorf(Invalid, err, "")
	}
	if err := t.isNew(ctx, name); err != nil {
		return nil, err
	}
	if err := t.mayCreate(ctx, name); err != nil {
		return nil, err
	}
	return t.addVersion(ctx, &Key{Name: name}, suite)
}

// isNew returns nil where there is no record of a key.
func (t *Token) isNew(ctx context.Context, name string) error {
	switch _, err := t.readKey(ctx, name); {
	case err == nil:
		return errorf(Invalid, nil, "key %s exists already: rotate it instead", name)
	case errors.Is(err, errNoCatalogue):
		return t.cfg.Catalogue.mayBegin()
	case KindOf(err) != KeyNotFound:
		return err
	}
	return nil
}

// Rotate makes a new version and lets new data keys be wrapped under it. Suite 0
// keeps that of the version before.
func (t *Token) Rotate(ctx context.Context, name string, suite Suite) (*Key, error) {
	k, err := t.readKey(ctx, name)
	if err != nil {
		return nil, err
	}
	if suite == 0 {
		v, err := k.Version(k.Current)
		if err != nil {
			return nil, err
		}
		suite = v.Suite
	}
	return t.addVersion(ctx, k, suite)
}

// addVersion makes a version and then the record that names it: what is cut off
// leaves a key that nobody uses.
func (t *Token) addVersion(ctx context.Context, k *Key, suite Suite) (*Key, error) {
	number := uint32(1)
	if n := len(k.Versions); n > 0 {
		number = k.Versions[n-1].Number + 1
	}
	candidates := []Suite{suite}
	if suite == 0 {
		candidates = Suites()
	}
	var tried []error
	for _, s := range candidates {
		v, err := t.newVersion(ctx, k.Name, number, s)
		if err == nil {
			next := &Key{Name: k.Name, Current: number, Versions: append(append([]*Version(nil), k.Versions...), v), revision: k.revision}
			written, err := t.write(ctx, next)
			if kind := KindOf(err); err != nil && (kind == Invalid || kind == Broken) && ctx.Err() == nil {
				t.abandon(ctx, v)
			}
			return written, err
		}
		if KindOf(err) == Unavailable || KindOf(err) == Unauthenticated || ctx.Err() != nil {
			return nil, err
		}
		tried = append(tried, fmt.Errorf("%v: %w", s, err))
	}
	if suite != 0 {
		return nil, errorf(Broken, errors.Join(tried...), "the token cannot do this suite")
	}
	return nil, errorf(Broken, errors.Join(tried...), "the token can do none of the suites")
}

// abandon destroys the keys of a version that is in no record. Where that is not sure
// they stay: keys that nobody uses do no harm, and the record of another administrator
// may have the version.
func (t *Token) abandon(ctx context.Context, v *Version) {
	keys, err := t.readKeys(ctx, v.Key)
	if err != nil {
		return
	}
	for _, k := range keys {
		if k.Name == v.Key && k.Conflict != nil || slices.ContainsFunc(k.Versions, func(o *Version) bool { return o.ID == v.ID }) {
			return
		}
	}
	t.undo(ctx, v)
}

// newVersion tries a suite, then makes keys that stay and their canary.
func (t *Token) newVersion(ctx context.Context, key string, number uint32, suite Suite) (*Version, error) {
	trial, err := t.trial(ctx, suite)
	if err != nil {
		return nil, err
	}
	v, err := t.newKeys(ctx, key, number, suite, trial)
	if mishap(err) {
		v, err = t.newKeys(ctx, key, number, suite, trial)
	}
	return v, err
}

// mishap tells whether what a new key failed with may be a moment's matter, and is tried once
// more before it is taken for a no of the token.
func mishap(err error) bool {
	s := stepFor(err)
	return err != nil && KindOf(err) == Broken && (s == askCanary || s == reconnect)
}

// newKeys makes the keys of a version, and their canary.
func (t *Token) newKeys(ctx context.Context, key string, number uint32, suite Suite, trial Trial) (*Version, error) {
	v := &Version{
		Key: key, Number: number, Suite: suite, State: Enabled, Created: time.Now().UTC().Truncate(time.Second),
		style: trial.style, takes: suite.takes(trial.RSABits / 8),
	}
	var err error
	if v.ID, err = newID(); err != nil {
		return nil, err
	}
	if suite == CBCHMAC {
		if v.macID, err = newID(); err != nil {
			return nil, err
		}
	}
	if err = t.makeKeys(ctx, v, trial); err == nil {
		err = t.setCanary(ctx, v)
	}
	if err != nil {
		t.undo(ctx, v)
		return nil, err
	}
	return v, nil
}

// undo destroys the keys of a version that nobody will know of.
func (t *Token) undo(ctx context.Context, v *Version) {
	whole, end := t.toTheEnd(ctx)
	defer end()
	_ = t.remove(whole, v)
}

// toTheEnd returns a context for what leaves something on the token where it is cut
// off: it ends with end, or where the token is dead.
func (t *Token) toTheEnd(ctx context.Context) (_ context.Context, end func()) {
	whole, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-t.dead:
			cancel(t.Err())
		case <-whole.Done():
		}
	})
	return whole, func() { cancel(nil); watch.Wait() }
}

// makeKeys makes the keys of v on the token. They may sign only if the token refuses
// others now, too: what it answered to the trial may have been a mishap.
func (t *Token) makeKeys(ctx context.Context, v *Version, like Trial) error {
	r := recipe{label: fmt.Sprintf("%s%s/v%d", labelPrefix, v.Key, v.Number), onToken: true, rsaBits: like.RSABits}
	try := func(w *worker) error {
		if err := destroy(w.session, v); err != nil && !errors.As(err, new(leftPublic)) { // of an attempt that was cut off
			return err
		}
		_, err := generate(w.session, v, r)
		return err
	}
	err := t.manage(ctx, try)
	if !like.Signs || !refused(err) {
		return err
	}
	t.renewNow(ctx) // the module may keep what it has of the key that it refused
	r.signs = true
	return t.manage(ctx, try)
}

// remove destroys the keys of a version. There are modules that hold a key with which
// something failed, give its handle to others when it is gone, and keep what they had
// of it in the HSM, where there is little room: until they are initialised again.
func (t *Token) remove(ctx context.Context, v *Version) error {
	gone := func(w *worker) error { return destroy(w.session, v) }
	err := t.manage(ctx, gone)
	t.renewNow(ctx)
	if err == nil || KindOf(err) != Broken {
		return err
	}
	return t.manage(ctx, gone)
}

// setCanary wraps a random secret under a new version, and tests the version: again where
// sessions, handles, the login or the connection were lost meanwhile.
func (t *Token) setCanary(ctx context.Context, v *Version) error {
	var last error
	for range attempts {
		a, err := t.attached(ctx)
		if err != nil {
			return err
		}
		switch last = t.tryCanary(ctx, a, v); {
		case last == nil, isCallers(last):
			return last
		case a.over() && KindOf(last) == Unavailable:
			continue // it was found lost meanwhile
		case errors.As(last, new(*Error)):
			return last
		}
		switch stepFor(last) {
		case newSession, findAgain, loginAgain, fewer:
		case reconnect:
			if errors.As(last, new(unmoved)) || t.ask(ctx, a, v, false) == well {
				return last // that is no lost connection
			}
		case giveUp, refuse, fixPIN, askCanary:
			return last
		}
		if err := t.again(ctx, a, last); err != nil {
			return err
		}
	}
	return errorf(Unavailable, last, "tried %d times", attempts)
}

func (t *Token) tryCanary(ctx context.Context, a *attachment, v *Version) error {
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return err
	}
	defer clear(secret)
	v.canarySum = sha256.Sum256(secret)
	keys, err := t.locate(ctx, a, v, v.findAll)
	if err != nil {
		return err
	}
	if v.canary, err = t.once(ctx, a, v, v.header(), keys, secret, nil, v.canaryAAD(), false); err != nil {
		return err
	}
	if err := t.openCanary(ctx, a, v, keys); err != nil {
		return err
	}
	return t.selfTest(ctx, a, v, keys)
}

// write puts a key's record in the place of the one before.
func (t *Token) write(ctx context.Context, k *Key) (*Key, error) {
	k.revision++
	var err error
	if t.cfg.Catalogue != nil {
		err = t.cfg.Catalogue.replace(k)
	} else {
		err = t.writeObject(ctx, k)
	}
	if err != nil {
		return nil, err
	}
	t.keys.forget(k.Name)
	return t.readKey(ctx, k.Name)
}

// writeObject puts a key's record on the token.
func (t *Token) writeObject(ctx context.Context, k *Key) error {
	value, err := k.marshal()
	if err != nil {
		return errorf(Invalid, err, "")
	}
	return t.manage(ctx, func(w *worker) error { return k.put(w, value) })
}

// put makes value, the record of k, the only one. It may have done so before, without
// the answer having arrived.
func (k *Key) put(w *worker, value []byte) error {
	ours := func(e entry) bool { return bytes.Equal(e.value, value) }
	list, err := entries(w, k.Name)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(list, ours) {
		if err := k.create(w.session, value); err != nil {
			return err
		}
		if list, err = entries(w, k.Name); err != nil {
			return err
		}
	}
	// With two administrators at work one of them must lose.
	lost := !slices.ContainsFunc(list, ours) || slices.ContainsFunc(list, func(e entry) bool { return !ours(e) && e.key.revision >= k.revision })
	for _, e := range list {
		if ours(e) == lost {
			if err := w.session.Destroy(e.object); err != nil && stepFor(err) != findAgain {
				return err
			}
		}
	}
	if lost {
		return errorf(Invalid, nil, "somebody else changes key %s just now: try again", k.Name)
	}
	return nil
}

// create makes a private data object of a record.
func (k *Key) create(s cryptoki.Session, value []byte) error {
	_, err := s.Create([]cryptoki.Attribute{
		cryptoki.Number(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), cryptoki.Bool(pkcs11.CKA_TOKEN, true), cryptoki.Bool(pkcs11.CKA_PRIVATE, true),
		cryptoki.Text(pkcs11.CKA_APPLICATION, application), cryptoki.Text(pkcs11.CKA_LABEL, labelPrefix+k.Name),
		{Type: pkcs11.CKA_VALUE, Value: value},
	})
	if err != nil && stepFor(err) == giveUp {
		return errorf(Broken, err, "the token takes no private data objects: name a file for the catalogue (settings catalogue_file and catalogue_key_file)")
	}
	return err
}

// SetState disables or enables a version: in the record, and at the key itself on
// tokens that allow it, so that other programs of the token do not use it either.
func (t *Token) SetState(ctx context.Context, name string, number uint32, state State) (*Key, error) {
	if state != Enabled && state != Disabled {
		return nil, errorf(Invalid, nil, "a version is enabled or disabled; Destroy destroys it")
	}
	var before *Version
	check := func(v *Version) (State, error) {
		if before = v; v.State == Destroyed {
			return 0, errorf(Invalid, nil, "version %d of key %s is destroyed", number, name)
		}
		return state, nil
	}
	if state == Disabled { // the record is what counts; the key follows where it can
		k, err := t.change(ctx, name, number, check)
		if err != nil {
			return k, err
		}
		note, err := t.allow(ctx, before, false)
		return k.noted(note), err
	}
	k, err := t.readKey(ctx, name)
	if err != nil {
		return nil, err
	}
	v, err := k.Version(number)
	if err != nil {
		return nil, err
	}
	var note error
	if v.State == Disabled {
		if note, err = t.allow(ctx, v, true); err != nil {
			return nil, err
		}
	}
	k, err = t.change(ctx, name, number, check)
	return k.noted(note), err
}

// noted returns the key with what of its public keys did not follow a change.
func (k *Key) noted(left error) *Key {
	if k == nil || left == nil {
		return k
	}
	noted := *k // the other one is in the keyring
	first, _, _ := strings.Cut(left.Error(), "\n")
	noted.Note = "public keys on the token did not follow, as whoever made them may have seen to: " + first
	return &noted
}

// Destroy destroys the key of a version, which must be disabled. What is wrapped
// under it never opens again.
func (t *Token) Destroy(ctx context.Context, name string, number uint32) (*Key, error) {
	var gone *Version
	k, err := t.change(ctx, name, number, func(v *Version) (State, error) {
		if gone = v; v.State == Enabled {
			return 0, errorf(Invalid, nil, "version %d of key %s is enabled: disable it first, and wait until you are sure", number, name)
		}
		return Destroyed, nil
	})
	if err != nil {
		return nil, err
	}
	err = t.remove(ctx, gone)
	if left := (leftPublic{}); errors.As(err, &left) {
		return k.noted(left.error), nil
	}
	if err != nil {
		return nil, err
	}
	return k, nil
}

// change writes a record in which one version has another state.
func (t *Token) change(ctx context.Context, name string, number uint32, to func(*Version) (State, error)) (*Key, error) {
	k, err := t.readKey(ctx, name)
	if err != nil {
		return nil, err
	}
	next := &Key{Name: name, Current: k.Current, revision: k.revision}
	found := false
	for _, v := range k.Versions {
		if v.Number == number {
			found = true
			state, err := to(v)
			if err != nil {
				return nil, err
			}
			v = v.with(state)
		}
		next.Versions = append(next.Versions, v)
	}
	if !found {
		return nil, errorf(KeyNotFound, nil, "key %s has no version %d", name, number)
	}
	return t.write(ctx, next)
}

// with returns the version in another state.
func (v *Version) with(state State) *Version {
	return &Version{
		Key: v.Key, Number: v.Number, Suite: v.Suite, State: state, ID: v.ID, Created: v.Created, style: v.style, macID: v.macID,
		canary: v.canary, canarySum: v.canarySum, takes: v.takes,
	}
}
