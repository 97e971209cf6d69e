package identity_test

import (
	"context"
	"crypto/tls"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/identity"
)

// agent is a gRPC server behind identity.Credentials that says who calls.
type agent struct {
	kmsagentv1.UnimplementedKMSServer
	path  string
	creds *identity.Credentials

	mu       sync.Mutex
	refusals []identity.Refusal // mu guards the rest
	refused  chan struct{}      // closed and replaced at each refusal
	calls    int
	errs     []error
}

func (a *agent) WhoAmI(ctx context.Context, _ *kmsagentv1.WhoAmIRequest) (*kmsagentv1.WhoAmIResponse, error) {
	caller, err := identity.CallerFromContext(ctx)
	a.mu.Lock()
	a.calls++
	a.errs = append(a.errs, err)
	a.mu.Unlock()
	if err != nil {
		if !errors.Is(err, identity.ErrUnidentified) || !caller.ID.IsZero() || caller.Proof != "" {
			return nil, status.Errorf(codes.Internal, "refused as %+v with %v", caller, err)
		}
		return nil, status.Error(codes.Unauthenticated, err.Error())
	}
	return &kmsagentv1.WhoAmIResponse{
		SpiffeId: caller.ID.String(), Proof: string(caller.Proof), Uid: caller.Peer.UID, Gid: caller.Peer.GID, Pid: caller.Peer.PID,
	}, nil
}

func (a *agent) lastErr() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.errs) == 0 {
		return nil
	}
	return a.errs[len(a.errs)-1]
}

func (a *agent) seen() (calls int, refusals []identity.Refusal) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.calls, append([]identity.Refusal(nil), a.refusals...)
}

// refusal waits for the n-th refusal, which comes after the client knows of it.
func (a *agent) refusal(t testing.TB, n int) identity.Refusal {
	t.Helper()
	deadline := time.After(patience)
	for {
		a.mu.Lock()
		refusals, refused := a.refusals, a.refused
		a.mu.Unlock()
		if len(refusals) > n {
			return refusals[n]
		}
		select {
		case <-refused:
		case <-deadline:
			t.Fatal("nobody was told of the refusal")
		}
	}
}

func startAgent(t testing.TB, cfg identity.Config) *agent {
	t.Helper()
	a := &agent{path: filepath.Join(tempDir(t), "kms.sock"), refused: make(chan struct{})}
	cfg.OnRefused = func(r identity.Refusal) {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.refusals = append(a.refusals, r)
		close(a.refused)
		a.refused = make(chan struct{})
	}
	var err error
	if a.creds, err = identity.NewCredentials(cfg); err != nil {
		t.Fatal(err)
	}
	l, err := identity.Listen(t.Context(), a.path, 0o600, -1)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(a.creds), grpc.WaitForHandlers(true))
	kmsagentv1.RegisterKMSServer(s, a)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
	return a
}

// dial connects as a gRPC client: with a certificate over TLS, else in plain.
func (a *agent) dial(t testing.TB, cfg *tls.Config) *grpc.ClientConn {
	t.Helper()
	creds := insecure.NewCredentials()
	if cfg != nil {
		creds = credentials.NewTLS(cfg)
	}
	conn, err := grpc.NewClient("unix://"+a.path, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func tlsClient(cert tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}
}

func whoAmI(t testing.TB, conn *grpc.ClientConn) (*kmsagentv1.WhoAmIResponse, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return kmsagentv1.NewKMSClient(conn).WhoAmI(ctx, &kmsagentv1.WhoAmIRequest{})
}

func wantCaller(t testing.TB, conn *grpc.ClientConn, id spiffeid.ID, proof identity.Proof) {
	t.Helper()
	who, err := whoAmI(t, conn)
	if err != nil {
		t.Fatalf("WhoAmI: %v", err)
	}
	if who.GetSpiffeId() != id.String() || who.GetProof() != string(proof) {
		t.Fatalf("the agent takes the caller for %s by %s, want %s by %s", who.GetSpiffeId(), who.GetProof(), id, proof)
	}
	if int(who.GetUid()) != os.Getuid() || int(who.GetGid()) != os.Getgid() || int(who.GetPid()) != os.Getpid() {
		t.Fatalf("peer %d:%d, pid %d is not this process", who.GetUid(), who.GetGid(), who.GetPid())
	}
}

// wantUnauthenticated is a refusal by the call itself.
func (a *agent) wantUnauthenticated(t testing.TB, conn *grpc.ClientConn, want error, text string) {
	t.Helper()
	_, err := whoAmI(t, conn)
	if status.Code(err) != codes.Unauthenticated {
		t.Fatalf("WhoAmI: got %v, want Unauthenticated", err)
	}
	if got := a.lastErr(); !errors.Is(got, want) || !strings.Contains(got.Error(), text) {
		t.Fatalf("refused with %q, want a kind of %q that says %q", got, want, text)
	}
}

// wantHandshakeRefusal is a refusal before any call.
func (a *agent) wantHandshakeRefusal(t testing.TB, conn *grpc.ClientConn, want error, text string) {
	t.Helper()
	before, earlier := a.seen()
	_, err := whoAmI(t, conn)
	if status.Code(err) != codes.Unavailable {
		t.Fatalf("WhoAmI: got %v, want Unavailable, since there is no connection", err)
	}
	got := a.refusal(t, len(earlier))
	if calls, _ := a.seen(); calls != before {
		t.Fatal("the call reached the service")
	}
	if want != nil && !errors.Is(got.Err, want) {
		t.Fatalf("refused with %q, want a kind of %q", got.Err, want)
	}
	if !strings.Contains(got.Err.Error(), text) {
		t.Fatalf("refused with %q, want it to say %q", got.Err, text)
	}
	if int(got.Peer.UID) != os.Getuid() || int(got.Peer.PID) != os.Getpid() {
		t.Fatalf("the refusal names %+v, not this process", got.Peer)
	}
}
