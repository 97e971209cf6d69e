// Package identity says who is at the other end of a connection.
//
// One Unix socket serves every kind of caller. The first byte of a connection
// decides how it must prove itself, and nothing decides it again: a TLS client
// proves an X.509-SVID or is turned away; a request on a plaintext connection
// proves a JWT-SVID where it brings a token, and comes from a static peer or
// nobody where it brings none. A proof that failed is never replaced by a weaker
// one, and proofs that are offered together must agree.
//
// A proof is not believed for longer than it holds. CallerFromContext checks,
// at every call, that the SVID has not expired, that its trust domain's bundle
// still vouches for it, and that the static mapping is still there.
package identity

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/peer"
)

// Proof is how a caller proved its SPIFFE ID, strongest first: X.509-SVID,
// JWT-SVID, attested peer, static peer.
type Proof string

// The kinds of proof.
const (
	// ProofX509SVID is possession of the private key of an X.509-SVID, shown in
	// a TLS handshake on this connection.
	ProofX509SVID Proof = "x509-svid"
	// ProofJWTSVID is possession of a bearer token, sent with the request.
	ProofJWTSVID Proof = "jwt-svid"
	// ProofAttestedPeer is what SPIRE attests about the connecting process.
	ProofAttestedPeer Proof = "attested-peer"
	// ProofStaticPeer is the configured mapping of a kernel uid and gid.
	ProofStaticPeer Proof = "static-peer"
)

// Peer is what the kernel says about the process that called connect(2) on a
// Unix socket, as of that moment (SO_PEERCRED). UID and GID are effective IDs,
// translated to this process's user namespace; GID is the primary group only.
type Peer struct {
	UID, GID uint32
	// PID in this process's PID namespace; 0 when the peer is outside of it and
	// so has none. It may be reused after the peer's death.
	PID int32
}

// Caller is who calls and how that was proven. It is a value: copies are free.
type Caller struct {
	// ID has a path, and is zero only for a caller that is not identified.
	ID    spiffeid.ID
	Proof Proof
	// Expires is when the proof ends; zero means that it does not.
	Expires time.Time
	// Peer is known for every caller, also for one that is not identified.
	Peer Peer
}

// Why a caller is not identified. The others are kinds of ErrUnidentified, so
// that errors.Is(err, ErrUnidentified) holds for each of them; RPC layers
// answer Unauthenticated.
var (
	ErrUnidentified = errors.New("caller is not identified")
	// ErrExpired means that the caller's SVID has expired. Of an X.509-SVID, it
	// was good before; the signature of an expired JWT-SVID is not looked at.
	ErrExpired = fmt.Errorf("%w: its SVID has expired", ErrUnidentified)
	// ErrUntrusted means that no current bundle vouches for the caller's SVID, or
	// that it breaks a rule of its standard or of this agent.
	ErrUntrusted = fmt.Errorf("%w: its SVID is not trusted", ErrUnidentified)
	// ErrNotReady means that callers with SVIDs cannot be served at the moment, or
	// at all: the agent has no X.509-SVID of its own, or no JWT bundles.
	ErrNotReady = fmt.Errorf("%w: the agent cannot verify SVIDs", ErrUnidentified)
	// ErrThrottled means that the caller's JWT-SVID was not looked at, since too
	// many bad ones came from its user of the host. It may be good: retry.
	ErrThrottled = fmt.Errorf("%w: its SVID was not looked at", ErrUnidentified)
)

// Verifier is one way of proving who is at the other end of a connection,
// whatever its requests bring. The handshake gives each connection exactly one.
type Verifier interface {
	// Verify says who calls on c. It runs at every call, so it is cheap where
	// nothing has changed since the last, and it never blocks. The error is a
	// kind of ErrUnidentified.
	Verify(ctx context.Context, c *Conn) (Caller, error)
}

// CallerFromContext says who calls on the connection that a gRPC request came
// by, whose server uses Credentials. It checks again at every call and costs
// well under a microsecond while nothing has changed, about one with a token.
//
// The error is a kind of ErrUnidentified; the caller then has nothing but its
// Peer, for the audit record.
func CallerFromContext(ctx context.Context) (Caller, error) {
	c, ok := connFromContext(ctx)
	if !ok {
		return Caller{}, fmt.Errorf("%w: the request did not come by a listener of this agent", ErrUnidentified)
	}
	caller, err := c.credentials.identify(ctx, c)
	if err != nil {
		return Caller{Peer: c.Peer}, err
	}
	return caller, nil
}

// PeerFromContext returns what the kernel says about the process that a gRPC
// request came from, identified or not. It reports false when the server does
// not use Credentials.
func PeerFromContext(ctx context.Context) (Peer, bool) {
	c, ok := connFromContext(ctx)
	if !ok {
		return Peer{}, false
	}
	return c.Peer, true
}

func connFromContext(ctx context.Context) (*Conn, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, false
	}
	c, ok := p.AuthInfo.(*Conn)
	return c, ok
}
