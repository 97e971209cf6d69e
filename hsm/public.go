package hsm

import (
	"context"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// errNoPublic says that nothing can be wrapped. It is no word about the key: everybody who
// reaches the token can delete public keys, and change them, without a PIN.
var errNoPublic = errors.New("the token has no public key that goes with the private one and may encrypt")

// noPublic is the outage of wraps that this is. The last public key that was tried may say
// why it was none.
func (v *Version) noPublic(last error) error {
	err := errNoPublic
	if last != nil {
		err = fmt.Errorf("%w: %s", errNoPublic, last.Error())
	}
	e := errorf(Unavailable, err, "version %d of key %s opens, and does not wrap: rotate the key with 'kms-agent hsm rotate %s'", v.Number, v.Key, v.Key)
	e.VersionOnly = true
	return e
}

// try tests keys that are said to open. It returns them with those that are for wraps
// alone: of public keys that may be the right one the first that passes.
func (t *Token) try(ctx context.Context, a *attachment, v *Version, keys handles) (handles, error) {
	if !v.Suite.asymmetric() {
		return keys, t.selfTest(ctx, a, v, keys)
	}
	found := new([]handles) // the worker's, until it is done
	_, err := t.locate(ctx, a, v, func(s cryptoki.Session) (_ handles, err error) {
		*found, err = v.publics(s, keys, cryptoki.Bool(pkcs11.CKA_ENCRYPT, true))
		return keys, err
	})
	if kind := KindOf(err); kind == KeyNotFound || kind == KeyUnusable {
		return keys, v.noPublic(nil)
	}
	if err != nil {
		return keys, err
	}
	var refused, doubtful error
	for _, candidate := range *found {
		err := t.selfTest(ctx, a, v, candidate)
		if err == nil {
			return candidate, nil
		}
		if isCallers(err) || ctx.Err() != nil || a.over() {
			return keys, err
		}
		switch stepFor(err) {
		case giveUp, refuse: // it is a stranger's
			refused = err
		case askCanary, findAgain:
			doubtful = err
		default:
			return keys, err
		}
	}
	if doubtful != nil {
		return keys, doubtful
	}
	return keys, v.noPublic(refused)
}

// byPublic tells whether it is a public key that a call failed with: that says nothing of
// the private one, and may be a stranger's doing.
func (v *Version) byPublic(err error) bool {
	var call *cryptoki.CallError
	return v.Suite.asymmetric() && errors.As(err, &call) && (call.Function == "C_EncryptInit" || call.Function == "C_Encrypt")
}
