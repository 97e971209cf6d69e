package agent_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

// A stream whose start never comes is on record, and before its caller is told.
func TestAStreamWithoutItsStartIsOnRecord(t *testing.T) {
	t.Parallel()
	r := newRig(t, strings.Replace(configText("PEERS", staticPeer()), "max_deadline: 5s, default_deadline: 5s", "max_deadline: 1s, default_deadline: 1s", 1))
	r.start()
	c := kmsagentv1.NewKMSClient(r.plain())
	begin := map[string]func(context.Context) (grpc.ClientStream, error){
		"encrypt": func(ctx context.Context) (grpc.ClientStream, error) { return c.EncryptStream(ctx) },
		"decrypt": func(ctx context.Context) (grpc.ClientStream, error) { return c.DecryptStream(ctx) },
	}
	for operation, begin := range begin {
		stream, err := begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		err = stream.RecvMsg(new(kmsagentv1.EncryptStreamResponse))
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("%s: a stream that is never begun ends with %v", operation, err)
		}
		if !onRecord(r.auditText(), operation, "DEADLINE_EXCEEDED") {
			t.Errorf("%s: the caller was told, and it is not on record:\n%s", operation, r.auditText())
		}
	}
}

// A stream that is cancelled before its start is on record too.
func TestAStreamCancelledBeforeItsStartIsOnRecord(t *testing.T) {
	t.Parallel()
	r := newRig(t, strings.Replace(configText("PEERS", staticPeer()), "max_deadline: 5s, default_deadline: 5s", "max_deadline: 60s, default_deadline: 60s", 1))
	r.start()
	c := kmsagentv1.NewKMSClient(r.plain())
	begin := map[string]func(context.Context) (grpc.ClientStream, error){
		"encrypt": func(ctx context.Context) (grpc.ClientStream, error) { return c.EncryptStream(ctx) },
		"decrypt": func(ctx context.Context) (grpc.ClientStream, error) { return c.DecryptStream(ctx) },
	}
	for operation, begin := range begin {
		ctx, cancel := context.WithCancel(t.Context())
		if _, err := begin(ctx); err != nil {
			t.Fatal(err)
		}
		// The agent has let the stream in when it answers what came after it.
		if _, err := c.WhoAmI(t.Context(), &kmsagentv1.WhoAmIRequest{}); err != nil {
			t.Fatal(err)
		}
		cancel()
		for deadline := time.Now().Add(10 * time.Second); !onRecord(r.auditText(), operation, "CANCELLED"); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: a stream that was cancelled before its start is not on record:\n%s", operation, r.auditText())
			}
		}
	}
}

// onRecord says whether a record of a log has both.
func onRecord(log, operation, reason string) bool {
	for line := range strings.Lines(log) {
		if strings.Contains(line, `"operation":"`+operation+`"`) && strings.Contains(line, `"reason":"`+reason+`"`) {
			return true
		}
	}
	return false
}
