package plugins

import (
	"context"
	"errors"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

const (
	// errorDomain is the domain of google.rpc.ErrorInfo; its reason is the class.
	errorDomain = "kms-agent.plugin"
	// keyOnly is in its metadata, as "true", where Error.KeyOnly is set.
	keyOnly = "key_only"
	// maxDetail bounds the text of an error that crosses.
	maxDetail = 1024
	// maxRetryAfter bounds what a plugin may ask us to wait.
	maxRetryAfter = time.Hour
)

// code is the gRPC code of a class. It is for those who read traces: the class
// is told by google.rpc.ErrorInfo alone.
func (c Class) code() codes.Code {
	switch c {
	case Unavailable:
		return codes.Unavailable
	case Unauthenticated:
		return codes.Unauthenticated
	case Denied:
		return codes.PermissionDenied
	case KeyUnusable:
		return codes.FailedPrecondition
	case KeyNotFound:
		return codes.NotFound
	case BadCiphertext:
		return codes.DataLoss
	case Invalid:
		return codes.InvalidArgument
	default:
		return codes.Internal
	}
}

// toStatus turns an error of a Backend into what crosses the wire.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	class, detail := ClassOf(err), err.Error()
	info := &errdetails.ErrorInfo{Domain: errorDomain, Reason: class.String()}
	if IsKeyOnly(err) {
		info.Metadata = map[string]string{keyOnly: "true"}
	}
	details := []protoadapt.MessageV1{info}
	var e *Error
	if errors.As(err, &e) {
		detail = strings.TrimPrefix(strings.TrimPrefix(detail, e.Class.String()), ": ")
		if e.RetryAfter > 0 {
			details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(e.RetryAfter)})
		}
	}
	s, detailsErr := status.New(class.code(), Printable(detail, maxDetail)).WithDetails(details...)
	if detailsErr != nil {
		return status.Error(codes.Internal, "an error could not be encoded")
	}
	return s.Err()
}

// fromStatus turns what crossed the wire into an *Error. ctx is the caller's:
// where it ended, the cause says so. What names no class of ours is Unavailable
// where the transport failed, and Internal otherwise: a no is believed only
// from one who says it in our words.
func fromStatus(ctx context.Context, err error) *Error {
	s := status.Convert(err)
	e := &Error{Detail: Printable(s.Message(), maxDetail)}
	for _, detail := range s.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == errorDomain {
				e.Class = classNamed(d.GetReason())
				e.KeyOnly = e.Class == Unavailable && d.GetMetadata()[keyOnly] == "true"
			}
		case *errdetails.RetryInfo:
			e.RetryAfter = min(max(d.GetRetryDelay().AsDuration(), 0), maxRetryAfter)
		}
	}
	if e.Class != 0 {
		return e
	}
	e.Class, e.RetryAfter = Internal, 0
	switch s.Code() {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		e.Class = Unavailable
		awaitDeadline(ctx, s.Code())
		if cause := ctx.Err(); cause != nil {
			e.Detail, e.Err = "", cause
		}
	default:
	}
	return e
}

// deadlineSkew is how much earlier than the caller's own clock the other end of
// a call may find that its deadline has passed.
const deadlineSkew = 20 * time.Millisecond

// awaitDeadline makes sure that a call which the other end gave up for the
// caller's deadline is seen to have ended for it here too: not as an outage.
func awaitDeadline(ctx context.Context, code codes.Code) {
	if deadline, ok := ctx.Deadline(); ok && code != codes.Unavailable && time.Until(deadline) < deadlineSkew {
		<-ctx.Done()
	}
}

func classNamed(name string) Class {
	for _, class := range Classes() {
		if class.String() == name {
			return class
		}
	}
	return Internal
}

// Printable returns text without what could harm a terminal or a log: control
// characters and bytes that are not UTF-8 become U+FFFD, and at most limit
// bytes remain.
func Printable(text string, limit int) string {
	cut := len(text) > limit
	for cut && limit > 0 && !utf8.RuneStart(text[limit]) {
		limit--
	}
	if cut {
		text = text[:limit]
	}
	return strings.Map(func(r rune) rune {
		if r == ' ' || unicode.IsGraphic(r) {
			return r
		}
		return utf8.RuneError
	}, strings.ToValidUTF8(text, string(utf8.RuneError)))
}
