package identity_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	"github.com/kms-agent/kms-agent/identity"
)

// world is an agent with a Workload API that vouches for two trust domains, of
// which the agent serves its own.
type world struct {
	own, other *authority
	api        *workloadAPI
	source     *identity.Source
	agent      *agent
	clock      *clock
}

func newWorld(t testing.TB, change func(*identity.Config)) *world {
	t.Helper()
	w := &world{own: newAuthority(t, domain), other: newAuthority(t, foreign), api: newWorkloadAPI(t), clock: &clock{}}
	w.api.set(w.own.update(t, w.other), nil)
	w.api.start(t)
	w.source = startSource(t, identity.SourceConfig{Address: w.api.address, Now: w.clock.now, BundleMaxAge: time.Hour})
	untilStatus(t, w.source, identity.SourceReady)
	cfg := identity.Config{
		Source: w.source, Now: w.clock.now,
		// So that a fall-back would be seen.
		StaticPeers: []identity.StaticPeer{{UID: number(uid()), ID: billing}},
	}
	if change != nil {
		change(&cfg)
	}
	w.agent = startAgent(t, cfg)
	return w
}

func TestX509SVIDAndStaticPeerOnOneSocket(t *testing.T) {
	w := newWorld(t, nil)
	wantCaller(t, w.agent.dial(t, tlsClient(w.own.leaf(t, orders.String(), nil))), orders, identity.ProofX509SVID)
	wantCaller(t, w.agent.dial(t, nil), billing, identity.ProofStaticPeer)
}

// Every way to fail a TLS handshake. In none the caller becomes the static peer
// that a plaintext connection of the same process is.
func TestX509Refusals(t *testing.T) {
	w := newWorld(t, nil)
	stranger := newAuthority(t, domain)
	unknown := newAuthority(t, spiffeid.RequireTrustDomainFromString("unknown.org"))
	leaf := func(change func(*x509.Certificate)) *tls.Config {
		return tlsClient(w.own.leaf(t, orders.String(), change))
	}
	cases := map[string]struct {
		client *tls.Config
		want   error
		text   string
	}{
		"root-path ID": {tlsClient(w.own.leaf(t, domain.IDString(), nil)), identity.ErrUntrusted, "names a trust domain, not a workload"},
		"no digitalSignature": {leaf(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }),
			identity.ErrUntrusted, "digitalSignature"},
		"no key usage at all": {leaf(func(c *x509.Certificate) { c.KeyUsage = 0 }), identity.ErrUntrusted, "digitalSignature"},
		"extended key usage codeSigning only": {leaf(func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}
		}), identity.ErrUntrusted, "clientAuth"},
		"extended key usage serverAuth only": {leaf(func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}), identity.ErrUntrusted, "clientAuth"},
		"unknown extended key usage only": {leaf(func(c *x509.Certificate) {
			c.ExtKeyUsage, c.UnknownExtKeyUsage = nil, []asn1OID{{1, 3, 6, 1, 4, 1, 99999, 1}}
		}), identity.ErrUntrusted, "clientAuth"},
		"signs certificates": {leaf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), identity.ErrUntrusted, "KeyCertSign"},
		"is a CA": {leaf(func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage = true, c.KeyUsage|x509.KeyUsageCertSign
		}), identity.ErrUntrusted, "CA flag"},
		"expired": {leaf(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), identity.ErrUntrusted, "expired"},
		"not yet valid": {leaf(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }),
			identity.ErrUntrusted, "not yet valid"},
		"no URI": {leaf(func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"localhost"} }), identity.ErrUntrusted, "no URI SAN"},
		"two URIs": {leaf(func(c *x509.Certificate) {
			c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "example.org", Path: "/billing"})
		}), identity.ErrUntrusted, "more than one URI SAN"},
		"no SPIFFE ID":     {tlsClient(w.own.leaf(t, "https://example.org/orders", nil)), identity.ErrUntrusted, "scheme"},
		"unknown signer":   {tlsClient(stranger.leaf(t, orders.String(), nil)), identity.ErrUntrusted, "unknown authority"},
		"foreign, bundled": {tlsClient(w.other.leaf(t, "spiffe://other.org/orders", nil)), identity.ErrUntrusted, "only where they are configured as federated"},
		"foreign, unknown": {tlsClient(unknown.leaf(t, "spiffe://unknown.org/orders", nil)), identity.ErrUntrusted, "trust domain"},
		// A federated authority must not vouch for our own workloads.
		"own ID signed by a foreign authority": {tlsClient(w.other.leaf(t, orders.String(), nil)), identity.ErrUntrusted, "unknown authority"},
		"no certificate":                       {&tls.Config{InsecureSkipVerify: true}, nil, "certificate"},
		"TLS 1.2": {&tls.Config{
			Certificates:       []tls.Certificate{w.own.leaf(t, orders.String(), nil)},
			InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12,
		}, nil, "version"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			w.agent.wantHandshakeRefusal(t, w.agent.dial(t, c.client), c.want, c.text)
		})
	}
	t.Run("none of them, as a check of this test", func(t *testing.T) {
		wantCaller(t, w.agent.dial(t, leaf(nil)), orders, identity.ProofX509SVID)
	})
	t.Run("no extended key usage is no restriction", func(t *testing.T) {
		wantCaller(t, w.agent.dial(t, leaf(func(c *x509.Certificate) { c.ExtKeyUsage = nil })), orders, identity.ProofX509SVID)
	})
}

