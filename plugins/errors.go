package plugins

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Class says what an error of a backend means for the key behind it. The
// classes are the whole vocabulary between a backend and the agent.
type Class uint8

// The classes; there is no zero class.
const (
	// Unavailable: not reached, timed out, overloaded, sealed. An outage.
	Unavailable Class = iota + 1
	// Unauthenticated: the backend's own credential was refused.
	Unauthenticated
	// Denied: upstream's policy says no. Definite.
	Denied
	// KeyUnusable: disabled, deleted, not yet active, expired. Definite.
	KeyUnusable
	// KeyNotFound: no such wrapping key or version. Definite.
	KeyNotFound
	// BadCiphertext: this ciphertext does not open with this binding.
	BadCiphertext
	// Invalid: the request is wrong.
	Invalid
	// Internal: the backend is broken or gave a malformed answer.
	Internal
)

// Classes lists every class.
func Classes() []Class {
	return []Class{Unavailable, Unauthenticated, Denied, KeyUnusable, KeyNotFound, BadCiphertext, Invalid, Internal}
}

// String returns the class's name, which is also its name on the wire.
func (c Class) String() string {
	names := [...]string{
		"Unknown", "Unavailable", "Unauthenticated", "Denied", "KeyUnusable", "KeyNotFound", "BadCiphertext", "Invalid", "Internal",
	}
	if int(c) >= len(names) {
		return names[0]
	}
	return names[c]
}

// Definite tells whether the class is a no of the upstream about the key.
func (c Class) Definite() bool { return c == Denied || c == KeyUnusable || c == KeyNotFound }

// Error is how a backend fails.
type Error struct {
	Class Class
	// RetryAfter is when a retry may succeed; zero where that is not known.
	RetryAfter time.Duration
	// KeyOnly says of an outage (Unavailable) that it is one of this key alone, or of
	// what this call does with it: the backend is there, and other keys may be served.
	// It means nothing with other classes, nor of Open and Check.
	KeyOnly bool
	// Detail is for operators: what happened and what cures it. Never secret.
	Detail string
	// Err is the cause, if there is one.
	Err error
}

// Error returns class, detail and cause.
func (e *Error) Error() string {
	text := e.Class.String()
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

// ErrCrowded is wrapped by the errors of calls that did not reach the backend,
// since calls that came before took all of its room or of the time. It says
// nothing of the backend, nor of what other callers would hear.
var ErrCrowded = errors.New("too many calls wait for the backend, or it is slow: send fewer at once, or raise its max_concurrent")

// ErrBreakerOpen is wrapped by the errors of calls that were not made, since too many
// before them had failed: RetryAfter says when the backend is tried next. It
// stands for what those have heard: an outage.
var ErrBreakerOpen = errors.New("the backend gets no calls for a while: too many have failed")

// ErrThrottled is wrapped by the errors of calls that were not made, since the
// backend has asked for patience. RetryAfter says until when.
var ErrThrottled = errors.New("the backend gets no calls for a while: it has asked for patience")

// Errorf returns an Error of the class. What %w wraps is its cause.
func Errorf(class Class, format string, a ...any) *Error {
	err := fmt.Errorf(format, a...)
	if errors.Unwrap(err) == nil {
		return &Error{Class: class, Detail: err.Error()}
	}
	return &Error{Class: class, Err: err}
}

// IsKeyOnly tells whether err is an outage of one key, which says nothing of the backend.
func IsKeyOnly(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.KeyOnly && e.Class == Unavailable
}

// ClassOf returns the class of err: that of an *Error in its chain; Unavailable
// where a context ended first; Internal otherwise, and for an *Error without a
// class. It returns 0 for nil.
func ClassOf(err error) Class {
	var e *Error
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e) && e.Class >= Unavailable && e.Class <= Internal:
		return e.Class
	case e == nil && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)):
		return Unavailable
	default:
		return Internal
	}
}
