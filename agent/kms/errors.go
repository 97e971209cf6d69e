package kms

import (
	"errors"
	"fmt"
	"time"
)

// Reason says why an operation failed, in one stable word. The doors translate
// it to their wire through one table; docs/errors.md has an entry for each.
type Reason string

// The reasons. AccessDenied stands for a forbidden key and for an unknown one:
// the two look alike. DecryptFailed stands for every way in which a message or
// an encrypted data key does not open; the audit record tells them apart.
const (
	ReasonUnidentified     Reason = "CALLER_UNIDENTIFIED"
	ReasonAccessDenied     Reason = "ACCESS_DENIED"
	ReasonInvalidRequest   Reason = "INVALID_REQUEST"
	ReasonInvalidMessage   Reason = "INVALID_MESSAGE"
	ReasonDecryptFailed    Reason = "DECRYPT_FAILED"
	ReasonTooLarge         Reason = "TOO_LARGE"
	ReasonTruncated        Reason = "STREAM_TRUNCATED"
	ReasonKeyUnusable      Reason = "KEY_UNUSABLE"
	ReasonKeySuspended     Reason = "KEY_SUSPENDED"
	ReasonBackendDown      Reason = "BACKEND_UNAVAILABLE"
	ReasonBackendBroken    Reason = "BACKEND_BROKEN"
	ReasonTooManyRequests  Reason = "TOO_MANY_REQUESTS"
	ReasonQuotaExceeded    Reason = "QUOTA_EXCEEDED"
	ReasonQuotaUnavailable Reason = "QUOTA_UNAVAILABLE"
	ReasonAuditUnavailable Reason = "AUDIT_UNAVAILABLE"
	ReasonDeadlineExceeded Reason = "DEADLINE_EXCEEDED"
	ReasonCancelled        Reason = "CANCELLED"
	ReasonShuttingDown     Reason = "SHUTTING_DOWN"
	ReasonConfigRejected   Reason = "CONFIG_REJECTED"
	ReasonInternal         Reason = "INTERNAL"
)

// Reasons lists every reason, in the order of the documentation.
func Reasons() []Reason {
	return []Reason{
		ReasonUnidentified, ReasonAccessDenied, ReasonInvalidRequest, ReasonInvalidMessage, ReasonDecryptFailed,
		ReasonTooLarge, ReasonTruncated, ReasonKeyUnusable, ReasonKeySuspended, ReasonBackendDown, ReasonBackendBroken,
		ReasonTooManyRequests, ReasonQuotaExceeded, ReasonQuotaUnavailable, ReasonAuditUnavailable, ReasonDeadlineExceeded, ReasonCancelled, ReasonShuttingDown,
		ReasonConfigRejected, ReasonInternal,
	}
}

// Error is how every operation of this package fails.
type Error struct {
	Reason Reason
	// Key is the logical key that the caller named; empty where there is none.
	Key string
	// Message is for the caller. It never holds anything secret, and nothing
	// that tells an unknown key from a forbidden one.
	Message string
	// RetryAfter is when a retry may succeed; zero where a retry makes no sense.
	RetryAfter time.Duration
	// Cause is for the audit record and never leaves the host.
	Cause error
}

// Error returns the reason and the message for the caller.
func (e *Error) Error() string { return fmt.Sprintf("%s (%s)", e.Message, e.Reason) }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// Is makes errors.Is compare reasons: errors.Is(err, &Error{Reason: r}).
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Reason == e.Reason
}

// ReasonOf returns the reason of err: ReasonInternal for errors of other
// origins, empty for nil.
func ReasonOf(err error) Reason {
	var e *Error
	switch {
	case err == nil:
		return ""
	case errors.As(err, &e):
		return e.Reason
	default:
		return ReasonInternal
	}
}

func denied(key string) *Error {
	e := &Error{
		Reason: ReasonAccessDenied, Key: key,
		Message: "the caller may not do this with this key, or there is no such key; ask whoever keeps the agent's policy",
	}
	if key == "" {
		e.Message = "the caller may not do this; ask whoever keeps the agent's policy"
	}
	return e
}

func invalid(key, format string, a ...any) *Error {
	return &Error{Reason: ReasonInvalidRequest, Key: key, Message: fmt.Sprintf(format, a...)}
}

func undecryptable(key string, cause error) *Error {
	return &Error{
		Reason: ReasonDecryptFailed, Key: key, Cause: cause,
		Message: "cannot be decrypted: it is damaged, was not made by this operation, or the encryption context is not the expected one",
	}
}

func foreign(cause error) *Error {
	return &Error{
		Reason: ReasonInvalidMessage, Cause: cause,
		Message: "not a message that this agent can read: " + cause.Error(),
	}
}
