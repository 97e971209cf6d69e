package identity_test

import (
	"fmt"
	"maps"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/identity"
)

func TestJWTSVID(t *testing.T) {
	w := newJWTWorld(t, nil)
	conn := w.agent.dial(t, nil)
	// One connection carries requests of several callers, proven each by itself.
	wantCaller(t, conn, billing, identity.ProofStaticPeer)
	w.wantBearer(t, conn, w.key.token(t, nil), orders, identity.ProofJWTSVID)
	w.wantBearer(t, conn, w.key.token(t, map[string]any{"sub": agentID.String()}), agentID, identity.ProofJWTSVID)
	wantCaller(t, conn, billing, identity.ProofStaticPeer)
	// aud may be a text instead of a list (RFC 7519, section 4.1.3).
	w.wantBearer(t, conn, w.key.token(t, map[string]any{"aud": agentID.String()}), orders, identity.ProofJWTSVID)
}

func TestJWTAlgorithms(t *testing.T) {
	w := newJWTWorld(t, nil)
	var keys []jwtKey
	for _, alg := range []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512, jose.PS256, jose.PS384, jose.PS512} {
		keys = append(keys, newJWTKey(t, "key "+string(alg), alg))
	}
	w.setBundles(t, w.bundles(t, keys...).Bundles)
	conn := w.agent.dial(t, nil)
	for _, key := range keys {
		w.wantBearer(t, conn, key.token(t, nil), orders, identity.ProofJWTSVID)
	}
}

func TestJWTConfiguredAudience(t *testing.T) {
	w := newJWTWorld(t, func(c *identity.Config) { c.Audience = []string{"kms", "kms-old"} })
	conn := w.agent.dial(t, nil)
	for _, audience := range []string{"kms", "kms-old"} {
		w.wantBearer(t, conn, w.key.token(t, map[string]any{"aud": audience}), orders, identity.ProofJWTSVID)
	}
	w.wantRefused(t, conn, identity.ErrUntrusted, "for 2 audiences", "Bearer "+w.key.token(t, map[string]any{"aud": []string{"kms", "kms-old"}}))
	w.wantRefused(t, conn, identity.ErrUntrusted, "expected audience", "Bearer "+w.key.token(t, nil))
	if _, err := identity.NewCredentials(identity.Config{Audience: []string{"kms", ""}}); err == nil {
		t.Error("an empty audience was taken")
	}
}

func TestJWTFederatedWhereConfigured(t *testing.T) {
	w := newJWTWorld(t, func(c *identity.Config) { c.FederatedTrustDomains = []spiffeid.TrustDomain{foreign} })
	partner := spiffeid.RequireFromString("spiffe://other.org/orders")
	conn := w.agent.dial(t, nil)
	w.wantBearer(t, conn, w.otherKey.token(t, map[string]any{"sub": partner.String()}), partner, identity.ProofJWTSVID)
	w.wantRefused(t, conn, identity.ErrUntrusted, "no JWT authority", "Bearer "+w.key.token(t, map[string]any{"sub": partner.String()}))
}

// Every proof that is offered must hold, and the strongest names the proof.
func TestJWTOnAConnectionWithX509SVID(t *testing.T) {
	w := newJWTWorld(t, nil)
	conn := w.agent.dial(t, tlsClient(w.own.leaf(t, orders.String(), nil)))
	w.wantBearer(t, conn, w.key.token(t, nil), orders, identity.ProofX509SVID)
	w.wantRefused(t, conn, identity.ErrUnidentified, "prove one identity", "Bearer "+w.key.token(t, map[string]any{"sub": billing.String()}))
	w.wantRefused(t, conn, identity.ErrExpired, "", "Bearer "+w.key.token(t, map[string]any{"exp": time.Now().Add(-time.Second).Unix()}))
	w.wantRefused(t, conn, identity.ErrUntrusted, "", "Bearer x")
	wantCaller(t, conn, orders, identity.ProofX509SVID)
	// A good token does not replace an X.509-SVID that is good no more.
	w.clock.forward(2 * time.Hour)
	w.agent.wantUnauthenticated(t, conn, identity.ErrExpired, "")
	w.wantRefused(t, conn, identity.ErrExpired, "connect again", "Bearer "+w.key.token(t, map[string]any{"exp": time.Now().Add(4 * time.Hour).Unix()}))
}

func TestProofs(t *testing.T) {
	x509, jwt, static := identity.ProofX509SVID, identity.ProofJWTSVID, identity.ProofStaticPeer
	for _, accepted := range [][]identity.Proof{nil, {x509}, {jwt}, {static}, {x509, jwt}, {x509, static}, {jwt, static}, {x509, jwt, static}} {
		t.Run(fmt.Sprint(accepted), func(t *testing.T) {
			w := newJWTWorld(t, func(c *identity.Config) { c.Proofs = accepted })
			takes := map[identity.Proof]bool{}
			for _, p := range accepted {
				takes[p] = true
			}
			if accepted == nil {
				maps.Copy(takes, map[identity.Proof]bool{x509: true, jwt: true, static: true})
			}
			token := w.key.token(t, nil)
			plain := w.agent.dial(t, nil)
			if takes[static] {
				wantCaller(t, plain, billing, static)
			} else {
				w.agent.wantUnauthenticated(t, plain, identity.ErrUnidentified, "static-peer is not accepted on this listener")
			}
			if takes[jwt] {
				w.wantBearer(t, plain, token, orders, jwt)
			} else {
				w.wantRefused(t, plain, identity.ErrUnidentified, "jwt-svid is not accepted on this listener", "Bearer "+token)
			}
			secure := w.agent.dial(t, tlsClient(w.own.leaf(t, orders.String(), nil)))
			if !takes[x509] {
				w.agent.wantHandshakeRefusal(t, secure, identity.ErrUnidentified, "x509-svid is not accepted on this listener")
				return
			}
			wantCaller(t, secure, orders, x509)
			if !takes[jwt] {
				w.wantRefused(t, secure, identity.ErrUnidentified, "jwt-svid is not accepted on this listener", "Bearer "+token)
			}
		})
	}
	for _, p := range []identity.Proof{"", "x509", identity.ProofAttestedPeer} {
		if _, err := identity.NewCredentials(identity.Config{Proofs: []identity.Proof{p}}); err == nil {
			t.Errorf("proof %q was taken", p)
		}
	}
}
