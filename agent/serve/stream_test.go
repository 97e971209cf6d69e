package serve_test

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/serve"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/identity"
)

// recorder is a handler that takes its time over the record of a stream's end, and
// tells whether the answer went out before.
type recorder struct {
	kmsagentv1.UnimplementedKMSServer
	answered chan struct{}
	early    chan bool
}

func (r *recorder) end(ctx context.Context) error {
	select {
	case <-r.answered:
		r.early <- true
	case <-time.After(200 * time.Millisecond):
		r.early <- false
	}
	return context.Cause(ctx)
}

func (r *recorder) EncryptStream(ss grpc.BidiStreamingServer[kmsagentv1.EncryptStreamRequest, kmsagentv1.EncryptStreamResponse]) error {
	for {
		if _, err := ss.Recv(); err != nil {
			return r.end(ss.Context())
		}
	}
}

func (r *recorder) DecryptStream(ss grpc.BidiStreamingServer[kmsagentv1.DecryptStreamRequest, kmsagentv1.DecryptStreamResponse]) error {
	for {
		part := &kmsagentv1.DecryptStreamResponse{Part: &kmsagentv1.DecryptStreamResponse_Chunk{Chunk: make([]byte, 32<<10)}}
		if err := ss.Send(part); err != nil {
			return r.end(ss.Context())
		}
	}
}

// TagRPC, TagConn, HandleConn and HandleRPC implement stats.Handler.
func (r *recorder) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (r *recorder) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (r *recorder) HandleConn(context.Context, stats.ConnStats)                       {}
func (r *recorder) HandleRPC(_ context.Context, s stats.RPCStats) {
	if _, ok := s.(*stats.OutTrailer); ok {
		r.answered <- struct{}{}
	}
}

// A stream that stands still, because nothing comes or because nobody takes what
// goes out, is answered when its handler has recorded the end, and not before.
func TestAStreamThatStandsStillIsRecordedFirst(t *testing.T) {
	for name, begin := range map[string]func(kmsagentv1.KMSClient) (grpc.ClientStream, error){
		"receive": func(c kmsagentv1.KMSClient) (grpc.ClientStream, error) { return c.EncryptStream(t.Context()) },
		"send":    func(c kmsagentv1.KMSClient) (grpc.ClientStream, error) { return c.DecryptStream(t.Context()) },
	} {
		t.Run(name, func(t *testing.T) {
			r := &recorder{answered: make(chan struct{}, 1), early: make(chan bool, 1)}
			stream, err := begin(kmsagentv1.NewKMSClient(serveStreams(t, r)))
			if err != nil {
				t.Fatal(err)
			}
			if <-r.early {
				t.Error("the answer went out before the handler had recorded the end")
			}
			for part := new(kmsagentv1.DecryptStreamResponse); err == nil; {
				err = stream.RecvMsg(part)
			}
			if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "stood still") {
				t.Errorf("the stream ended with %v, want that it stood still", err)
			}
		})
	}
}

// serveStreams serves r behind a door on which nothing stands still long.
func serveStreams(t *testing.T, r *recorder) *grpc.ClientConn {
	t.Helper()
	dir := t.TempDir()
	log, err := audit.Open(audit.Config{Path: filepath.Join(dir, "audit.log"), StateDir: dir, InitialKeyPath: filepath.Join(dir, "key")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	began := time.Now()
	service, err := kms.New(kms.Options{Audit: log, MaxEntries: 1, Now: func() time.Duration { return time.Since(began) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(service.Close)
	somebody := func(context.Context) (identity.Caller, error) {
		return identity.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/a"), Proof: identity.ProofStaticPeer}, nil
	}
	door := serve.NewDoor("test", service, serve.Limits{
		MaxPayload: 1024, DefaultDeadline: time.Second, MaxDeadline: 100 * time.Millisecond, MaxConcurrent: 4, MaxConcurrentPerCaller: 4,
	}, somebody, zap.NewNop())
	server := door.Server(insecure.NewCredentials(), grpc.StatsHandler(r))
	kmsagentv1.RegisterKMSServer(server, r)
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
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
		door.Wait()
	})
	return conn
}