func TestX509FederatedWhereConfigured(t *testing.T) {
	w := newWorld(t, func(c *identity.Config) { c.FederatedTrustDomains = []spiffeid.TrustDomain{foreign} })
	partner := spiffeid.RequireFromString("spiffe://other.org/orders")
	wantCaller(t, w.agent.dial(t, tlsClient(w.other.leaf(t, partner.String(), nil))), partner, identity.ProofX509SVID)
}

func TestX509WithoutHTTP2IsRefused(t *testing.T) {
	w := newWorld(t, nil)
	conn := dialTLS(t, w.agent.path, tlsClient(w.own.leaf(t, orders.String(), nil)))
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Fatal("the agent answered a client that did not ask for HTTP/2")
	}
	if got := w.agent.refusal(t, 0).Err; !strings.Contains(got.Error(), "ALPN") {
		t.Fatalf("refused with %v, want it to speak of ALPN", got)
	}
}

// dialTLS is a client below gRPC. The handshake has ended on its side.
func dialTLS(t testing.TB, path string, cfg *tls.Config) *tls.Conn {
	t.Helper()
	raw, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = raw.Close() })
	if err := raw.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, cfg)
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	return conn
}

// sessions counts the session tickets that a client gets.
type sessions struct {
	tls.ClientSessionCache
	kept atomic.Int32
}

func (s *sessions) Put(key string, session *tls.ClientSessionState) {
	if session != nil {
		s.kept.Add(1)
	}
	s.ClientSessionCache.Put(key, session)
}

// A resumed session would skip the verification: there is none, and a client
// that tries is verified like any other.
func TestX509ResumedSession(t *testing.T) {
	w := newWorld(t, nil)
	cfg := tlsClient(w.own.leaf(t, orders.String(), nil))
	cfg.NextProtos = []string{"h2"}
	cache := &sessions{ClientSessionCache: tls.NewLRUClientSessionCache(8)}
	cfg.ClientSessionCache = cache
	for range 3 {
		conn := dialTLS(t, w.agent.path, cfg)
		if conn.ConnectionState().DidResume {
			t.Fatal("the agent resumed a session")
		}
		// The server's first frame comes after any ticket.
		if _, err := conn.Read(make([]byte, 9)); err != nil {
			t.Fatalf("a good client was not served: %v", err)
		}
		_ = conn.Close()
	}
	if n := cache.kept.Load(); n != 0 {
		t.Errorf("the agent gave out %d session tickets", n)
	}
	removed := newAuthority(t, domain)
	before := w.source.Updated()
	w.api.set(removed.update(t), nil)
	<-before
	conn := dialTLS(t, w.agent.path, cfg)
	if _, err := conn.Read(make([]byte, 9)); err == nil {
		t.Fatal("a client whose authority is gone came in with its earlier session")
	}
}

func TestX509ExpiryOnALiveConnection(t *testing.T) {
	w := newWorld(t, nil)
	conn := w.agent.dial(t, tlsClient(w.own.leaf(t, orders.String(), func(c *x509.Certificate) {
		c.NotAfter = time.Now().Add(30 * time.Minute)
	})))
	wantCaller(t, conn, orders, identity.ProofX509SVID)
	w.clock.forward(31 * time.Minute)
	w.agent.wantUnauthenticated(t, conn, identity.ErrExpired, orders.String())
}

// The proof ends with the first certificate of the chain that ends.
func TestX509IntermediateExpiryOnALiveConnection(t *testing.T) {
	w := newWorld(t, nil)
	key := newKey(t)
	template := *w.own.cert
	template.NotAfter = time.Now().Add(30 * time.Minute)
	middle := &authority{domain: domain, key: key, cert: sign(t, &template, w.own.cert, key.Public(), w.own.key)}
	leaf := middle.leaf(t, orders.String(), nil)
	leaf.Certificate = append(leaf.Certificate, middle.cert.Raw)
	conn := w.agent.dial(t, tlsClient(leaf))
	wantCaller(t, conn, orders, identity.ProofX509SVID)
	w.clock.forward(31 * time.Minute)
	w.agent.wantUnauthenticated(t, conn, identity.ErrExpired, orders.String())
}

