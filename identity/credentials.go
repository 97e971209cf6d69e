package identity

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
)

// DefaultHandshakeTimeout is how long a client may take to prove itself where
// Config does not say.
const DefaultHandshakeTimeout = 5 * time.Second

// tlsHandshakeRecord is the first byte of a TLS connection (RFC 8446, section
// 5.1). No other protocol that is served begins with it.
const tlsHandshakeRecord = 0x16

// Config says which callers Credentials recognise.
type Config struct {
	// Source of the agent's own X.509-SVID and of the bundles; nil turns TLS
	// clients away.
	Source *Source
	// TrustDomain is the agent's own, whose workloads may call. Zero means that
	// of the agent's own X.509-SVID.
	TrustDomain spiffeid.TrustDomain
	// FederatedTrustDomains are accepted beside it. The bundles of other trust
	// domains are not used, although the Workload API may deliver them.
	FederatedTrustDomains []spiffeid.TrustDomain
	// Audience that a JWT-SVID must be for, each of these; empty means the SPIFFE
	// ID of the agent's own X.509-SVID.
	Audience []string
	// StaticPeers: the first that matches decides.
	StaticPeers []StaticPeer
	// Proofs that are accepted; empty means every one. A caller who offers another
	// is refused, and never taken for somebody by a weaker one.
	Proofs []Proof
	// HandshakeTimeout bounds the time from accept to the end of the handshake;
	// 0 means DefaultHandshakeTimeout.
	HandshakeTimeout time.Duration
	// OnRefused is told of every connection that is turned away in its handshake,
	// which its client learns little about. Nil: nobody is told. It is called
	// from the connection's goroutine and must not block.
	OnRefused func(Refusal)
	// Now is the wall clock; nil means time.Now.
	Now func() time.Time
}

// Refusal is a connection that was turned away in its handshake.
type Refusal struct {
	// Peer is zero when the kernel could not say who it is.
	Peer Peer
	// TLS says whether it was a TLS client.
	TLS bool
	Err error
}

// Credentials are gRPC server credentials that recognise callers by the first
// byte of their connection: TLS clients by X.509-SVID, all others as static
// peers, or request by request by a JWT-SVID. The AuthInfo of a connection is
// *Conn. Safe for concurrent use.
//
// The listener must be one of a Unix socket. A wrapper around its connections
// must have a method NetConn() net.Conn.
type Credentials struct {
	static staticVerifier
	x509   x509Verifier
	jwt    jwtVerifier
	tls    *tls.Config
	// accepts tells which proofs are; nil: every one.
	accepts []Proof
	timeout time.Duration
	refused func(Refusal)
}

// NewCredentials checks cfg and reports every fault in it at once.
func NewCredentials(cfg Config) (*Credentials, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.HandshakeTimeout <= 0 {
		cfg.HandshakeTimeout = DefaultHandshakeTimeout
	}
	c := &Credentials{timeout: cfg.HandshakeTimeout, refused: cfg.OnRefused, accepts: slices.Clone(cfg.Proofs)}
	served := servedDomains{own: cfg.TrustDomain, federated: slices.Clone(cfg.FederatedTrustDomains)}
	c.x509 = x509Verifier{source: cfg.Source, served: served, now: cfg.Now}
	c.jwt.source, c.jwt.served, c.jwt.now, c.jwt.audience = cfg.Source, served, cfg.Now, slices.Clone(cfg.Audience)
	c.static.own = cfg.TrustDomain
	if err := errors.Join(c.static.set(cfg.StaticPeers), checkAudience(cfg.Audience), checkProofs(cfg.Proofs)); err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	c.tls = &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		// Any certificate is asked for; VerifyConnection judges it.
		ClientAuth:     tls.RequireAnyClientCert,
		GetCertificate: c.certificate,
		// A resumed session would not be verified against today's bundles.
		SessionTicketsDisabled: true,
		Time:                   cfg.Now,
	}
	return c, nil
}

// checkAudience refuses what would let tokens for others in.
func checkAudience(audience []string) error {
	if slices.Contains(audience, "") {
		return errors.New("an audience is empty; write the one that tokens for this agent are to name, or none for its SPIFFE ID")
	}
	return nil
}

func checkProofs(proofs []Proof) error {
	for _, p := range proofs {
		if !slices.Contains([]Proof{ProofX509SVID, ProofJWTSVID, ProofStaticPeer}, p) {
			return fmt.Errorf("%q is no proof that can be accepted here; choose among %s, %s and %s", p, ProofX509SVID, ProofJWTSVID, ProofStaticPeer)
		}
	}
	return nil
}

