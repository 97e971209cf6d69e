package hsm

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// recipe says how keys are made, where tokens differ.
type recipe struct {
	label   string
	onToken bool // else they end with the session
	rsaBits int
	signs   bool // the private key may sign, too
}

// recipes returns how the keys of a suite may be made, the best first. RSA of 3072
// bits has 128 bits of strength, of 2048 bits 112 (SP 800-57 part 1): many TPMs have
// no more. Some tokens make no private key that decrypts and cannot sign: that it may
// sign opens nothing to anybody, since who may sign with it may decrypt with it.
func (s Suite) recipes() []recipe {
	if !s.asymmetric() {
		return []recipe{{}}
	}
	return []recipe{{rsaBits: 3072}, {rsaBits: 3072, signs: true}, {rsaBits: 2048}, {rsaBits: 2048, signs: true}}
}

// errRefused says that the token does not make keys by a recipe.
var errRefused = errors.New("the token makes no such key")

// refused tells whether the token answered, and does not make keys by a recipe.
func refused(err error) bool { return errors.Is(err, errRefused) && KindOf(err) == Broken }

func newID() (id ID, err error) {
	_, err = rand.Read(id[:])
	return id, err
}

// generate makes the keys of v.
func generate(s cryptoki.Session, v *Version, r recipe) (keys handles, err error) {
	if v.Suite.asymmetric() {
		return generatePair(s, v, r)
	}
	use := []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT}
	if keys.key, err = generateSecret(s, pkcs11.CKM_AES_KEY_GEN, pkcs11.CKK_AES, v.ID, r.label, r.onToken, use); err != nil || v.Suite != CBCHMAC {
		return keys, err
	}
	use = []uint{pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY}
	keys.mac, err = generateSecret(s, pkcs11.CKM_GENERIC_SECRET_KEY_GEN, pkcs11.CKK_GENERIC_SECRET, v.macID, r.label+"/mac", r.onToken, use)
	return keys, err
}

// uses are the things that a key may be for; those that it is not for are denied
// one by one, since tokens allow some by themselves.
func uses(allowed []uint, all ...uint) []cryptoki.Attribute {
	var out []cryptoki.Attribute
	for _, use := range all {
		yes := false
		for _, a := range allowed {
			yes = yes || a == use
		}
		out = append(out, cryptoki.Bool(use, yes))
	}
	return out
}

// generateSecret makes a secret key that never leaves the token, and checks that the
// token made what it was asked for.
func generateSecret(s cryptoki.Session, mechanism, kind uint, id ID, label string, onToken bool, allowed []uint) (cryptoki.Object, error) {
	// A token may overwrite a key of the same ID without a word.
	if _, err := one(s, pkcs11.CKO_SECRET_KEY, id); !errors.Is(err, errNoKey) {
		return 0, errors.Join(fmt.Errorf("a key with the ID %x is there already", id), err)
	}
	use := uses(allowed, pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT, pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY,
		pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP, pkcs11.CKA_DERIVE)
	needed := append([]cryptoki.Attribute{
		cryptoki.Number(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), cryptoki.Number(pkcs11.CKA_KEY_TYPE, kind),
		cryptoki.Number(pkcs11.CKA_VALUE_LEN, 32), cryptoki.Bool(pkcs11.CKA_TOKEN, onToken),
		cryptoki.Text(pkcs11.CKA_LABEL, label), {Type: pkcs11.CKA_ID, Value: id[:]},
	}, slices.Concat(inside(), use)...)
	// Not every token knows these.
	wished := []cryptoki.Attribute{cryptoki.Bool(pkcs11.CKA_COPYABLE, false)}
	key, err := s.GenerateKey(mechanism, append(needed, wished...))
	if err != nil && tooMuch(err) {
		key, err = s.GenerateKey(mechanism, needed)
	}
	if err != nil {
		return 0, asRefused(err)
	}
	return key, verify(s, key, use)
}

// asRefused marks what a token answers to a template that it does not take.
func asRefused(err error) error {
	if tooMuch(err) {
		return fmt.Errorf("%w: %w", errRefused, err)
	}
	return err
}

// tooMuch tells errors that an attribute too many may cause, or a value of one.
func tooMuch(err error) bool {
	var code cryptoki.Error
	if !errors.As(err, &code) {
		return false
	}
	switch uint(code) {
	case pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_TEMPLATE_INCOMPLETE,
		pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_KEY_SIZE_RANGE, pkcs11.CKR_GENERAL_ERROR:
		return true
	}
	return false
}

