package hsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// State says what a version may be used for.
type State uint8

// The states; there is no zero state.
const (
	// Enabled versions wrap and unwrap.
	Enabled State = iota + 1
	// Disabled versions do neither.
	Disabled
	// Destroyed versions have no key on the token any more.
	Destroyed
)

// String returns "enabled", "disabled" or "destroyed".
func (s State) String() string {
	switch s {
	case Enabled:
		return "enabled"
	case Disabled:
		return "disabled"
	case Destroyed:
		return "destroyed"
	}
	return "unknown"
}

func parseState(text string) (State, error) {
	for _, s := range []State{Enabled, Disabled, Destroyed} {
		if s.String() == text {
			return s, nil
		}
	}
	return 0, fmt.Errorf("no state %q", text)
}

// Version is one version of a key, as the catalogue on the token describes it.
// It does not change; another State makes another Version.
type Version struct {
	Key     string
	Number  uint32
	Suite   Suite
	State   State
	ID      ID
	Created time.Time

	style     IVStyle
	macID     ID     // of CBCHMAC
	canary    []byte // wrapped when the version was made
	canarySum [32]byte
	takes     int   // bytes of material that the token wraps itself
	seen      int64 // by the token's now; 0 for one that is being made

	handles atomic.Pointer[binding]
	search  chan struct{} // has room for the one that looks for the keys
	used    vectors
}

// binding is where the keys of a version are during one login of one attachment.
type binding struct {
	a      *attachment
	epoch  int64
	opened int64 // when they opened the canary, by the token's now
	keys   handles
	unfit  error // why the token does not let the keys wrap, though they open the canary
}

// provenFor is how long a canary speaks for the keys that opened it: a token may put
// another key behind a handle that stays, as NSS does with a key of the same ID.
const provenFor = 8 * time.Second

// bound returns the keys of the version, nil where they are to be looked for.
func (v *Version) bound(a *attachment) *handles {
	if b := v.handles.Load(); b != nil && b.a == a && b.epoch == a.epoch.Load() {
		return &b.keys
	}
	return nil
}

// proven is bound where the canary was opened lately.
func (v *Version) proven(a *attachment) *handles {
	if b := v.handles.Load(); b != nil && time.Duration(a.token.now()-b.opened) < provenFor {
		return v.bound(a)
	}
	return nil
}

func (v *Version) unbind(a *attachment) {
	if b := v.handles.Load(); b != nil && b.a == a {
		v.handles.CompareAndSwap(b, nil)
	}
}

func (v *Version) header() header { return header{suite: v.Suite, id: v.ID, version: v.Number} }

// canaryAAD is what the canary is bound to: with the header it is all that must not
// change in the catalogue.
func (v *Version) canaryAAD() []byte { return canaryAAD(v.Key, v.macID) }

func canaryAAD(key string, macID ID) []byte {
	out := append([]byte("kms-agent canary 1"), macID[:]...)
	return append(binary.BigEndian.AppendUint64(out, uint64(len(key))), key...)
}

func (v *Version) mayWrap() error { return v.mayUnwrap() }

func (v *Version) mayUnwrap() error {
	if v.State != Enabled {
		return errorf(KeyUnusable, nil, "version %d of key %s is %s", v.Number, v.Key, v.State)
	}
	return nil
}

// bind returns the handles of a version. The first time in a login it looks for the
// keys, lets them open the canary and tests them: a key of the same name, or even of
// the same ID, may be another. From time to time it lets them open the canary again.
func (t *Token) bind(ctx context.Context, a *attachment, v *Version) (handles, error) {
	if keys := v.proven(a); keys != nil {
		return *keys, nil
	}
	select {
	case v.search <- struct{}{}:
	default:
		if keys := v.bound(a); keys != nil {
			return *keys, nil // somebody else opens the canary just now
		}
		select {
		case v.search <- struct{}{}:
		case <-ctx.Done():
			return handles{}, context.Cause(ctx)
		}
	}
	defer func() { <-v.search }()
	if keys := v.proven(a); keys != nil {
		return *keys, nil
	}
	b := &binding{a: a, epoch: a.epoch.Load(), opened: t.now()}
	if err := t.prove(ctx, a, v, b); err != nil {
		if !isCallers(err) {
			v.unbind(a)
		}
		return handles{}, err
	}
	v.handles.Store(b)
	return b.keys, nil
}

// prove sets the keys of a binding, which have opened the canary.
func (t *Token) prove(ctx context.Context, a *attachment, v *Version, b *binding) error {
	before := v.bound(a)
	if before != nil {
		b.keys = *before
	} else {
		var err error
		if b.keys, err = t.locate(ctx, a, v); err != nil {
			return err
		}
	}
	if err := t.openCanary(ctx, a, v, b.keys); err != nil {
		if err = t.strange(ctx, a, v, b.keys, err); err != nil {
			return err
		}
	}
	if before != nil && v.unfit(a) == nil {
		return nil
	}
	err := t.selfTest(ctx, a, v, b.keys)
	var code cryptoki.Error
	switch {
	case errors.As(err, new(uncounted)):
		return nil // the canary has to do
	case errors.As(err, &code) && code.Policy():
		b.unfit = refusal(err) // a key whose CKA_ENCRYPT was taken away opens all the same
		return nil
	}
	return err
}