// accepted fails for a proof that is not accepted here.
func (c *Credentials) accepted(p Proof) error {
	if len(c.accepts) == 0 || slices.Contains(c.accepts, p) {
		return nil
	}
	return fmt.Errorf("%w: %s is not accepted on this listener, which takes %v", ErrUnidentified, p, c.accepts)
}

// certificate is what TLS clients are answered with, where they are answered.
func (c *Credentials) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if err := c.accepted(ProofX509SVID); err != nil {
		return nil, err
	}
	return c.x509.certificate(hello)
}

// identify says who makes a request. Every proof that is offered must hold; the
// strongest says how the caller was proven, and they must agree on who it is.
func (c *Credentials) identify(ctx context.Context, conn *Conn) (Caller, error) {
	values := metadata.ValueFromIncomingContext(ctx, authorization)
	if values == nil {
		return conn.verifier.Verify(ctx, conn)
	}
	if err := c.accepted(ProofJWTSVID); err != nil {
		return Caller{}, err
	}
	named, err := c.jwt.verify(values, conn.Peer)
	if err != nil || conn.TLS == nil {
		return named, err
	}
	caller, err := conn.verifier.Verify(ctx, conn)
	if err == nil && caller.ID != named.ID {
		return Caller{}, fmt.Errorf("%w: the connection is that of %s and the JWT-SVID that of %s; prove one identity", ErrUnidentified, caller.ID, named.ID)
	}
	return caller, err
}

// refusal is the Verifier of connections that prove nothing which is accepted.
type refusal struct{ err error }

// Verify implements Verifier.
func (r refusal) Verify(context.Context, *Conn) (Caller, error) { return Caller{}, r.err }

// SetStaticPeers replaces the static peers, also for connections that are open:
// a caller whose rule is gone is not identified from its next call on. When it
// returns an error nothing has changed.
func (c *Credentials) SetStaticPeers(peers []StaticPeer) error {
	if err := c.static.set(peers); err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	return nil
}

// ServerHandshake implements credentials.TransportCredentials. The connection's
// deadline is left at the end of the handshake's time, so that what gRPC reads
// next is bounded by it too; gRPC then clears it.
func (c *Credentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn := &Conn{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, credentials: c,
	}
	isTLS, err := c.handshake(raw, conn)
	if err != nil {
		if conn.pidfd != nil {
			_ = conn.pidfd.Close()
		}
		err = fmt.Errorf("identity: connection refused: %w", err)
		if c.refused != nil {
			c.refused(Refusal{Peer: conn.Peer, TLS: isTLS, Err: err})
		}
		return nil, nil, err
	}
	return &ownedConn{Conn: conn.transport, owner: conn}, conn, nil
}

func (c *Credentials) handshake(raw net.Conn, conn *Conn) (isTLS bool, err error) {
	if err := raw.SetDeadline(time.Now().Add(c.timeout)); err != nil {
		return false, err
	}
	socket, err := rawConn(raw)
	if err != nil {
		return false, err
	}
	conn.Peer, conn.pidfd, err = kernelPeer(socket)
	if err != nil {
		return false, err
	}
	first, err := peekByte(socket)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return false, fmt.Errorf("the client said nothing for %v: %w", c.timeout, err)
	case err != nil:
		return false, fmt.Errorf("the client left before it said anything: %w", err)
	case first != tlsHandshakeRecord:
		conn.verifier, conn.transport = &c.static, raw
		if err := c.accepted(ProofStaticPeer); err != nil {
			conn.verifier = refusal{err}
		}
		return false, nil
	}
	return true, c.handshakeTLS(raw, conn)
}

func (c *Credentials) handshakeTLS(raw net.Conn, conn *Conn) error {
	cfg := c.tls.Clone()
	cfg.VerifyConnection = func(state tls.ConnectionState) error {
		return c.x509.admit(conn, state)
	}
	t := tls.Server(raw, cfg)
	// No context: the deadline bounds it.
	if err := t.HandshakeContext(context.Background()); err != nil {
		return fmt.Errorf("TLS handshake: %w", err)
	}
	state := t.ConnectionState()
	conn.TLS, conn.verifier, conn.transport = &state, &c.x509, t
	return nil
}

// ClientHandshake implements credentials.TransportCredentials and always fails:
// these are a server's credentials.
func (c *Credentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("identity: these are the credentials of a server, not of a client")
}

// Info implements credentials.TransportCredentials.
func (c *Credentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "kms-agent"}
}

// Clone implements credentials.TransportCredentials. The clone is c itself:
// nothing of it belongs to one connection.
func (c *Credentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials. A server has
// none to override.
func (c *Credentials) OverrideServerName(string) error {
	return errors.New("identity: these are the credentials of a server, not of a client")
}
