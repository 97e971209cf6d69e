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
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

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
	bundles *workload.JWTBundlesResponse
	fail    error // sent instead
	streams int
	jwts    int // streams of JWT bundles
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

func (w *workloadAPI) openedJWT() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.jwts
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

func (w *workloadAPI) setJWT(bundles *workload.JWTBundlesResponse) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.bundles = bundles
	close(w.changed)
	w.changed = make(chan struct{})
}

// FetchJWTBundles fails as FetchX509SVID does, and is not there without bundles.
func (w *workloadAPI) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	if got := metadata.ValueFromIncomingContext(stream.Context(), "workload.spiffe.io"); len(got) != 1 || got[0] != "true" {
		return status.Error(codes.InvalidArgument, "header missing")
	}
	w.mu.Lock()
	w.jwts++
	w.mu.Unlock()
	for {
		w.mu.Lock()
		bundles, fail, changed := w.bundles, w.fail, w.changed
		w.mu.Unlock()
		switch {
		case fail != nil:
			return fail
		case bundles == nil:
			return status.Error(codes.Unimplemented, "no JWT-SVIDs here")
		}
		if err := stream.Send(bundles); err != nil {
			return err
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
