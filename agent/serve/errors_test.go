package serve_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/serve"
)

// wireName is a code as the documentation writes it.
func wireName(c codes.Code) string {
	switch c {
	case codes.Canceled:
		return "CANCELLED"
	default:
		var b strings.Builder
		for i, r := range c.String() {
			if i > 0 && r >= 'A' && r <= 'Z' {
				b.WriteByte('_')
			}
			b.WriteRune(r)
		}
		return strings.ToUpper(b.String())
	}
}

func TestEveryReasonIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range kms.Reasons() {
		if row := fmt.Sprintf("| `%s` | %s |", r, wireName(serve.Code(r))); !strings.Contains(string(page), row) {
			t.Errorf("docs/errors.md lacks the row %q", row)
		}
		if entry := fmt.Sprintf("\n## %s\n", r); !strings.Contains(string(page), entry) {
			t.Errorf("docs/errors.md has no entry for %s", r)
		}
	}
}

func TestStatusCarriesReasonKeyAndRetry(t *testing.T) {
	err := serve.Status(&kms.Error{
		Reason: kms.ReasonBackendDown, Key: "orders", Message: "not now", RetryAfter: 3 * time.Second,
		Cause: errors.New("secret detail"),
	}, "r-1")
	st := status.Convert(err)
	if st.Code() != codes.Unavailable || st.Message() != "not now" {
		t.Errorf("status = %v %q", st.Code(), st.Message())
	}
	var info *errdetails.ErrorInfo
	var retry *errdetails.RetryInfo
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			info = d
		case *errdetails.RetryInfo:
			retry = d
		}
	}
	if info.GetDomain() != "kms-agent" || info.GetReason() != "BACKEND_UNAVAILABLE" || info.GetMetadata()["key"] != "orders" || info.GetMetadata()["request_id"] != "r-1" {
		t.Errorf("error info = %v", info)
	}
	if retry.GetRetryDelay().AsDuration() != 3*time.Second {
		t.Errorf("retry info = %v", retry)
	}
	if strings.Contains(fmt.Sprint(st.Proto()), "secret detail") {
		t.Error("the cause leaves the host")
	}
}

func TestStatusOfOtherErrors(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK},
		{errors.New("secret detail"), codes.Internal},
		{fmt.Errorf("read: %w", context.DeadlineExceeded), codes.DeadlineExceeded},
		{context.Canceled, codes.Canceled},
	} {
		st := status.Convert(serve.Status(tc.err, ""))
		if st.Code() != tc.want || strings.Contains(st.Message(), "secret") {
			t.Errorf("status of %v = %v %q, want %v", tc.err, st.Code(), st.Message(), tc.want)
		}
	}
}

func TestGate(t *testing.T) {
	g := serve.NewGate(serve.Limits{MaxConcurrent: 3, MaxConcurrentPerCaller: 2})
	for _, step := range []struct {
		caller string
		leave  bool
		want   kms.Reason
	}{
		{"a", false, ""}, {"a", false, ""},
		{"a", false, kms.ReasonTooManyRequests}, // its own limit
		{"b", false, ""},
		{"c", false, kms.ReasonTooManyRequests}, // everybody's
		{"a", true, ""},
		{"c", false, ""},
	} {
		if step.leave {
			g.Leave(step.caller)
			continue
		}
		if got := kms.ReasonOf(g.Enter(step.caller)); got != step.want {
			t.Errorf("%s enters: %q, want %q", step.caller, got, step.want)
		}
	}
}
