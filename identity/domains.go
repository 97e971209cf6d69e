package identity

import (
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// servedDomains are the trust domains whose workloads may call.
type servedDomains struct {
	// own is zero where it is that of the agent's own X.509-SVID.
	own       spiffeid.TrustDomain
	federated []spiffeid.TrustDomain
}

// check refuses foreign trust domains. go-spiffe takes the bundle of whatever
// trust domain an SVID names, so each federated one would do.
func (d servedDomains) check(id spiffeid.ID, svidDomain spiffeid.TrustDomain) error {
	own := d.own
	if own.IsZero() {
		own = svidDomain
	}
	domain := id.TrustDomain()
	if (!own.IsZero() && domain == own) || slices.Contains(d.federated, domain) {
		return nil
	}
	return fmt.Errorf("%s is of trust domain %q, whose workloads this agent does not serve; it serves %q, and others only where they are configured as federated",
		id, domain.Name(), own.Name())
}
