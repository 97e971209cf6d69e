package hsm

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

var errNoKey = errors.New("no such key")

// maxNamesakes is how many public keys of one ID are looked at.
const maxNamesakes = 64

// part is one of the keys of a version.
type part struct {
	class uint
	id    ID
}

// parts returns what a version consists of on the token, beside the public key of a pair.
func (v *Version) parts() []part {
	switch {
	case v.Suite.asymmetric():
		return []part{{pkcs11.CKO_PRIVATE_KEY, v.ID}}
	case v.Suite == CBCHMAC:
		return []part{{pkcs11.CKO_SECRET_KEY, v.ID}, {pkcs11.CKO_SECRET_KEY, v.macID}}
	}
	return []part{{pkcs11.CKO_SECRET_KEY, v.ID}}
}

// find returns the keys that open what the version wrapped. The public key of a pair is
// not among them: see findPublic.
func (v *Version) find(s cryptoki.Session) (keys handles, err error) {
	for i, p := range v.parts() {
		place := []*cryptoki.Object{&keys.key, &keys.mac}[i]
		if *place, err = one(s, p.class, p.id); err != nil {
			return keys, err
		}
		if err = staysInside(s, *place); err != nil {
			return keys, err
		}
	}
	if !v.Suite.asymmetric() {
		return keys, nil
	}
	n, err := modulus(s, keys.key)
	if errors.Is(err, cryptoki.ErrNoAttribute) {
		return keys, nil // then the public key tells
	}
	keys.modulus = len(n)
	return keys, err
}

// findAll is find with the public key of a pair.
func (v *Version) findAll(s cryptoki.Session) (handles, error) {
	keys, err := v.find(s)
	if err != nil || !v.Suite.asymmetric() {
		return keys, err
	}
	return v.findPublic(s, keys)
}

// findPublic adds the public key of a pair. Whoever reaches the token can make one with
// the same ID, without a PIN: it must have the modulus of the private key. Where that one
// does not tell its modulus the public key must be alone. Neither proves that the private
// key opens what is wrapped with it: a self-test does.
func (v *Version) findPublic(s cryptoki.Session, keys handles) (handles, error) {
	found, err := s.Find(publicKeys(v.ID), maxNamesakes)
	if err != nil {
		return keys, err
	}
	want, err := modulus(s, keys.key)
	known := !errors.Is(err, cryptoki.ErrNoAttribute)
	if known && err != nil {
		return keys, err
	}
	if !known && len(found) > 1 {
		return keys, severalKeys(v.ID)
	}
	for _, o := range found {
		n, err := modulus(s, o)
		if errors.Is(err, cryptoki.ErrNoAttribute) || KindOf(err) == KeyUnusable || known && err == nil && !bytes.Equal(n, want) {
			continue
		}
		if err != nil {
			return keys, err
		}
		ours, err := hasOurExponent(s, o)
		if err != nil {
			return keys, err
		}
		if ours {
			keys.public, keys.modulus = o, len(n)
			return keys, nil
		}
	}
	return keys, errNoKey
}

// hasOurExponent tells whether a public key has the exponent that ours are made with, as
// far as the token tells it.
func hasOurExponent(s cryptoki.Session, key cryptoki.Object) (bool, error) {
	e, err := s.Attribute(key, pkcs11.CKA_PUBLIC_EXPONENT)
	if errors.Is(err, cryptoki.ErrNoAttribute) {
		return true, nil
	}
	return bytes.Equal(bytes.TrimLeft(e, "\x00"), publicExponent()), err
}

func publicExponent() []byte { return []byte{1, 0, 1} }

func publicKeys(id ID) []cryptoki.Attribute {
	return []cryptoki.Attribute{
		cryptoki.Number(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), cryptoki.Bool(pkcs11.CKA_TOKEN, true), {Type: pkcs11.CKA_ID, Value: id[:]},
	}
}

// modulus returns the modulus of an RSA key without zeros before it.
func modulus(s cryptoki.Session, key cryptoki.Object) ([]byte, error) {
	value, err := s.Attribute(key, pkcs11.CKA_MODULUS)
	if err != nil {
		return nil, fmt.Errorf("read the modulus of a key: %w", err)
	}
	n := bytes.TrimLeft(value, "\x00")
	if !OAEP.fits(len(n)) {
		return nil, errorf(KeyUnusable, nil, "an RSA key whose modulus has %d bytes", len(n))
	}
	return n, nil
}

// loggedIn returns nil where the session sees private objects. Who has lost the login
// does not find them, which says nothing of them.
func loggedIn(s cryptoki.Session) error {
	state, err := s.State()
	if err != nil || state == pkcs11.CKS_RO_USER_FUNCTIONS || state == pkcs11.CKS_RW_USER_FUNCTIONS {
		return err
	}
	return &cryptoki.CallError{Function: "C_FindObjects", Code: cryptoki.Error(pkcs11.CKR_USER_NOT_LOGGED_IN)}
}

// one returns the private object of a class with an ID; it must be alone. Public objects
// do not count: everybody who reaches the token can make them, without a PIN.
func one(s cryptoki.Session, class uint, id ID) (cryptoki.Object, error) {
	found, err := s.Find([]cryptoki.Attribute{
		cryptoki.Number(pkcs11.CKA_CLASS, class), cryptoki.Bool(pkcs11.CKA_TOKEN, true), cryptoki.Bool(pkcs11.CKA_PRIVATE, true),
		{Type: pkcs11.CKA_ID, Value: id[:]},
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
	return 0, severalKeys(id)
}

func severalKeys(id ID) error {
	return errorf(KeyUnusable, nil, "several keys on the token have the ID %x: remove those that are no keys of ours", id)
}

// inside are the attributes of keys that only who is logged in sees, and nobody takes out.
func inside() []cryptoki.Attribute {
	return []cryptoki.Attribute{
		cryptoki.Bool(pkcs11.CKA_PRIVATE, true), cryptoki.Bool(pkcs11.CKA_SENSITIVE, true), cryptoki.Bool(pkcs11.CKA_EXTRACTABLE, false),
	}
}

// staysInside reads back that a key may not be taken out.
func staysInside(s cryptoki.Session, key cryptoki.Object) error {
	err := readBack(s, key, inside())
	if errors.As(err, new(cryptoki.Error)) {
		return err
	}
	if err != nil {
		return errorf(KeyUnusable, err, "a key that may be taken out of the token, or that everybody sees, is none of ours")
	}
	return nil
}

// readBack returns why a key has not the attributes, all of type CK_BBOOL.
func readBack(s cryptoki.Session, key cryptoki.Object, want []cryptoki.Attribute) error {
	for _, a := range want {
		got, err := s.Attribute(key, a.Type)
		if err != nil {
			return fmt.Errorf("read back attribute %#x of a key: %w", a.Type, err)
		}
		if len(got) != 1 || (got[0] != 0) != (a.Value[0] != 0) {
			return fmt.Errorf("the token has a key with attribute %#x = %v, want %v: it must not be used", a.Type, got, a.Value)
		}
	}
	return nil
}
