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
// not among them: see publics.
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
	found, err := v.publics(s, keys)
	if err != nil {
		return keys, err
	}
	return found[0], nil
}

// publics returns the keys with each public key that may be the one of the pair, one at
// least. Whoever reaches the token can make them with the same ID, without a PIN: they must
// have the modulus of the private key, and the exponent that ours have. Where that one does
// not tell its modulus the public key must be alone. Neither proves that the private key
// opens what is wrapped with it, nor that it may wrap: a self-test does. Those that have
// more, too, are preferred.
func (v *Version) publics(s cryptoki.Session, keys handles, more ...cryptoki.Attribute) ([]handles, error) {
	want, err := modulus(s, keys.key)
	known := !errors.Is(err, cryptoki.ErrNoAttribute)
	if known && err != nil {
		return nil, err
	}
	// However many there are beside it, the right one is found by all that it has; in
	// modules that do not know it so, by its ID.
	same := []cryptoki.Attribute{{Type: pkcs11.CKA_MODULUS, Value: want}, {Type: pkcs11.CKA_PUBLIC_EXPONENT, Value: publicExponent()}}
	for _, also := range [][]cryptoki.Attribute{append(more, same...), same} {
		if !known {
			break
		}
		if found, err := s.Find(append(publicKeys(v.ID), also...), maxNamesakes); err == nil {
			if list, err := keys.with(s, found, want); err == nil && len(list) > 0 {
				return list, nil
			}
		}
	}
	found, err := s.Find(publicKeys(v.ID), maxNamesakes)
	if err != nil {
		return nil, err
	}
	if !known && len(found) > 1 {
		return nil, severalKeys(v.ID)
	}
	list, err := keys.with(s, found, want)
	if err == nil && len(list) == 0 {
		err = errNoKey
	}
	return list, err
}

// with returns the keys with each of the public keys that has the modulus, where that is
// known, and our exponent.
func (k handles) with(s cryptoki.Session, found []cryptoki.Object, want []byte) (list []handles, _ error) {
	for _, o := range found {
		n, err := modulus(s, o)
		if err == nil && want != nil && !bytes.Equal(n, want) {
			continue
		}
		ours := false
		if err == nil {
			ours, err = hasOurExponent(s, o)
		}
		switch {
		case err == nil && ours:
			k.public, k.modulus = o, len(n)
			list = append(list, k)
		case err != nil && !foreign(err):
			return nil, err
		}
	}
	return list, nil
}

// foreign tells errors of reading a public key that say it is not ours: it has no such
// attribute, or a huge one, or is gone again.
func foreign(err error) bool {
	s := stepFor(err)
	return s == giveUp || s == findAgain
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

// findPrivate finds private objects. That there are none counts where somebody was logged
// in before the search began: another caller may log in between the search and the question.
func findPrivate(s cryptoki.Session, template []cryptoki.Attribute, limit int) (found []cryptoki.Object, err error) {
	for range 2 {
		if found, err = s.Find(template, limit); err != nil || len(found) > 0 {
			return found, err
		}
		if err = loggedIn(s); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// one returns the private object of a class with an ID; it must be alone. Public objects
// do not count: everybody who reaches the token can make them, without a PIN.
func one(s cryptoki.Session, class uint, id ID) (cryptoki.Object, error) {
	found, err := findPrivate(s, []cryptoki.Attribute{
		cryptoki.Number(pkcs11.CKA_CLASS, class), cryptoki.Bool(pkcs11.CKA_TOKEN, true), cryptoki.Bool(pkcs11.CKA_PRIVATE, true),
		{Type: pkcs11.CKA_ID, Value: id[:]},
	}, 2)
	if err != nil {
		return 0, err
	}
	switch len(found) {
	case 0:
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
