package issuer_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/kms-agent/kms-agent/identity"
	"github.com/kms-agent/kms-agent/identity/issuer"
)

// calls are all methods that an SVID or a bundle could come by.
func calls(c workload.SpiffeWorkloadAPIClient) map[string]func(context.Context) error {
	first := func(recv func() error, err error) error {
		if err != nil {
			return err
		}
		return recv()
	}
	return map[string]func(context.Context) error{
		"FetchX509SVID": func(ctx context.Context) error {
			s, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			return first(func() error { _, err := s.Recv(); return err }, err)
		},
		"FetchX509Bundles": func(ctx context.Context) error {
			s, err := c.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
			return first(func() error { _, err := s.Recv(); return err }, err)
		},
		"FetchJWTBundles": func(ctx context.Context) error {
			s, err := c.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
			return first(func() error { _, err := s.Recv(); return err }, err)
		},
		"FetchJWTSVID": func(ctx context.Context) error {
			_, err := c.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
			return err
		},
		"ValidateJWTSVID": func(ctx context.Context) error {
			_, err := c.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "x"})
			return err
		},
	}
}

func TestHostileCalls(t *testing.T) {
	known, _ := start(t, issuer.Config{IDFor: ordersForUs})
	unknown, _ := start(t, issuer.Config{IDFor: func(identity.Peer) (spiffeid.ID, bool) { return orders, false }})
	rootPath, _ := start(t, issuer.Config{IDFor: func(identity.Peer) (spiffeid.ID, bool) { return domain.ID(), true }})
	abroad, _ := start(t, issuer.Config{IDFor: func(identity.Peer) (spiffeid.ID, bool) {
		return spiffeid.RequireFromString("spiffe://example.org/x"), true
	}})
	header := func(ctx context.Context, values ...string) context.Context {
		for _, v := range values {
			ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", v)
		}
		return ctx
	}
	cases := map[string]struct {
		issuer *issuer.Issuer
		header []string
		want   codes.Code
	}{
		"no header":               {known, nil, codes.InvalidArgument},
		"header false":            {known, []string{"false"}, codes.InvalidArgument},
		"header TRUE":             {known, []string{"TRUE"}, codes.InvalidArgument},
		"header twice":            {known, []string{"true", "true"}, codes.InvalidArgument},
		"no identity":             {unknown, []string{"true"}, codes.PermissionDenied},
		"IDFor gives a root path": {rootPath, []string{"true"}, codes.Internal},
		"IDFor gives a foreign":   {abroad, []string{"true"}, codes.Internal},
	}
	for name, c := range cases {
		for method, call := range calls(raw(t, c.issuer, insecure.NewCredentials())) {
			if err := call(header(patiently(t), c.header...)); status.Code(err) != c.want {
				t.Errorf("%s: %s: got %v, want %v", name, method, err, c.want)
			}
		}
	}
	for method, call := range calls(raw(t, known, credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}))) {
		if err := call(header(patiently(t), "true")); status.Code(err) != codes.Unavailable {
			t.Errorf("over TLS: %s: got %v, want Unavailable", method, err)
		}
	}
	for method, call := range calls(raw(t, known, insecure.NewCredentials())) {
		err := call(header(patiently(t), "true"))
		if method == "ValidateJWTSVID" {
			continue // its token is rubbish
		}
		if err != nil {
			t.Errorf("as it should be, to check this test: %s: %v", method, err)
		}
	}
}

func TestHostileJWTRequests(t *testing.T) {
	i, _ := start(t, issuer.Config{IDFor: ordersForUs})
	api := raw(t, i, insecure.NewCredentials())
	many := make([]string, 17)
	for n := range many {
		many[n] = fmt.Sprint(n)
	}
	cases := map[string]struct {
		request *workload.JWTSVIDRequest
		want    codes.Code
	}{
		"no audience":      {&workload.JWTSVIDRequest{}, codes.InvalidArgument},
		"empty audience":   {&workload.JWTSVIDRequest{Audience: []string{"a", ""}}, codes.InvalidArgument},
		"many audiences":   {&workload.JWTSVIDRequest{Audience: many}, codes.InvalidArgument},
		"long audience":    {&workload.JWTSVIDRequest{Audience: []string{strings.Repeat("a", 3000)}}, codes.InvalidArgument},
		"another's ID":     {&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: other.String()}, codes.PermissionDenied},
		"rubbish ID":       {&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "x"}, codes.PermissionDenied},
		"too large at all": {&workload.JWTSVIDRequest{Audience: []string{strings.Repeat("a", 100<<10)}}, codes.ResourceExhausted},
		"own ID":           {&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: orders.String()}, codes.OK},
	}
	for name, c := range cases {
		_, err := api.FetchJWTSVID(metadata.AppendToOutgoingContext(patiently(t), "workload.spiffe.io", "true"), c.request)
		if status.Code(err) != c.want {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
}

// Processes of one user are told apart by the socket that they reach.
func TestSockets(t *testing.T) {
	a, b := socket(t), socket(t)
	i, stop := start(t, issuer.Config{Sockets: map[string]spiffeid.ID{a: orders, b: other}})
	if got := i.Address(); got != "" {
		t.Errorf("address %q without a main socket", got)
	}
	for path, want := range map[string]spiffeid.ID{a: orders, b: other} {
		svid, err := client(t, issuer.AddressOf(path)).FetchX509SVID(patiently(t))
		if err != nil || svid.ID != want {
			t.Errorf("%s: %v, %v, want %s", path, svid, err, want)
		}
		for of, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
			if info, err := os.Stat(of); err != nil || info.Mode().Perm() != want {
				t.Errorf("%s has mode %v (%v), want %v", of, info.Mode(), err, want)
			}
		}
	}
	stop()
	for _, path := range []string{a, b} {
		if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 0 {
			t.Errorf("after Run, %v is left (%v)", entries, err)
		}
	}
}