// unfit says why the keys that the version is bound to may not wrap; nil where they may.
func (v *Version) unfit(a *attachment) error {
	if b := v.handles.Load(); b != nil && b.a == a {
		return b.unfit
	}
	return nil
}

// Verify tells why a version is not what its record says: its keys are gone from the
// token, or others. Those of a disabled version are looked for alone.
func (t *Token) Verify(ctx context.Context, v *Version) error {
	if v.State == Destroyed {
		return nil
	}
	a, err := t.attached(ctx)
	if err != nil {
		return err
	}
	if v.State == Enabled {
		_, err = t.bind(ctx, a, v)
	} else {
		_, err = t.locate(ctx, a, v)
	}
	return err
}

// locate finds the keys of a version on the token.
func (t *Token) locate(ctx context.Context, a *attachment, v *Version) (handles, error) {
	found := new(handles) // the worker's, until it is done
	err := t.do(ctx, a, func(w *worker) (err error) {
		*found, err = v.find(w.session)
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

// part is one of the keys of a version.
type part struct {
	class uint
	id    ID
}

// parts returns what a version consists of on the token.
func (v *Version) parts() []part {
	switch {
	case v.Suite.asymmetric():
		return []part{{pkcs11.CKO_PRIVATE_KEY, v.ID}, {pkcs11.CKO_PUBLIC_KEY, v.ID}}
	case v.Suite == CBCHMAC:
		return []part{{pkcs11.CKO_SECRET_KEY, v.ID}, {pkcs11.CKO_SECRET_KEY, v.macID}}
	}
	return []part{{pkcs11.CKO_SECRET_KEY, v.ID}}
}

// find returns the keys of the version.
func (v *Version) find(s cryptoki.Session) (keys handles, err error) {
	places := []*cryptoki.Object{&keys.key, &keys.mac}
	if v.Suite.asymmetric() {
		places[1] = &keys.public
	}
	for i, p := range v.parts() {
		if *places[i], err = one(s, p.class, p.id); err != nil {
			return keys, err
		}
	}
	if keys.public != 0 {
		keys.modulus, err = modulus(s, keys.public)
	}
	return keys, err
}

// modulus returns the length of a public key's modulus in bytes.
func modulus(s cryptoki.Session, public cryptoki.Object) (int, error) {
	value, err := s.Attribute(public, pkcs11.CKA_MODULUS)
	if err != nil {
		return 0, fmt.Errorf("read the modulus of a public key: %w", err)
	}
	n := len(bytes.TrimLeft(value, "\x00"))
	if !OAEP.fits(n) {
		return 0, errorf(KeyUnusable, nil, "a public key whose modulus has %d bytes", n)
	}
	return n, nil
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

var errNoKey = errors.New("no such key")

// loggedIn returns nil where the session sees private objects. Who has lost the login
// does not find them, which says nothing of them.
func loggedIn(s cryptoki.Session) error {
	state, err := s.State()
	if err != nil || state == pkcs11.CKS_RO_USER_FUNCTIONS || state == pkcs11.CKS_RW_USER_FUNCTIONS {
		return err
	}
	return &cryptoki.CallError{Function: "C_FindObjects", Code: cryptoki.Error(pkcs11.CKR_USER_NOT_LOGGED_IN)}
}

// one returns the object of a class with an ID; it must be alone.
func one(s cryptoki.Session, class uint, id ID) (cryptoki.Object, error) {
	found, err := s.Find([]cryptoki.Attribute{
		cryptoki.Number(pkcs11.CKA_CLASS, class), cryptoki.Bool(pkcs11.CKA_TOKEN, true), {Type: pkcs11.CKA_ID, Value: id[:]},
	}, 2)
	if err != nil {
		return 0, err
	}
	switch len(found) {
	case 0:
		if err := loggedIn(s); err != nil {
			return 0, err
		}
		return 0, errNoKey
	case 1:
		return found[0], nil
	}
	return 0, errorf(KeyUnusable, nil, "several keys on the token have the ID %x: remove those that are no keys of ours", id)
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
		if other := t.selfTest(ctx, a, v, keys); errors.As(other, new(uncounted)) {
			return errorf(Unavailable, err, "the token does not open its canary, and whether it is the token or the key cannot be tried: %v", other)
		} else if other != nil {
			a.breaks(errorf(Unavailable, err, "the token neither opens its canary nor anything else"))
			return errorf(Unavailable, other, "the token is not well")
		}
		if again := t.openCanary(ctx, a, v, keys); again == nil || stepFor(again) != askCanary && stepFor(again) != refuse && !errors.Is(again, errOpen) {
			return again // it was not the key
		}
	default:
		return err
	}
	return errorf(KeyUnusable, err, "the key with the ID %x is not the one that version %d of key %s was made with: it does not open its canary", v.ID, v.Number, v.Key)
}

// selfTest wraps twice and opens: what a mechanism claims proves nothing.
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
	if err != nil {
		return err
	}
	defer clear(out)
	if !bytes.Equal(out, material) {
		return errorf(Broken, nil, "what the token wrapped opens to something else: it must not be used")
	}
	return nil
}
