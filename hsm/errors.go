package hsm

import (
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// errSlow says that a version could not be examined in time.
var errSlow = errors.New("the module is slow, or all sessions are in use")

// Kind says what an error means for the key.
type Kind uint8

// The kinds; there is no zero kind.
const (
	// Unavailable: the token is not reached, or not now.
	Unavailable Kind = iota + 1
	// Unauthenticated: the PIN was refused, or may not be tried.
	Unauthenticated
	// KeyUnusable: the version is disabled, destroyed, or not the key that it was.
	KeyUnusable
	// KeyNotFound: the token has no such key or version.
	KeyNotFound
	// BadCiphertext: this does not open under this version with this data.
	BadCiphertext
	// Invalid: the request is wrong.
	Invalid
	// Broken: token or module do not do what they must.
	Broken
)

// String returns the kind's name.
func (k Kind) String() string {
	names := [...]string{
		"unknown", "unavailable", "unauthenticated", "key unusable", "key not found", "bad ciphertext", "invalid", "broken",
	}
	if int(k) >= len(names) {
		return names[0]
	}
	return names[k]
}

// Error is how this package fails. It holds nothing secret.
type Error struct {
	Kind Kind
	// VersionOnly says of an outage (Unavailable) that it is one of a version alone, or of
	// wraps under it: the token serves others.
	VersionOnly bool
	// Detail says what happened and what cures it.
	Detail string
	Err    error
}

// Error returns kind, detail and cause.
func (e *Error) Error() string {
	text := e.Kind.String()
	if e.Detail != "" {
		text += ": " + e.Detail
	}
	if e.Err != nil {
		text += ": " + e.Err.Error()
	}
	return text
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// OfVersion tells whether err is an outage of one version, or of wraps under it: it says
// nothing of the token.
func OfVersion(err error) bool {
	e := (*Error)(nil)
	return errors.As(err, &e) && e.Kind == Unavailable && e.VersionOnly
}

// KindOf returns the kind of an error; Broken where it has none.
func KindOf(err error) Kind {
	if e := (*Error)(nil); errors.As(err, &e) {
		return e.Kind
	}
	return Broken
}

func errorf(kind Kind, err error, format string, a ...any) *Error {
	return &Error{Kind: kind, Detail: fmt.Sprintf(format, a...), Err: err}
}

// step is what the failure of a call of the module asks for.
type step uint8

const (
	giveUp     step = iota // nothing that we can do helps
	refuse                 // the caller's data is wrong
	newSession             // this session is lost
	findAgain              // the handle is stale
	loginAgain             // the login is lost
	reconnect              // the connection is lost
	askCanary              // may be the data, may be the token: only a canary tells
	fixPIN                 // somebody must see to the PIN
	fewer                  // there are no more sessions
)

// stepFor says what an error of the module asks for. What modules really return is
// in docs/hsm.md.
func stepFor(err error) step {
	var code cryptoki.Error
	switch {
	case errors.Is(err, errStale):
		return findAgain
	case !errors.As(err, &code):
		return giveUp
	case errors.As(err, new(unmoved)):
		return reconnect
	}
	switch uint(code) {
	case pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED,
		pkcs11.CKR_OPERATION_ACTIVE, pkcs11.CKR_OPERATION_NOT_INITIALIZED:
		return newSession
	case pkcs11.CKR_SESSION_COUNT:
		return fewer
	case pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_OBJECT_HANDLE_INVALID,
		pkcs11.CKR_WRAPPING_KEY_HANDLE_INVALID, pkcs11.CKR_UNWRAPPING_KEY_HANDLE_INVALID:
		return findAgain
	case pkcs11.CKR_USER_NOT_LOGGED_IN:
		return loginAgain
	case pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_TOKEN_NOT_PRESENT,
		pkcs11.CKR_TOKEN_NOT_RECOGNIZED, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_SLOT_ID_INVALID:
		return reconnect
	case pkcs11.CKR_ENCRYPTED_DATA_INVALID, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE, pkcs11.CKR_DATA_INVALID, pkcs11.CKR_DATA_LEN_RANGE,
		pkcs11.CKR_SIGNATURE_INVALID, pkcs11.CKR_SIGNATURE_LEN_RANGE, pkcs11.CKR_WRAPPED_KEY_INVALID, pkcs11.CKR_WRAPPED_KEY_LEN_RANGE:
		return refuse
	case pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_LOCKED,
		pkcs11.CKR_USER_PIN_NOT_INITIALIZED:
		return fixPIN
	case pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_MECHANISM_PARAM_INVALID, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED,
		pkcs11.CKR_KEY_TYPE_INCONSISTENT, pkcs11.CKR_KEY_SIZE_RANGE, pkcs11.CKR_FUNCTION_NOT_SUPPORTED, uint(cryptoki.ActionProhibited),
		pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_ATTRIBUTE_READ_ONLY,
		pkcs11.CKR_TEMPLATE_INCOMPLETE, pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_ARGUMENTS_BAD, pkcs11.CKR_BUFFER_TOO_SMALL,
		pkcs11.CKR_TOKEN_WRITE_PROTECTED:
		return giveUp
	}
	// CKR_GENERAL_ERROR, CKR_FUNCTION_FAILED, CKR_HOST_MEMORY, the vendors' own and
	// what nobody knows.
	return askCanary
}
