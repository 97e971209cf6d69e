package issuer_test

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/kms-agent/kms-agent/identity"
	"github.com/kms-agent/kms-agent/identity/issuer"
)

const patience = 20 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	domain = spiffeid.RequireTrustDomainFromString("dev.local")
	orders = spiffeid.RequireFromString("spiffe://dev.local/orders")
	other  = spiffeid.RequireFromString("spiffe://dev.local/other")
)

func ordersForUs(p identity.Peer) (spiffeid.ID, bool) {
	return orders, int(p.UID) == os.Getuid() && int(p.GID) == os.Getgid() && int(p.PID) == os.Getpid()
}

// socket is short: the path of a socket has 107 bytes.
func socket(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "is")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "private", "api.sock")
}

// start runs an issuer until stop is called or the test ends.
func start(t testing.TB, cfg issuer.Config) (i *issuer.Issuer, stop func()) {
	t.Helper()
	if cfg.TrustDomain.IsZero() {
		cfg.TrustDomain = domain
	}
	if cfg.Socket == "" && cfg.IDFor != nil {
		cfg.Socket = socket(t)
	}
	i, err := issuer.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- i.Run(ctx); close(done) }()
	stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(stop)
	return i, stop
}

func patiently(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func client(t testing.TB, address string) *workloadapi.Client {
	t.Helper()
	c, err := workloadapi.New(t.Context(), workloadapi.WithAddr(address))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// raw is a client without the manners of go-spiffe's.
func raw(t testing.TB, i *issuer.Issuer, creds credentials.TransportCredentials) workload.SpiffeWorkloadAPIClient {
	t.Helper()
	conn, err := grpc.NewClient(i.Address(), grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return workload.NewSpiffeWorkloadAPIClient(conn)
}

// X.509-SVID standard, sections 2 to 5 and appendix A.
func TestX509SVID(t *testing.T) {
	i, _ := start(t, issuer.Config{IDFor: ordersForUs})
	source, err := workloadapi.NewX509Source(patiently(t), workloadapi.WithClient(client(t, i.Address())))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = source.Close() }()
	svid, err := source.GetX509SVID()
	if err != nil || svid.ID != orders {
		t.Fatalf("SVID %v (%v), want %s", svid, err, orders)
	}
	if id, _, err := x509svid.Verify(svid.Certificates, source); err != nil || id != orders {
		t.Fatalf("Verify: %s, %v", id, err)
	}
	leaf := svid.Certificates[0]
	if leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature || len(leaf.URIs) != 1 ||
		!slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) {
		t.Errorf("leaf: CA %v, usage %v, %v, URIs %v", leaf.IsCA, leaf.KeyUsage, leaf.ExtKeyUsage, leaf.URIs)
	}
	if life := time.Until(leaf.NotAfter); life < 59*time.Minute || life > 61*time.Minute {
		t.Errorf("life %v, want %v", life, issuer.DefaultTTL)
	}
	bundle, err := source.GetX509BundleForTrustDomain(domain)
	if err != nil || len(bundle.X509Authorities()) != 1 {
		t.Fatalf("bundle %v (%v)", bundle, err)
	}
	ca := bundle.X509Authorities()[0]
	if !ca.IsCA || !ca.MaxPathLenZero || ca.KeyUsage&x509.KeyUsageCertSign == 0 || ca.URIs[0].String() != domain.IDString() {
		t.Errorf("authority: CA %v, usage %v, URIs %v", ca.IsCA, ca.KeyUsage, ca.URIs)
	}
	if !strings.Contains(ca.Subject.String(), "not for production") {
		t.Errorf("the authority's name %q does not warn", ca.Subject)
	}
	set, err := client(t, i.Address()).FetchX509Bundles(patiently(t))
	if err != nil {
		t.Fatal(err)
	}
	if b, ok := set.Get(domain); !ok || !b.Equal(bundle) {
		t.Error("FetchX509Bundles gives another bundle than FetchX509SVID")
	}
}

func TestX509SVIDIsRenewedBeforeItExpires(t *testing.T) {
	i, _ := start(t, issuer.Config{IDFor: ordersForUs, TTL: 200 * time.Millisecond})
	source, err := workloadapi.NewX509Source(patiently(t), workloadapi.WithClient(client(t, i.Address())))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = source.Close() }()
	seen := map[string]bool{}
	for range 4 {
		svid, err := source.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		leaf := svid.Certificates[0]
		if !time.Now().Before(leaf.NotAfter) {
			t.Fatalf("an SVID that ended at %v is the current one", leaf.NotAfter)
		}
		if seen[leaf.SerialNumber.String()] {
			t.Fatal("a serial number came twice")
		}
		seen[leaf.SerialNumber.String()] = true
		if err := source.WaitUntilUpdated(patiently(t)); err != nil {
			t.Fatal("the SVID was not renewed")
		}
	}
}