// verify reads back that a key stays inside and does only what it is for.
func verify(s cryptoki.Session, key cryptoki.Object, use []cryptoki.Attribute) error {
	always := []cryptoki.Attribute{cryptoki.Bool(pkcs11.CKA_ALWAYS_SENSITIVE, true), cryptoki.Bool(pkcs11.CKA_NEVER_EXTRACTABLE, true)}
	return readBack(s, key, slices.Concat(inside(), always, use))
}

func generatePair(s cryptoki.Session, v *Version, r recipe) (keys handles, err error) {
	mayPublic, mayPrivate := []uint{pkcs11.CKA_ENCRYPT}, []uint{pkcs11.CKA_DECRYPT}
	if r.signs {
		mayPublic, mayPrivate = append(mayPublic, pkcs11.CKA_VERIFY), append(mayPrivate, pkcs11.CKA_SIGN)
	}
	public := append([]cryptoki.Attribute{
		cryptoki.Number(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), cryptoki.Number(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA),
		cryptoki.Number(pkcs11.CKA_MODULUS_BITS, uint(r.rsaBits)), {Type: pkcs11.CKA_PUBLIC_EXPONENT, Value: publicExponent()},
		cryptoki.Bool(pkcs11.CKA_TOKEN, r.onToken), cryptoki.Text(pkcs11.CKA_LABEL, r.label), {Type: pkcs11.CKA_ID, Value: v.ID[:]},
	}, uses(mayPublic, pkcs11.CKA_ENCRYPT, pkcs11.CKA_VERIFY, pkcs11.CKA_WRAP)...)
	use := uses(mayPrivate, pkcs11.CKA_DECRYPT, pkcs11.CKA_SIGN, pkcs11.CKA_UNWRAP)
	private := append([]cryptoki.Attribute{
		cryptoki.Number(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), cryptoki.Number(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA),
		cryptoki.Bool(pkcs11.CKA_TOKEN, r.onToken), cryptoki.Text(pkcs11.CKA_LABEL, r.label), {Type: pkcs11.CKA_ID, Value: v.ID[:]},
	}, slices.Concat(inside(), use)...)
	keys.public, keys.key, err = s.GenerateKeyPair(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, public, private)
	if err != nil {
		return keys, asRefused(err)
	}
	n, err := modulus(s, keys.public)
	if err != nil {
		return keys, err
	}
	keys.modulus = len(n)
	return keys, verify(s, keys.key, use)
}

// destroy removes the keys of a version from the token, as far as they are there. Where
// all but public keys are gone the error is of type leftPublic.
func destroy(s cryptoki.Session, v *Version) error {
	var errs []error
	for _, p := range v.parts() {
		o, err := one(s, p.class, p.id)
		if errors.Is(err, errNoKey) {
			continue
		}
		if err == nil {
			err = destroyOne(s, o, p.id)
		}
		errs = append(errs, err)
	}
	left := error(nil)
	if v.Suite.asymmetric() {
		left = destroyPublic(s, v.ID)
	}
	err := errors.Join(errs...)
	if err == nil && left != nil && ofObject(left) {
		return leftPublic{left}
	}
	return errors.Join(err, left)
}

// leftPublic is why public keys are left: who made one may have seen to it that it stays.
type leftPublic struct{ error }

func (l leftPublic) Unwrap() error { return l.error }

// destroyPublic destroys the public keys with an ID, those too that somebody else made:
// they are of no use without the private one.
func destroyPublic(s cryptoki.Session, id ID) error {
	found, err := s.Find(publicKeys(id), maxNamesakes)
	errs := []error{err}
	for _, o := range found {
		errs = append(errs, destroyOne(s, o, id))
	}
	return errors.Join(errs...)
}

// destroyOne destroys the object with an ID. There are modules that give one handle
// to two objects and destroy the other one.
func destroyOne(s cryptoki.Session, o cryptoki.Object, id ID) error {
	got, err := s.Attribute(o, pkcs11.CKA_ID)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, id[:]) {
		return fmt.Errorf("the module mistakes the object with the ID %x for another one, %x: nothing is destroyed", id, got)
	}
	return s.Destroy(o)
}
