package issuer

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// authorityLife is longer than any development process lives.
	authorityLife = 10 * 365 * 24 * time.Hour
	// backdate allows for clocks that differ a little.
	backdate = 10 * time.Second
	// refreshHint tells federated readers how often to ask; the keys never change.
	refreshHint = 5 * time.Minute
)

// authority signs SVIDs of one trust domain with keys that never leave memory.
type authority struct {
	domain  spiffeid.TrustDomain
	cert    *x509.Certificate
	key     *ecdsa.PrivateKey
	jwtKey  *ecdsa.PrivateKey
	jwtID   string
	jwks    []byte
	jwtKeys *jwtbundle.Bundle
}

func newAuthority(domain spiffeid.TrustDomain, now time.Time) (*authority, error) {
	a := &authority{domain: domain}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	if a.jwtKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{Organization: []string{"kms-agent development issuer, not for production"}, CommonName: domain.Name()},
		URIs:                  []*url.URL{domain.ID().URL()},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(authorityLife),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	return a, a.publish()
}

// publish makes the JWT bundle's document.
func (a *authority) publish() error {
	public, err := x509.MarshalPKIXPublicKey(a.jwtKey.Public())
	if err != nil {
		return err
	}
	sum := sha256.Sum256(public)
	a.jwtID = hex.EncodeToString(sum[:16])
	b := spiffebundle.New(a.domain)
	if err := b.AddJWTAuthority(a.jwtID, a.jwtKey.Public()); err != nil {
		return err
	}
	b.SetRefreshHint(refreshHint)
	b.SetSequenceNumber(1)
	a.jwtKeys = b.JWTBundle()
	a.jwks, err = b.Marshal()
	return err
}

// x509SVID issues a new key and certificate for id: DER and PKCS #8.
func (a *authority) x509SVID(id spiffeid.ID, now time.Time, ttl time.Duration) (cert, key []byte, err error) {
	if err := checkID(id, a.domain); err != nil {
		return nil, nil, err
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{Organization: []string{"kms-agent development"}},
		URIs:                  []*url.URL{id.URL()},
		NotBefore:             now.Add(-backdate),
		NotAfter:              wholeSecond(now.Add(ttl)),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	cert, err = x509.CreateCertificate(rand.Reader, template, a.cert, private.Public(), a.key)
	if err != nil {
		return nil, nil, err
	}
	key, err = x509.MarshalPKCS8PrivateKey(private)
	return cert, key, err
}

// jwtSVID issues a token: a JWS in compact form, ES256 (RFC 7515, RFC 7518
// section 3.4).
func (a *authority) jwtSVID(id spiffeid.ID, audience []string, now time.Time, ttl time.Duration) (string, error) {
	if err := checkID(id, a.domain); err != nil {
		return "", err
	}
	header, err := json.Marshal(map[string]string{"alg": "ES256", "kid": a.jwtID, "typ": "JWT"})
	if err != nil {
		return "", err
	}
	claims, err := json.Marshal(map[string]any{
		"sub": id.String(), "aud": audience,
		"iat": now.Unix(), "exp": wholeSecond(now.Add(ttl)).Unix(),
	})
	if err != nil {
		return "", err
	}
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode(header) + "." + encode(claims)
	sum := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, a.jwtKey, sum[:])
	if err != nil {
		return "", err
	}
	var signature [64]byte
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return signed + "." + encode(signature[:]), nil
}

// checkID refuses what no SVID may hold.
func checkID(id spiffeid.ID, domain spiffeid.TrustDomain) error {
	switch {
	case id.IsZero():
		return errors.New("there is no SPIFFE ID")
	case !id.MemberOf(domain):
		return fmt.Errorf("%s is not of trust domain %s", id, domain.Name())
	case id.Path() == "":
		return fmt.Errorf("%s names a trust domain, not a workload; add a path", id)
	}
	return nil
}

// wholeSecond rounds up: an SVID lasts at least as long as was asked.
func wholeSecond(t time.Time) time.Time {
	return t.Add(time.Second - 1).Truncate(time.Second)
}

// serial returns 127 random bits: positive, and not zero but by a miracle.
func serial() *big.Int {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b[:])
}

func ours(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(stat.Uid) == os.Geteuid()
}