func TestIdentityIsWithdrawn(t *testing.T) {
	var known atomic.Bool
	known.Store(true)
	i, _ := start(t, issuer.Config{
		TTL:   50 * time.Millisecond,
		IDFor: func(identity.Peer) (spiffeid.ID, bool) { return orders, known.Load() },
	})
	source, err := identity.NewSource(identity.SourceConfig{Address: i.Address(), BackoffMin: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(patiently(t))
	done := make(chan error, 1)
	go func() { done <- source.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	if err := source.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	known.Store(false)
	for {
		updated := source.Updated()
		if source.State().Status == identity.SourceDenied {
			break
		}
		select {
		case <-updated:
		case <-ctx.Done():
			t.Fatal("the identity was not withdrawn")
		}
	}
	known.Store(true)
	if err := source.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestJWTSVID(t *testing.T) {
	i, _ := start(t, issuer.Config{IDFor: ordersForUs})
	source, err := workloadapi.NewJWTSource(patiently(t), workloadapi.WithClient(client(t, i.Address())))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = source.Close() }()
	fetched, err := source.FetchJWTSVID(patiently(t), jwtsvid.Params{Audience: "kms-agent", ExtraAudiences: []string{"b"}, Subject: orders})
	if err != nil {
		t.Fatal(err)
	}
	token := fetched.Marshal()
	svid, err := jwtsvid.ParseAndValidate(token, source, []string{"kms-agent"})
	if err != nil || svid.ID != orders || !slices.Equal(svid.Audience, []string{"kms-agent", "b"}) {
		t.Fatalf("%+v, %v", svid, err)
	}
	if life := time.Until(svid.Expiry); life < 4*time.Minute || life > 6*time.Minute {
		t.Errorf("life %v, want %v", life, issuer.DefaultJWTTTL)
	}
	var header map[string]string
	part, _, _ := strings.Cut(token, ".")
	if b, err := base64.RawURLEncoding.DecodeString(part); err != nil || json.Unmarshal(b, &header) != nil {
		t.Fatalf("header %q", part)
	}
	if header["alg"] != "ES256" || header["kid"] == "" || header["typ"] != "JWT" {
		t.Errorf("header %v", header)
	}

	api := client(t, i.Address())
	if svid, err := api.ValidateJWTSVID(patiently(t), token, "kms-agent"); err != nil || svid.ID != orders {
		t.Errorf("ValidateJWTSVID: %v, %v", svid, err)
	}
	elsewhere, _ := start(t, issuer.Config{IDFor: ordersForUs})
	forged, err := client(t, elsewhere.Address()).FetchJWTSVID(patiently(t), jwtsvid.Params{Audience: "kms-agent"})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ token, audience string }{
		"wrong audience":      {token, "other"},
		"no audience":         {token, ""},
		"another issuer":      {forged.Marshal(), "kms-agent"},
		"signature cut":       {token[:len(token)-2], "kms-agent"},
		"claims of another":   {mix(token, forged.Marshal()), "kms-agent"},
		"empty":               {"", "kms-agent"},
		"rubbish":             {"a.b.c", "kms-agent"},
		"algorithm none":      {unsigned(token), "kms-agent"},
		"more than is parsed": {strings.Repeat("a", 20<<10), "kms-agent"},
	} {
		if _, err := api.ValidateJWTSVID(patiently(t), c.token, c.audience); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: got %v, want InvalidArgument", name, err)
		}
	}
}

// mix is the header and signature of a, around the claims of b.
func mix(a, b string) string {
	x, y := strings.Split(a, "."), strings.Split(b, ".")
	return x[0] + "." + y[1] + "." + x[2]
}

func unsigned(token string) string {
	parts := strings.Split(token, ".")
	return base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"JWT"}`)) + "." + parts[1] + "."
}

func TestJWTBundleDocument(t *testing.T) {
	i, _ := start(t, issuer.Config{IDFor: ordersForUs})
	stream, err := raw(t, i, insecure.NewCredentials()).FetchJWTBundles(
		metadata.AppendToOutgoingContext(patiently(t), "workload.spiffe.io", "true"), &workload.JWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	answer, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	document := answer.GetBundles()[domain.IDString()]
	var keys struct {
		Keys []map[string]any `json:"keys"`
	}
	if err := json.Unmarshal(document, &keys); err != nil || len(keys.Keys) != 1 {
		t.Fatalf("document %s (%v)", document, err)
	}
	if k := keys.Keys[0]; k["use"] != "jwt-svid" || k["kid"] == "" || k["d"] != nil {
		t.Errorf("key %v", k)
	}
	if _, err := jwtbundle.Parse(domain, document); err != nil {
		t.Error(err)
	}
}
