package client_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
)

// authority issues what no honest issuer would.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func certificate(t testing.TB, a *authority, id string, usage x509.KeyUsage) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	uri, uerr := url.Parse(id)
	if err := errors.Join(err, uerr); err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), URIs: []*url.URL{uri}, KeyUsage: usage,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: a == nil, BasicConstraintsValid: true,
	}
	if a == nil {
		a = &authority{cert: template, key: key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// giving is a Workload API that gives one SVID.
type giving struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	svid *workload.X509SVID
}

func (g *giving) FetchX509SVID(_ *workload.X509SVIDRequest, s grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if err := s.Send(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{g.svid}}); err != nil {
		return err
	}
	<-s.Context().Done()
	return s.Context().Err()
}

func serveOn(t testing.TB, path string, register func(*grpc.Server), options ...grpc.ServerOption) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(append(options, grpc.WaitForHandlers(true))...)
	register(s)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
}

// A server whose certificate breaks the rules of X.509-SVIDs is no agent, although
// its trust domain's authority signed it.
func TestServerCertificates(t *testing.T) {
	a := &authority{}
	a.cert, a.key = certificate(t, nil, domain.IDString(), x509.KeyUsageCertSign)
	own, ownKey := certificate(t, a, orders.String(), x509.KeyUsageDigitalSignature)
	der, err := x509.MarshalPKCS8PrivateKey(ownKey)
	if err != nil {
		t.Fatal(err)
	}
	api := filepath.Join(tempDir(t), "api.sock")
	serveOn(t, api, func(s *grpc.Server) {
		workload.RegisterSpiffeWorkloadAPIServer(s, &giving{svid: &workload.X509SVID{
			SpiffeId: orders.String(), X509Svid: own.Raw, X509SvidKey: der, Bundle: a.cert.Raw,
		}})
	})
	cases := map[string]struct {
		id      string
		usage   x509.KeyUsage
		version uint16
		text    string
	}{
		"as it should be":     {agentID.String(), x509.KeyUsageDigitalSignature, tls.VersionTLS13, "did not come by a listener"},
		"root path":           {domain.IDString(), x509.KeyUsageDigitalSignature, tls.VersionTLS13, "names a trust domain"},
		"no digitalSignature": {agentID.String(), x509.KeyUsageKeyAgreement, tls.VersionTLS13, "lacks the key usage digitalSignature"},
		"TLS 1.2":             {agentID.String(), x509.KeyUsageDigitalSignature, tls.VersionTLS12, "protocol version"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			cert, key := certificate(t, a, c.id, c.usage)
			path := filepath.Join(tempDir(t), "s")
			serveOn(t, path, func(s *grpc.Server) { kmsagentv1.RegisterKMSServer(s, &kms{}) },
				grpc.Creds(credentials.NewTLS(&tls.Config{
					Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key}},
					MaxVersion:   c.version, ClientAuth: tls.RequireAnyClientCert,
				})))
			_, err := dial(t, client.Options{Socket: path, WorkloadAPI: "unix://" + api}).WhoAmI(patiently(t))
			if err == nil || !strings.Contains(err.Error(), c.text) {
				t.Fatalf("got %v, want an error that says %q", err, c.text)
			}
		})
	}
}
