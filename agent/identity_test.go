package agent_test

import (
	"io"
	"strings"
	"testing"
	"time"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
)

// bearer connects as one of the issuer's workloads, by JWT-SVIDs.
func (r *rig) bearer(workload, audience string) *client.Client {
	r.t.Helper()
	c, err := client.Dial(r.t.Context(), client.Options{
		Socket: r.path("kms.sock"), WorkloadAPI: "unix://" + r.path("api/"+workload+".sock"), JWTAudience: audience,
	})
	if err != nil {
		r.t.Fatalf("dial as %s: %v", workload, err)
	}
	r.t.Cleanup(func() { _ = c.Close() })
	return c
}

const ownAudience = "spiffe://example.org/agent"

func (r *rig) awaitJWTBundles() {
	r.t.Helper()
	r.await("the agent has JWT bundles", func(s *adminv1.StatusResponse) bool { return s.GetIdentity().GetJwtBundles() == "ready" })
}

func TestCallersByJWTSVID(t *testing.T) {
	r := newRig(t, configText("PEERS", staticPeer()))
	r.start()
	r.awaitJWTBundles()
	c := r.bearer("orders", ownAudience)
	everyOperation(t, c)
	who, err := c.WhoAmI(t.Context())
	if err != nil || who.GetSpiffeId() != "spiffe://example.org/orders" || who.GetProof() != "jwt-svid" {
		t.Errorf("who = %v, %v", who, err)
	}
	if log := r.auditText(); !strings.Contains(log, `"proof":"jwt-svid"`) {
		t.Error("the proof is not on record")
	}
	_, err = r.bearer("stranger", ownAudience).Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"})
	wantReason(t, err, "ACCESS_DENIED")
	// A bad token makes no static peer of the process, which is one without it.
	_, err = r.bearer("orders", "spiffe://example.org/another").WhoAmI(t.Context())
	wantReason(t, err, "CALLER_UNIDENTIFIED")
}

func TestConfiguredAudience(t *testing.T) {
	r := newRig(t, configText("  static_peers:", "  jwt_audience: [kms.example.org]\n  static_peers:"))
	r.start()
	r.awaitJWTBundles()
	if who, err := r.bearer("orders", "kms.example.org").WhoAmI(t.Context()); err != nil {
		t.Errorf("who = %v, %v", who, err)
	}
	_, err := r.bearer("orders", ownAudience).WhoAmI(t.Context())
	wantReason(t, err, "CALLER_UNIDENTIFIED")
}

// What the listener accepts and what a rule demands are asked separately.
func TestProofs(t *testing.T) {
	type want struct{ x509, jwt, peer string } // empty: served
	for name, c := range map[string]struct {
		listener, rule string
		want           want
	}{
		"everything":                 {"", "", want{}},
		"x509-svid on the listener":  {"[x509-svid]", "", want{"", "CALLER_UNIDENTIFIED", "CALLER_UNIDENTIFIED"}},
		"jwt-svid on the listener":   {"[jwt-svid]", "", want{"unreachable", "", "CALLER_UNIDENTIFIED"}},
		"both SVIDs on the listener": {"[x509-svid, jwt-svid]", "", want{"", "", "CALLER_UNIDENTIFIED"}},
		"x509-svid in the rule":      {"", "[x509-svid]", want{"", "ACCESS_DENIED", "ACCESS_DENIED"}},
		"jwt-svid in the rule":       {"", "[jwt-svid]", want{"ACCESS_DENIED", "", "ACCESS_DENIED"}},
		"static-peer in the rule":    {"", "[static-peer]", want{"ACCESS_DENIED", "ACCESS_DENIED", ""}},
	} {
		t.Run(name, func(t *testing.T) {
			text := configText("PEERS", staticPeer())
			if c.listener != "" {
				text = strings.Replace(text, "native: {", "native: { proofs: "+c.listener+",", 1)
			}
			if c.rule != "" {
				text = strings.Replace(text, "    keys: [orders]\n", "    keys: [orders]\n    proof: "+c.rule+"\n", 1)
			}
			r := newRig(t, text)
			r.start()
			if c.want.jwt == "" {
				r.awaitJWTBundles()
			}
			for proof, c := range map[string]struct {
				client *client.Client
				want   string
			}{
				"x509-svid": {r.as("orders"), c.want.x509}, "jwt-svid": {r.bearer("orders", ownAudience), c.want.jwt}, "static-peer": {r.as("peer"), c.want.peer},
			} {
				_, err := c.client.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"})
				switch c.want {
				case "":
					if err != nil {
						t.Errorf("by %s: %v", proof, err)
					}
				case "unreachable": // its handshake fails
					if err == nil {
						t.Errorf("by %s: served", proof)
					}
				default:
					wantReason(t, err, c.want)
				}
			}
		})
	}
}

// A stream does not outlive the token that it began with.
func TestAStreamEndsWithItsToken(t *testing.T) {
	t.Parallel()
	r := newRig(t, configText())
	r.start()
	r.awaitJWTBundles()
	began := time.Now()
	_, err := r.bearer("orders", ownAudience).EncryptStream(t.Context(), &kmsagentv1.EncryptStreamStart{Key: "orders"}, slowly{began}, io.Discard)
	wantReason(t, err, "CALLER_UNIDENTIFIED")
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("it ended after %v", took)
	}
}

// slowly is a plaintext without end, for a while.
type slowly struct{ began time.Time }

func (s slowly) Read(b []byte) (int, error) {
	if time.Since(s.began) > 20*time.Second {
		return 0, io.EOF
	}
	<-time.After(100 * time.Millisecond)
	return len(b), nil
}
