package plugins

import (
	"context"
	"crypto/subtle"
	"errors"
)

// ErrUnproven says that a backend does not open what it has wrapped, or opens it to
// something else. Such a wrap must not be used: it would lose data.
var ErrUnproven = errors.New("the backend wrapped a key that it does not unwrap")

// WrapProven wraps plaintext and returns the ciphertext once the backend has opened
// it again, and to the same: a broken wrap must never lose data. Errors are those of
// Backend's Wrap and Unwrap; one of class Internal wraps ErrUnproven.
func WrapProven(ctx context.Context, backend Backend, key KeyRef, plaintext []byte, b Binding) ([]byte, error) {
	if one, ok := backend.(interface {
		WrapProven(ctx context.Context, key KeyRef, plaintext []byte, b Binding) ([]byte, error)
	}); ok {
		return one.WrapProven(ctx, key, plaintext, b)
	}
	ciphertext, err := backend.Wrap(ctx, key, plaintext, b)
	if err != nil {
		return nil, err
	}
	if err := prove(ctx, backend, key, plaintext, ciphertext, b); err != nil {
		return nil, err
	}
	return ciphertext, nil
}

// prove lets the backend open what it made.
func prove(ctx context.Context, backend Backend, key KeyRef, plaintext, ciphertext []byte, b Binding) error {
	opened, err := backend.Unwrap(ctx, key, ciphertext, b)
	if err != nil && ClassOf(err) != BadCiphertext {
		return err
	}
	if err != nil || !same(opened, plaintext) {
		return unproven()
	}
	return nil
}

// same compares key material and clears what was opened.
func same(opened, plaintext []byte) bool {
	defer clear(opened)
	return subtle.ConstantTimeCompare(opened, plaintext) == 1
}

func unproven() error { return &Error{Class: Internal, Err: ErrUnproven} }
