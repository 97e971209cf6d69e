package native

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kms-agent/kms-agent/agent/kms"
)

// A stream that its caller ended is never a bad request, in whichever order gRPC tells of it.
func TestStreamEnd(t *testing.T) {
	t.Parallel()
	expired := &kms.Error{Reason: kms.ReasonUnidentified, Message: "the X.509-SVID has expired"}
	gone, cancel := context.WithCancelCause(t.Context())
	cancel(expired)
	broken := errors.New("broken")
	refused := &kms.Error{Reason: kms.ReasonBackendDown, Cause: status.Error(codes.Canceled, "of another connection")}
	for name, tc := range map[string]struct {
		ctx       context.Context
		err, want error
	}{
		"well":                       {t.Context(), nil, nil},
		"at its end":                 {t.Context(), io.EOF, io.EOF},
		"at its end, and gone":       {gone, io.EOF, io.EOF},
		"broken":                     {t.Context(), broken, broken},
		"ended by the agent":         {gone, status.Error(codes.Canceled, "context canceled"), expired},
		"cancelled, context later":   {t.Context(), status.Error(codes.Canceled, "context canceled"), context.Canceled},
		"wrapped":                    {t.Context(), fmt.Errorf("read: %w", status.Error(codes.Canceled, "context canceled")), context.Canceled},
		"out of time, context later": {t.Context(), status.Error(codes.DeadlineExceeded, "deadline"), context.DeadlineExceeded},
		"too large":                  {t.Context(), status.Error(codes.ResourceExhausted, "too large"), status.Error(codes.ResourceExhausted, "too large")},
		"refused by the service":     {t.Context(), refused, refused},
		"refused, and gone":          {gone, refused, refused},
	} {
		if got := streamEnd(tc.ctx, tc.err); !errors.Is(got, tc.want) {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}
