package client

// Reason is the agent's documented reason of an Error (docs/errors.md says what
// to do about each). It is an error itself, for errors.Is:
//
//	if errors.Is(err, client.ErrAccessDenied) { ... }
type Reason string

// Error returns the reason.
func (r Reason) Error() string { return string(r) }

// The reasons of the operations.
const (
	ErrCallerUnidentified Reason = "CALLER_UNIDENTIFIED" // the agent does not know who is calling
	ErrAccessDenied       Reason = "ACCESS_DENIED"       // policy does not allow it, or there is no such key
	ErrInvalidRequest     Reason = "INVALID_REQUEST"     // a field is wrong
	ErrInvalidMessage     Reason = "INVALID_MESSAGE"     // these bytes are no message
	ErrDecryptFailed      Reason = "DECRYPT_FAILED"      // changed, or the context or key is another
	ErrTooLarge           Reason = "TOO_LARGE"           // over a limit; stream it
	ErrStreamTruncated    Reason = "STREAM_TRUNCATED"    // the message ends too early
	ErrKeyUnusable        Reason = "KEY_UNUSABLE"        // the wrapping key is disabled or gone
	ErrKeySuspended       Reason = "KEY_SUSPENDED"       // upstream refused, the agent is asking again
	ErrBackendUnavailable Reason = "BACKEND_UNAVAILABLE" // upstream is out of reach
	ErrBackendBroken      Reason = "BACKEND_BROKEN"      // upstream answers rubbish
	ErrTooManyRequests    Reason = "TOO_MANY_REQUESTS"   // slow down
	ErrQuotaExceeded      Reason = "QUOTA_EXCEEDED"      // the caller's own limit is used up
	ErrQuotaUnavailable   Reason = "QUOTA_UNAVAILABLE"   // the agent cannot store its count
	ErrAuditUnavailable   Reason = "AUDIT_UNAVAILABLE"   // the agent cannot write its record
	ErrDeadlineExceeded   Reason = "DEADLINE_EXCEEDED"   // no answer in time
	ErrCancelled          Reason = "CANCELLED"           // the caller gave up
	ErrShuttingDown       Reason = "SHUTTING_DOWN"       // the agent is being stopped
	ErrInternal           Reason = "INTERNAL"            // a fault of the agent
)

// ErrUnreachable is the reason that no agent gives: none was reached.
const ErrUnreachable Reason = "UNREACHABLE"