func TestStopCutsStreams(t *testing.T) {
	i, stop := start(t, issuer.Config{IDFor: ordersForUs})
	stream, err := raw(t, i, insecure.NewCredentials()).FetchX509SVID(
		metadata.AppendToOutgoingContext(patiently(t), "workload.spiffe.io", "true"), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	stop()
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v, want Unavailable", err)
	}
	if err := i.Close(); err != nil {
		t.Errorf("Close after Run: %v", err)
	}
}

func TestNewFaults(t *testing.T) {
	anyone := func(identity.Peer) (spiffeid.ID, bool) { return orders, true }
	open := socket(t)
	if err := os.MkdirAll(filepath.Dir(open), 0o750); err != nil {
		t.Fatal(err)
	}
	live := socket(t)
	if err := os.MkdirAll(filepath.Dir(live), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", live)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	file := socket(t)
	if err := os.WriteFile(filepath.Dir(file), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fine := socket(t)
	cases := map[string]struct {
		cfg  issuer.Config
		want string
	}{
		"no trust domain":     {issuer.Config{Socket: fine, IDFor: anyone}, "trust domain"},
		"no socket":           {issuer.Config{TrustDomain: domain}, "needs a socket"},
		"no IDFor":            {issuer.Config{TrustDomain: domain, Socket: fine}, "belong together"},
		"IDFor for nothing":   {issuer.Config{TrustDomain: domain, IDFor: anyone, Sockets: map[string]spiffeid.ID{fine: orders}}, "belong together"},
		"negative TTL":        {issuer.Config{TrustDomain: domain, Socket: fine, IDFor: anyone, TTL: -1}, "at least"},
		"tiny JWT TTL":        {issuer.Config{TrustDomain: domain, Socket: fine, IDFor: anyone, JWTTTL: 1}, "at least"},
		"root path":           {issuer.Config{TrustDomain: domain, Sockets: map[string]spiffeid.ID{fine: domain.ID()}}, "not a workload"},
		"foreign ID":          {issuer.Config{TrustDomain: domain, Sockets: map[string]spiffeid.ID{fine: spiffeid.RequireFromString("spiffe://a.b/c")}}, "is not of trust domain"},
		"no ID":               {issuer.Config{TrustDomain: domain, Sockets: map[string]spiffeid.ID{fine: {}}}, "no SPIFFE ID"},
		"socket twice":        {issuer.Config{TrustDomain: domain, Socket: fine, IDFor: anyone, Sockets: map[string]spiffeid.ID{fine: orders}}, "twice"},
		"relative socket":     {issuer.Config{TrustDomain: domain, Socket: "s", IDFor: anyone}, ""},
		"open directory":      {issuer.Config{TrustDomain: domain, Socket: open, IDFor: anyone}, "open to others"},
		"live socket":         {issuer.Config{TrustDomain: domain, Socket: live, IDFor: anyone}, "another process"},
		"file as a directory": {issuer.Config{TrustDomain: domain, Socket: file, IDFor: anyone}, "not a directory"},
	}
	for name, c := range cases {
		i, err := issuer.New(c.cfg)
		if err == nil {
			_ = i.Close()
			t.Errorf("%s: was taken", name)
			continue
		}
		if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %q, want it to say %q", name, err, c.want)
		}
	}
	if conn, err := net.Dial("unix", live); err != nil {
		t.Errorf("the live socket is gone: %v", err)
	} else {
		_ = conn.Close()
	}
	i, err := issuer.New(issuer.Config{TrustDomain: domain, Socket: fine, IDFor: anyone})
	if err != nil {
		t.Fatal(err)
	}
	if err := i.Close(); err != nil {
		t.Errorf("Close without Run: %v", err)
	}
	if entries, err := os.ReadDir(filepath.Dir(fine)); err != nil || len(entries) != 0 {
		t.Errorf("Close without Run leaves %v (%v)", entries, err)
	}
}
