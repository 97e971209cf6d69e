package client

import (
	"context"
	"errors"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// errorDomain is the domain of the agent's google.rpc.ErrorInfo.
const errorDomain = "kms-agent"

// Error is a call that failed, in the agent or on the way to it.
type Error struct {
	// Code is the gRPC status code.
	Code codes.Code
	// Reason is the agent's documented reason, such as ErrAccessDenied; empty
	// when the error is not the agent's own (it was not reached, for one).
	Reason Reason
	// Key is the logical key that the error is about; may be empty.
	Key string
	// RequestID names the call in the agent's audit and log; may be empty.
	RequestID string
	// Message says what happened, for people.
	Message string
	// RetryAfter is how long to wait before another attempt; zero where the agent
	// does not say that one makes sense.
	RetryAfter time.Duration

	status *status.Status
}

// Error returns the message with its reason or code.
func (e *Error) Error() string {
	kind := string(e.Reason)
	if kind == "" {
		kind = e.Code.String()
	}
	var b strings.Builder
	b.WriteString("kms-agent: ")
	b.WriteString(e.Message)
	b.WriteString(" (" + kind)
	if e.RequestID != "" {
		b.WriteString(", request " + e.RequestID)
	}
	b.WriteString(")")
	return b.String()
}

// GRPCStatus returns the status that came over the wire, so that status.Code
// works on an Error.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// Retryable tells whether the same call may succeed later: after RetryAfter, or
// after a while of the caller's own choice where that is zero.
func (e *Error) Retryable() bool {
	return e.Code == codes.Unavailable || e.RetryAfter > 0
}

// Is makes errors.Is find the reason, and the context errors behind codes that
// mean them.
func (e *Error) Is(target error) bool {
	if reason, ok := target.(Reason); ok {
		return reason == e.Reason && reason != "" ||
			reason == ErrUnreachable && e.Reason == "" && e.Code == codes.Unavailable
	}
	return (target == context.DeadlineExceeded && e.Code == codes.DeadlineExceeded) ||
		(target == context.Canceled && e.Code == codes.Canceled)
}

// failed is an error of this package with the agent's reason for the same
// failure.
func failed(code codes.Code, reason Reason, key, message string) *Error {
	return &Error{Code: code, Reason: reason, Key: key, Message: message, status: status.New(code, message)}
}

// errClosed is what a closed InProcess answers.
var errClosed = errors.New("kms-agent: this InProcess was closed")

// undecryptable is what does not open; why, is not told, as by the agent.
func undecryptable(key string) error {
	return failed(codes.InvalidArgument, ErrDecryptFailed, key, "the message does not open: it was changed, or its key or context is another")
}

// unreadable is what is no message.
func unreadable(err error) error {
	return failed(codes.InvalidArgument, ErrInvalidMessage, "", "this is not a message that can be read: "+err.Error())
}

// definite tells whether an error is the agent's no, and not just no answer.
func definite(err error) bool {
	var e *Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Reason {
	case ErrCallerUnidentified, ErrAccessDenied, ErrDecryptFailed, ErrKeyUnusable, ErrKeySuspended:
		return true
	default:
		return false
	}
}

// decodeError turns what gRPC returned into an *Error. Nil stays nil, and what is
// no status stays what it is.
func decodeError(err error) error {
	var known *Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	e := &Error{Code: st.Code(), Message: st.Message(), status: st}
	for _, detail := range st.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == errorDomain {
				e.Reason, e.Key, e.RequestID = Reason(d.GetReason()), d.GetMetadata()["key"], d.GetMetadata()["request_id"]
			}
		case *errdetails.RetryInfo:
			if delay := d.GetRetryDelay(); delay.CheckValid() == nil {
				e.RetryAfter = max(delay.AsDuration(), 0)
			}
		}
	}
	return e
}
