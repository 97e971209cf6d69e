package serve_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/serve"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/identity"
)

// clumsy is a handler with a bug.
type clumsy struct {
	kmsagentv1.UnimplementedKMSServer
}

func (clumsy) GenerateDataKeyWithoutPlaintext(context.Context, *kmsagentv1.GenerateDataKeyWithoutPlaintextRequest) (*kmsagentv1.GenerateDataKeyWithoutPlaintextResponse, error) {
	panic("the value of a panic may be a key")
}

func (clumsy) DecryptStream(grpc.BidiStreamingServer[kmsagentv1.DecryptStreamRequest, kmsagentv1.DecryptStreamResponse]) error {
	panic("the value of a panic may be a key")
}

// A bug in a handler ends one request, on the record, and tells nobody more.
func TestAPanicEndsOneRequest(t *testing.T) {
	dir := t.TempDir()
	log, err := audit.Open(audit.Config{Path: filepath.Join(dir, "audit.log"), StateDir: dir, InitialKeyPath: filepath.Join(dir, "key")})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	service, err := kms.New(kms.Options{Audit: log, MaxEntries: 1, Now: func() time.Duration { return time.Since(began) }})
	if err != nil {
		t.Fatal(err)
	}
	somebody := func(context.Context) (identity.Caller, error) {
		return identity.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/a"), Proof: identity.ProofStaticPeer}, nil
	}
	door := serve.NewDoor("test", service, serve.Limits{
		MaxPayload: 1024, DefaultDeadline: time.Second, MaxDeadline: time.Second, MaxConcurrent: 4, MaxConcurrentPerCaller: 4,
	}, somebody, zap.NewNop())
	server := door.Server(insecure.NewCredentials())
	kmsagentv1.RegisterKMSServer(server, clumsy{})
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	conn, err := grpc.NewClient("unix:"+filepath.Join(dir, "s"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	c := kmsagentv1.NewKMSClient(conn)
	for range 6 { // more than the gate lets in at once: each panic leaves again
		_, err = c.GenerateDataKeyWithoutPlaintext(t.Context(), &kmsagentv1.GenerateDataKeyWithoutPlaintextRequest{})
		if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "value of a panic") {
			t.Errorf("error = %v", err)
		}
		stream, err := c.DecryptStream(t.Context())
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "value of a panic") {
			t.Errorf("stream: error = %v", err)
		}
	}
	_ = conn.Close()
	server.Stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
	door.Wait()
	service.Close()
	if err := log.Close(); err != nil {
		t.Error(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, operation := range []string{"generate-data-key-without-plaintext", "decrypt"} {
		if n := strings.Count(string(text), `"operation":"`+operation+`"`); n != 6 {
			t.Errorf("%d records of %s, want 6", n, operation)
		}
	}
}

// Whoever reaches the socket can send any method; what they call it is neither on
// record nor a metric.
func TestMadeUpMethodsAreNotOnRecord(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.log")
	log, err := audit.Open(audit.Config{Path: path, StateDir: dir, InitialKeyPath: filepath.Join(dir, "key")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	began := time.Now()
	var told []string
	service, err := kms.New(kms.Options{
		Audit: log, MaxEntries: 1, Now: func() time.Duration { return time.Since(began) },
		Observe: func(_ context.Context, r *audit.Record) { told = append(told, r.Operation) },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer service.Close()
	nobody := func(context.Context) (identity.Caller, error) { return identity.Caller{}, identity.ErrUnidentified }
	door := serve.NewDoor("test", service, serve.Limits{
		MaxPayload: 1024, DefaultDeadline: time.Second, MaxDeadline: time.Second, MaxConcurrent: 4, MaxConcurrentPerCaller: 4,
	}, nobody, zap.NewNop())
	server := door.Server(insecure.NewCredentials())
	kmsagentv1.RegisterKMSServer(server, clumsy{})
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	conn, err := grpc.NewClient("unix:"+filepath.Join(dir, "s"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	for _, method := range []string{"/made.Up/Decrypt", "/kmsagent.v1.KMS/" + strings.Repeat("X", 1000), "/kmsagent.v1.KMS/Decrypt"} {
		err := conn.Invoke(t.Context(), method, &kmsagentv1.WhoAmIRequest{}, &kmsagentv1.WhoAmIResponse{})
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("%.40s: %v", method, err)
		}
	}
	_ = conn.Close()
	server.Stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if want := []string{"unknown-method", "unknown-method", "decrypt"}; !slices.Equal(told, want) {
		t.Errorf("operations = %.100q, want %q", told, want)
	}
}
