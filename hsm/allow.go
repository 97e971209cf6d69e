package hsm

import (
	"context"
	"errors"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// allow lets the keys of a version be used on the token, or keeps them from it: then
// no program of the token uses them. A token that does not change keys leaves it to
// the record, where that does no harm. Public keys follow where they can: they are
// everybody's. The note says where they did not.
func (t *Token) allow(ctx context.Context, v *Version, yes bool) (note, _ error) {
	left := new(error) // the worker's, until it is done
	err := t.manage(ctx, func(w *worker) error {
		*left = nil
		keys, err := v.find(w.session)
		if errors.Is(err, errNoKey) && !yes {
			return nil
		}
		if err != nil {
			return err
		}
		use := []uint{pkcs11.CKA_DECRYPT}
		if !v.Suite.asymmetric() {
			use = append(use, pkcs11.CKA_ENCRYPT)
		}
		errs := []error{setUses(w.session, keys.key, yes, use...)}
		if keys.mac != 0 {
			errs = append(errs, setUses(w.session, keys.mac, yes, pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY))
		}
		if err := errors.Join(errs...); err != nil || !v.Suite.asymmetric() {
			return err
		}
		*left, err = v.allowPublics(w.session, keys, yes)
		return err
	})
	if err != nil {
		return nil, err
	}
	return *left, nil
}

// allowPublics is allow for the public keys of a pair. For wraps one of them is enough.
func (v *Version) allowPublics(s cryptoki.Session, keys handles, yes bool) (note, _ error) {
	list, err := v.publics(s, keys)
	if errors.Is(err, errNoKey) && !yes {
		return nil, nil
	}
	var left []error
	changed := 0
	if err != nil {
		left = append(left, err)
	}
	for _, k := range list {
		if err := setUses(s, k.public, yes, pkcs11.CKA_ENCRYPT); err != nil {
			left = append(left, err)
			continue
		}
		changed++
	}
	note = errors.Join(left...)
	switch {
	case note != nil && !ofObject(note):
		return nil, note
	case yes && changed > 0:
		return nil, nil
	}
	return note, nil
}

// ofObject tells errors that an object may be the cause of, as its maker left it.
func ofObject(err error) bool {
	switch stepFor(err) {
	case giveUp, refuse, findAgain, askCanary:
		return true
	default:
		return false
	}
}

func setUses(s cryptoki.Session, key cryptoki.Object, yes bool, use ...uint) error {
	var errs []error
	for _, u := range use {
		errs = append(errs, setUse(s, key, u, yes))
	}
	return errors.Join(errs...)
}

// setUse changes what a key may be used for, where it is not so already.
func setUse(s cryptoki.Session, key cryptoki.Object, use uint, yes bool) error {
	now, err := s.Attribute(key, use)
	if err != nil {
		return err
	}
	if len(now) == 1 && (now[0] != 0) == yes {
		return nil
	}
	err = s.SetAttributes(key, []cryptoki.Attribute{cryptoki.Bool(use, yes)})
	if !yes && stepFor(err) == giveUp {
		return nil // the token does not change keys
	}
	return err
}
