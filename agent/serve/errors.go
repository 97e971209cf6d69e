// Package serve holds what the doors share: identify, limits and the error
// table.
package serve

import (
	"context"
	"errors"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kms-agent/kms-agent/agent/kms"
)

// Domain is the domain of every google.rpc.ErrorInfo of this agent.
const Domain = "kms-agent"

// Code is the one error table: the gRPC code of each reason. Retry makes sense
// for Unavailable and ResourceExhausted only.
func Code(r kms.Reason) codes.Code {
	switch r {
	case kms.ReasonUnidentified:
		return codes.Unauthenticated
	case kms.ReasonAccessDenied:
		return codes.PermissionDenied
	case kms.ReasonInvalidRequest, kms.ReasonInvalidMessage, kms.ReasonDecryptFailed, kms.ReasonTooLarge, kms.ReasonTruncated:
		return codes.InvalidArgument
	case kms.ReasonKeyUnusable, kms.ReasonConfigRejected:
		return codes.FailedPrecondition
	case kms.ReasonKeySuspended, kms.ReasonBackendDown, kms.ReasonBackendBroken, kms.ReasonQuotaUnavailable,
		kms.ReasonAuditUnavailable, kms.ReasonShuttingDown:
		return codes.Unavailable
	case kms.ReasonTooManyRequests, kms.ReasonQuotaExceeded:
		return codes.ResourceExhausted
	case kms.ReasonDeadlineExceeded:
		return codes.DeadlineExceeded
	case kms.ReasonCancelled:
		return codes.Canceled
	default:
		return codes.Internal
	}
}

// Status translates what kms returned for the wire. Errors of other origins
// become INTERNAL and say nothing.
func Status(err error, requestID string) error {
	if err == nil {
		return nil
	}
	var e *kms.Error
	if !errors.As(err, &e) {
		e = unexpected(err)
	}
	info := &errdetails.ErrorInfo{Domain: Domain, Reason: string(e.Reason), Metadata: map[string]string{}}
	if e.Key != "" {
		info.Metadata["key"] = e.Key
	}
	if requestID != "" {
		info.Metadata["request_id"] = requestID
	}
	details := []protoadapt.MessageV1{info}
	if e.RetryAfter > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(e.RetryAfter)})
	}
	st := status.New(Code(e.Reason), e.Message)
	if detailed, err := st.WithDetails(details...); err == nil {
		st = detailed
	}
	return st.Err()
}

func unexpected(err error) *kms.Error {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return &kms.Error{Reason: kms.ReasonDeadlineExceeded, Message: "the caller's deadline passed; allow more time"}
	case errors.Is(err, context.Canceled):
		return &kms.Error{Reason: kms.ReasonCancelled, Message: "the caller cancelled the request"}
	default:
		return &kms.Error{Reason: kms.ReasonInternal, Message: "internal error; the agent's log has it under the request ID"}
	}
}