// intermediate is an authority below a, as change leaves it.
func (a *authority) intermediate(t testing.TB, change func(*x509.Certificate)) *authority {
	t.Helper()
	key := newKey(t)
	template := *a.cert
	template.SubjectKeyId, template.AuthorityKeyId, template.RawSubject = nil, nil, nil
	template.Subject = pkix.Name{CommonName: "intermediate"}
	if change != nil {
		change(&template)
	}
	return &authority{domain: a.domain, key: key, cert: sign(t, &template, a.cert, key.Public(), a.key)}
}

// below is a client whose SVID is signed by an intermediate.
func (a *authority) below(t testing.TB) *tls.Config {
	leaf := a.leaf(t, orders.String(), nil)
	leaf.Certificate = append(leaf.Certificate, a.cert.Raw)
	return tlsClient(leaf)
}

// What x509svid.Verify lets an intermediate do.
func TestX509IntermediateRefusals(t *testing.T) {
	w := newWorld(t, nil)
	cases := map[string]struct {
		change func(*x509.Certificate)
		text   string
	}{
		// Two trust domains whose authorities have a root in common.
		"of another trust domain": {func(c *x509.Certificate) { c.URIs = []*url.URL{foreign.ID().URL()} }, "may not sign for trust domain example.org"},
		"of a workload":           {func(c *x509.Certificate) { c.URIs = []*url.URL{billing.URL()} }, "may not sign"},
		"of no SPIFFE ID":         {func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "UPPER"}} }, "may not sign"},
		"for servers alone":       {func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, "leave clientAuth out"},
		"no authority": {func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage, c.URIs = false, x509.KeyUsageDigitalSignature, []*url.URL{billing.URL()}
		}, "cannot sign this kind of certificate"},
		"expired": {func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }, "expired"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			w.agent.wantHandshakeRefusal(t, w.agent.dial(t, w.own.intermediate(t, c.change).below(t)), identity.ErrUntrusted, c.text)
		})
	}
	for name, change := range map[string]func(*x509.Certificate){
		"of the trust domain": nil,
		"without SPIFFE ID":   func(c *x509.Certificate) { c.URIs = nil },
		"with other URIs":     func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "https", Host: "ca.example.org"}} },
		"for clients too":     func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} },
		"for any usage":       func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} },
	} {
		t.Run(name, func(t *testing.T) {
			wantCaller(t, w.agent.dial(t, w.own.intermediate(t, change).below(t)), orders, identity.ProofX509SVID)
		})
	}
}

// With its proof the connection ends, so that a client with a newer SVID is back
// without an error.
func TestX509ConnectionEndsWithItsProof(t *testing.T) {
	w := newWorld(t, nil)
	short := w.own.leaf(t, orders.String(), func(c *x509.Certificate) { c.NotAfter = time.Now().Add(2 * time.Second) })
	long := w.own.leaf(t, orders.String(), nil)
	current := make(chan tls.Certificate, 2)
	current <- short
	current <- long
	conn := w.agent.dial(t, &tls.Config{
		InsecureSkipVerify: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			cert := <-current
			return &cert, nil
		},
	})
	wantCaller(t, conn, orders, identity.ProofX509SVID)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if !conn.WaitForStateChange(ctx, connectivity.Ready) {
		t.Fatal("the connection outlived its proof")
	}
	if time.Now().Before(short.Leaf.NotAfter) {
		t.Fatal("the connection ended before its proof")
	}
	wantCaller(t, conn, orders, identity.ProofX509SVID)
}

