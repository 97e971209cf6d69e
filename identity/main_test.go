package identity_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/identity"
)

const patience = 20 * time.Second

func TestMain(m *testing.M) {
	if run, ok := helperProcesses[os.Getenv(helperEnv)]; ok {
		run()
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

var (
	domain  = spiffeid.RequireTrustDomainFromString("example.org")
	foreign = spiffeid.RequireTrustDomainFromString("other.org")
	agentID = spiffeid.RequireFromString("spiffe://example.org/kms-agent")
	orders  = spiffeid.RequireFromString("spiffe://example.org/orders")
	billing = spiffeid.RequireFromString("spiffe://example.org/billing")
)

func number[T any](v T) *T { return &v }

// tempDir is short: the path of a socket has 107 bytes.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "id")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// authority is a certificate authority of one trust domain.
type authority struct {
	domain spiffeid.TrustDomain
	cert   *x509.Certificate
	key    crypto.Signer
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newAuthority(t testing.TB, domain spiffeid.TrustDomain) *authority {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: domain.Name()}, URIs: []*url.URL{domain.ID().URL()},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	return &authority{domain: domain, cert: sign(t, template, template, key.Public(), key), key: key}
}

func sign(t testing.TB, template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// leaf is an X.509-SVID of id, as change leaves it; nil changes nothing.
func (a *authority) leaf(t testing.TB, id string, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{Organization: []string{"test"}}, URIs: []*url.URL{uri},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if change != nil {
		change(template)
	}
	key := newKey(t)
	cert := sign(t, template, a.cert, key.Public(), a.key)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

// svid is the Workload API's form of a leaf.
func (a *authority) svid(t testing.TB, id spiffeid.ID, change func(*x509.Certificate)) *workload.X509SVID {
	t.Helper()
	leaf := a.leaf(t, id.String(), change)
	key, err := x509.MarshalPKCS8PrivateKey(leaf.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return &workload.X509SVID{SpiffeId: id.String(), X509Svid: leaf.Certificate[0], X509SvidKey: key, Bundle: a.cert.Raw}
}

// update is a message of the Workload API for the agent: its own SVID and the
// bundles of others.
func (a *authority) update(t testing.TB, others ...*authority) *workload.X509SVIDResponse {
	t.Helper()
	u := &workload.X509SVIDResponse{Svids: []*workload.X509SVID{a.svid(t, agentID, nil)}, FederatedBundles: map[string][]byte{}}
	for _, o := range others {
		u.FederatedBundles[o.domain.IDString()] = o.cert.Raw
	}
	return u
}

// workloadAPI is a Workload API that does what a test tells it.
type workloadAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	address string
	path    string

	mu      sync.Mutex
	changed chan struct{}              // mu guards the rest
	update  *workload.X509SVIDResponse // nil: says nothing
	fail    error                      // sent instead
	streams int
}

// newWorkloadAPI has a path but is not there before start.
func newWorkloadAPI(t testing.TB) *workloadAPI {
	path := filepath.Join(tempDir(t), "api.sock")
	return &workloadAPI{path: path, address: "unix://" + path, changed: make(chan struct{})}
}

// start serves until stop is called.
func (w *workloadAPI) start(t testing.TB) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", w.path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.WaitForHandlers(true))
	workload.RegisterSpiffeWorkloadAPIServer(s, w)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	stop = sync.OnceFunc(func() { s.Stop(); <-done })
	t.Cleanup(stop)
	return stop
}

func (w *workloadAPI) set(update *workload.X509SVIDResponse, fail error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.update, w.fail = update, fail
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *workloadAPI) opened() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.streams
}

func (w *workloadAPI) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if got := metadata.ValueFromIncomingContext(stream.Context(), "workload.spiffe.io"); len(got) != 1 || got[0] != "true" {
		return status.Error(codes.InvalidArgument, "header missing")
	}
	w.mu.Lock()
	w.streams++
	w.mu.Unlock()
	for {
		w.mu.Lock()
		update, fail, changed := w.update, w.fail, w.changed
		w.mu.Unlock()
		if fail != nil {
			return fail
		}
		if update != nil {
			if err := stream.Send(update); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// clock is a wall clock that can be put forward.
type clock struct {
	mu     sync.Mutex
	offset time.Duration // mu guards offset
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.offset)
}

func (c *clock) forward(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.offset += d
}

// startSource runs a source until the test ends.
func startSource(t testing.TB, cfg identity.SourceConfig) *identity.Source {
	t.Helper()
	if cfg.BackoffMin == 0 {
		cfg.BackoffMin, cfg.BackoffMax = time.Millisecond, 20*time.Millisecond
	}
	s, err := identity.NewSource(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s
}

// until waits for a state.
func until(t testing.TB, s *identity.Source, what string, ok func(identity.State) bool) identity.State {
	t.Helper()
	deadline := time.After(patience)
	for {
		updated := s.Updated()
		state := s.State()
		if ok(state) {
			return state
		}
		select {
		case <-updated:
		case <-deadline:
			t.Fatalf("the source never became %s: %+v", what, state)
		}
	}
}

func untilStatus(t testing.TB, s *identity.Source, want identity.SourceStatus) identity.State {
	t.Helper()
	return until(t, s, string(want), func(st identity.State) bool { return st.Status == want })
}

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
