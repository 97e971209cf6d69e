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
	// Reason is the agent's documented reason, such as "ACCESS_DENIED"; empty
	// when the error is not the agent's own (it was not reached, for one).
	Reason string
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
	kind := e.Reason
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

// Is makes errors.Is find the context errors behind codes that mean them.
func (e *Error) Is(target error) bool {
	return (target == context.DeadlineExceeded && e.Code == codes.DeadlineExceeded) ||
		(target == context.Canceled && e.Code == codes.Canceled)
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
				e.Reason, e.Key, e.RequestID = d.GetReason(), d.GetMetadata()["key"], d.GetMetadata()["request_id"]
			}
		case *errdetails.RetryInfo:
			if delay := d.GetRetryDelay(); delay.CheckValid() == nil {
				e.RetryAfter = max(delay.AsDuration(), 0)
			}
		}
	}
	return e
}