func TestX509BundleRemovedOnALiveConnection(t *testing.T) {
	w := newWorld(t, func(c *identity.Config) { c.FederatedTrustDomains = []spiffeid.TrustDomain{foreign} })
	own := w.agent.dial(t, tlsClient(w.own.leaf(t, orders.String(), nil)))
	partner := w.agent.dial(t, tlsClient(w.other.leaf(t, "spiffe://other.org/orders", nil)))
	set := func(update func(*world) *wUpdate) {
		updated := w.source.Updated()
		w.api.set(update(w), nil)
		<-updated
	}
	served := func(conn *grpc.ClientConn, id string) {
		t.Helper()
		wantCaller(t, conn, spiffeid.RequireFromString(id), identity.ProofX509SVID)
	}
	served(own, orders.String())
	served(partner, "spiffe://other.org/orders")

	set(func(w *world) *wUpdate { return w.own.update(t) })
	served(own, orders.String())
	w.agent.wantUnauthenticated(t, partner, identity.ErrUntrusted, "no bundle for trust domain")

	set(func(w *world) *wUpdate { return w.own.update(t, newAuthority(t, foreign)) })
	w.agent.wantUnauthenticated(t, partner, identity.ErrUntrusted, "unknown authority")

	set(func(w *world) *wUpdate { return w.own.update(t, w.other) })
	served(partner, "spiffe://other.org/orders")

	// Our own authority is replaced: its SVIDs end, although not expired.
	set(func(*world) *wUpdate { return newAuthority(t, domain).update(t) })
	w.agent.wantUnauthenticated(t, own, identity.ErrUntrusted, "unknown authority")
}

func TestX509OutageBeyondBundleMaxAge(t *testing.T) {
	api := newWorkloadAPI(t)
	own, clk := newAuthority(t, domain), &clock{}
	api.set(own.update(t), nil)
	stop := api.start(t)
	source := startSource(t, identity.SourceConfig{Address: api.address, Now: clk.now, BundleMaxAge: 10 * time.Minute})
	untilStatus(t, source, identity.SourceReady)
	a := startAgent(t, identity.Config{Source: source, Now: clk.now})
	conn := a.dial(t, tlsClient(own.leaf(t, orders.String(), nil)))
	wantCaller(t, conn, orders, identity.ProofX509SVID)

	stop()
	state := untilStatus(t, source, identity.SourceStale)
	wantCaller(t, conn, orders, identity.ProofX509SVID)
	wantCaller(t, a.dial(t, tlsClient(own.leaf(t, orders.String(), nil))), orders, identity.ProofX509SVID)

	clk.forward(9 * time.Minute)
	wantCaller(t, conn, orders, identity.ProofX509SVID)
	clk.forward(2 * time.Minute)
	if got := source.State(); got.Status != identity.SourceExpired || !got.BundlesEnd.Equal(state.BundlesEnd) {
		t.Fatalf("after the bound the source is %s (bundles until %v, at first %v)", got.Status, got.BundlesEnd, state.BundlesEnd)
	}
	a.wantUnauthenticated(t, conn, identity.ErrUntrusted, "has not been heard")
	a.wantHandshakeRefusal(t, a.dial(t, tlsClient(own.leaf(t, orders.String(), nil))), identity.ErrUntrusted, "has not been heard")

	api.start(t)
	untilStatus(t, source, identity.SourceReady)
	wantCaller(t, conn, orders, identity.ProofX509SVID)
}

func TestTLSClientsAreRefusedWithoutWorkloadAPI(t *testing.T) {
	own := newAuthority(t, domain)
	a := startAgent(t, identity.Config{StaticPeers: []identity.StaticPeer{{UID: number(uid()), ID: billing}}})
	a.wantHandshakeRefusal(t, a.dial(t, tlsClient(own.leaf(t, orders.String(), nil))), identity.ErrNotReady, "no SPIFFE Workload API is configured")
	wantCaller(t, a.dial(t, nil), billing, identity.ProofStaticPeer)
}

func TestTLSClientsAreRefusedWhileStarting(t *testing.T) {
	own := newAuthority(t, domain)
	api := newWorkloadAPI(t)
	source := startSource(t, identity.SourceConfig{Address: api.address})
	a := startAgent(t, identity.Config{Source: source, StaticPeers: []identity.StaticPeer{{UID: number(uid()), ID: billing}}})
	a.wantHandshakeRefusal(t, a.dial(t, tlsClient(own.leaf(t, orders.String(), nil))), identity.ErrNotReady, "has not answered yet")
	wantCaller(t, a.dial(t, nil), billing, identity.ProofStaticPeer)

	api.set(own.update(t), nil)
	api.start(t)
	untilStatus(t, source, identity.SourceReady)
	wantCaller(t, a.dial(t, tlsClient(own.leaf(t, orders.String(), nil))), orders, identity.ProofX509SVID)
}

func TestSVIDOfAnotherTrustDomainThanConfigured(t *testing.T) {
	w := newWorld(t, func(c *identity.Config) {
		c.TrustDomain = foreign
		c.StaticPeers = nil
	})
	w.agent.wantHandshakeRefusal(t, w.agent.dial(t, tlsClient(w.own.leaf(t, orders.String(), nil))), identity.ErrNotReady, "configured trust domain other.org")
}

func tlsHandshake(conn net.Conn, cfg *tls.Config) error { return tls.Client(conn, cfg).Handshake() }
