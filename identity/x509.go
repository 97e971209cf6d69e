package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// x509Verifier takes TLS clients for whom their X.509-SVID names.
type x509Verifier struct {
	source *Source // nil: no Workload API
	served servedDomains
	now    func() time.Time
}

// certificate returns the agent's own X.509-SVID for a handshake.
func (v *x509Verifier) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if v.source == nil {
		return nil, fmt.Errorf("%w: no SPIFFE Workload API is configured; connect without TLS as a static peer, or configure one", ErrNotReady)
	}
	svid, err := v.source.svidAt(v.now())
	if err != nil {
		return nil, err
	}
	if own := v.served.own; !own.IsZero() && !svid.ID.MemberOf(own) {
		return nil, fmt.Errorf("%w: the Workload API gave it %s, which is not of its configured trust domain %s", ErrNotReady, svid.ID, own.Name())
	}
	cert := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
	for _, c := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return cert, nil
}

// admit judges a client in its handshake and keeps the verdict for its calls.
func (v *x509Verifier) admit(c *Conn, state tls.ConnectionState) error {
	switch {
	case state.DidResume:
		// Cannot happen while tickets are off; the check is what makes it safe.
		return fmt.Errorf("%w: it resumed an earlier session, which proves nothing about today", ErrUntrusted)
	case state.NegotiatedProtocol != "h2":
		return errors.New("the client did not ask for HTTP/2 (ALPN h2)")
	}
	now, snap := v.now(), v.source.current.Load()
	d := v.judge(state.PeerCertificates, c.Peer, snap, now)
	if d.err == nil {
		d.err = snap.bundlesUsable(now)
	}
	if d.err != nil {
		return d.err
	}
	c.verdict.Store(d)
	return nil
}

// Verify implements Verifier.
func (v *x509Verifier) Verify(_ context.Context, c *Conn) (Caller, error) {
	now, snap := v.now(), v.source.current.Load()
	d := c.verdict.Load()
	if d == nil || d.basis != any(snap.trust) {
		d = v.judge(c.TLS.PeerCertificates, c.Peer, snap, now)
		c.verdict.Store(d)
	}
	if d.err != nil {
		return Caller{}, d.err
	}
	c.endAt(d.caller.Expires, now)
	if !now.Before(d.caller.Expires) {
		return Caller{}, fmt.Errorf("%w: %s, at %s; connect again with its successor", ErrExpired, d.caller.ID, d.caller.Expires.UTC().Format(time.RFC3339))
	}
	if err := snap.bundlesUsable(now); err != nil {
		return Caller{}, err
	}
	return d.caller, nil
}

// judge verifies a client's certificates against the bundles of one moment.
func (v *x509Verifier) judge(certs []*x509.Certificate, peer Peer, snap *snapshot, now time.Time) *verdict {
	d := &verdict{basis: snap.trust}
	id, expires, err := v.verify(certs, snap, now)
	if err != nil {
		d.err = fmt.Errorf("%w: %w", ErrUntrusted, err)
		return d
	}
	d.caller = Caller{ID: id, Proof: ProofX509SVID, Expires: expires, Peer: peer}
	return d
}

func (v *x509Verifier) verify(certs []*x509.Certificate, snap *snapshot, now time.Time) (spiffeid.ID, time.Time, error) {
	if len(certs) == 0 {
		return spiffeid.ID{}, time.Time{}, errors.New("it shows no certificate")
	}
	id, err := x509svid.IDFromCert(certs[0])
	if err != nil {
		return spiffeid.ID{}, time.Time{}, err
	}
	if err := v.served.check(id, snap.own); err != nil {
		return spiffeid.ID{}, time.Time{}, err
	}
	if err := checkLeaf(id, certs[0]); err != nil {
		return spiffeid.ID{}, time.Time{}, err
	}
	_, chains, err := x509svid.Verify(certs, snap.trust, x509svid.WithTime(now))
	if err != nil {
		return spiffeid.ID{}, time.Time{}, err
	}
	chains, err = goodChains(id, chains)
	if err != nil {
		return spiffeid.ID{}, time.Time{}, err
	}
	return id, chainsEnd(chains), nil
}

// goodChains keeps the chains whose intermediates may sign for a client of id's
// trust domain. It fails when none is left, with the fault of the last.
func goodChains(id spiffeid.ID, chains [][]*x509.Certificate) ([][]*x509.Certificate, error) {
	var fault error
	chains = slices.DeleteFunc(chains, func(chain []*x509.Certificate) bool {
		for _, signer := range chain[1:max(len(chain)-1, 1)] {
			if err := checkIntermediate(id, signer); err != nil {
				fault = err
				return true
			}
		}
		return false
	})
	if len(chains) == 0 {
		return nil, fault
	}
	return chains, nil
}

// checkIntermediate holds that the SPIFFE ID of a signing certificate, where it
// has one, is that of the leaf's trust domain (X.509-SVID, section 3.2). Without
// it, trust domains whose authorities have a root in common could sign for each
// other. Extended usages, if any, bind those below; x509svid.Verify does not look
// at them. Roots are trusted as the bundle has them.
func checkIntermediate(id spiffeid.ID, signer *x509.Certificate) error {
	for _, uri := range signer.URIs {
		if uri.Scheme != "spiffe" {
			continue
		}
		if of, err := spiffeid.FromURI(uri); err != nil || of != id.TrustDomain().ID() {
			return fmt.Errorf("%s is signed by an intermediate of %q, which may not sign for trust domain %s", id, uri, id.TrustDomain().Name())
		}
	}
	restricted := len(signer.ExtKeyUsage)+len(signer.UnknownExtKeyUsage) > 0
	if restricted && !slices.Contains(signer.ExtKeyUsage, x509.ExtKeyUsageClientAuth) && !slices.Contains(signer.ExtKeyUsage, x509.ExtKeyUsageAny) {
		return fmt.Errorf("%s is signed by an intermediate whose extended key usages leave clientAuth out", id)
	}
	return nil
}

// checkLeaf holds what the X.509-SVID standard demands of a validator and
// x509svid.Verify does not check on the certificates of others: a path (section
// 5.2), digitalSignature, and extended usages, if any, that allow a TLS client
// (sections 4.3, 4.4).
func checkLeaf(id spiffeid.ID, leaf *x509.Certificate) error {
	switch {
	case id.Path() == "":
		return fmt.Errorf("%s names a trust domain, not a workload", id)
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return fmt.Errorf("the certificate of %s lacks the key usage digitalSignature", id)
	}
	restricted := len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) > 0
	if restricted && !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
		return fmt.Errorf("the certificate of %s lacks the extended key usage clientAuth", id)
	}
	return nil
}

// chainsEnd is when the last of the chains stops being valid: each ends with
// the first of its certificates.
func chainsEnd(chains [][]*x509.Certificate) time.Time {
	var last time.Time
	for _, chain := range chains {
		end := chain[0].NotAfter
		for _, cert := range chain[1:] {
			if cert.NotAfter.Before(end) {
				end = cert.NotAfter
			}
		}
		if end.After(last) {
			last = end
		}
	}
	return last
}
