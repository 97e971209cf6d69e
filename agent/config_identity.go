package agent

import (
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/kms-agent/kms-agent/identity"
)

// Bounds of audiences. A token has one; several are for the time of a change.
const (
	maxAudiences      = 16
	maxAudienceLength = 2048
)

func (l *loader) validateIdentity() {
	c := l.cfg.Identity
	if c.WorkloadAPI == "" && len(c.StaticPeers) == 0 {
		l.report("identity", "nobody could call this agent; write workload_api (unix:///path of the SPIFFE Workload API), static_peers or both")
	}
	if c.WorkloadAPI != "" {
		if err := workloadapi.ValidateAddress(c.WorkloadAPI); err != nil {
			l.report("identity.workload_api", "%s is no address of a Workload API; write it as unix:///run/spire/agent/sockets/api.sock", quote(c.WorkloadAPI))
		}
	}
	l.positive("identity.bundle_max_age", c.BundleMaxAge)
	l.validateProofs()
	l.validateAudience()
	seen := map[spiffeid.TrustDomain]bool{l.cfg.TrustDomain: true}
	for i, domain := range c.FederatedTrustDomains {
		if seen[domain] && !domain.IsZero() {
			l.report(fmt.Sprintf("identity.federated_trust_domains[%d]", i), "%s is there already; it is the agent's own or written twice", quote(domain.Name()))
		}
		seen[domain] = true
	}
	for i, peer := range c.StaticPeers {
		l.validateStaticPeer(fmt.Sprintf("identity.static_peers[%d]", i), peer)
	}
}

func (l *loader) validateStaticPeer(at string, peer StaticPeerConfig) {
	if peer.UID == nil && peer.GID == nil && peer.Group == nil && peer.Unit == "" {
		l.report(at, "matches every process of the host; write uid, gid, group or unit")
	}
	if peer.Unit != "" {
		if err := identity.CheckUnit(peer.Unit); err != nil {
			l.report(at+".unit", "%v", err)
		}
	}
	switch {
	case peer.ID.IsZero():
		l.report(at+".id", "is missing; write a SPIFFE ID, such as spiffe://example.org/ns/shop/sa/orders")
	case peer.ID.TrustDomain() != l.cfg.TrustDomain && !l.cfg.TrustDomain.IsZero():
		l.report(at+".id", "is of trust domain %s; a static peer belongs to the agent's own, %s",
			quote(peer.ID.TrustDomain().Name()), quote(l.cfg.TrustDomain.Name()))
	case peer.ID.Path() == "":
		l.report(at+".id", "names a trust domain, not a workload; add a path, such as /ns/shop/sa/orders")
	}
}

// validateProofs checks what the native listener accepts.
func (l *loader) validateProofs() {
	const path = "listen.native.proofs"
	proofs := l.cfg.Listen.Native.Proofs
	if proofs != nil && len(proofs) == 0 {
		l.report(path, "accepts nobody; list some proofs, or leave it out to accept every one")
	}
	known := []string{string(identity.ProofX509SVID), string(identity.ProofJWTSVID), string(identity.ProofStaticPeer)}
	for i, proof := range proofs {
		at := fmt.Sprintf("%s[%d]", path, i)
		switch {
		case !slices.Contains(known, string(proof)):
			l.report(at, "the proof %s", unknownWord(string(proof), known))
		case slices.Contains(proofs[:i], proof):
			l.report(at, "%s is there already", quote(string(proof)))
		case proof != identity.ProofStaticPeer && l.cfg.Identity.WorkloadAPI == "":
			l.report(at, "%s needs a Workload API to verify SVIDs with; write identity.workload_api", quote(string(proof)))
		}
	}
}

func (l *loader) validateAudience() {
	const path = "identity.jwt_audience"
	audience := l.cfg.Identity.JWTAudience
	if audience != nil && len(audience) == 0 {
		l.report(path, "names no audience; list some, or leave it out for the SPIFFE ID of the agent's own SVID")
	}
	if len(audience) > maxAudiences {
		l.report(path, "has %d audiences; %d at most", len(audience), maxAudiences)
	}
	for i, a := range audience {
		at := fmt.Sprintf("%s[%d]", path, i)
		switch {
		case a == "" || len(a) > maxAudienceLength:
			l.report(at, "must have 1 to %d bytes, such as spiffe://example.org/kms-agent", maxAudienceLength)
		case slices.Contains(audience[:i], a):
			l.report(at, "%s is there already", quote(a))
		}
	}
}
