package identity

import (
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// snapshot is what a Source knows of X.509 at one moment. It is immutable.
type snapshot struct {
	hearing
	svid *x509svid.SVID // nil: none
	// own is the trust domain of the last SVID; it outlives svid.
	own    spiffeid.TrustDomain
	trust  *trust
	denied bool
}

// hearing is how one stream of the Workload API goes.
type hearing struct {
	// bundlesEnd is zero while the Workload API is heard.
	bundlesEnd time.Time
	connected  bool
	updated    time.Time // of the last update; zero: never
	lastErr    error
}

// ended is h when its stream has ended. The bundles' time runs from the first
// loss.
func (h hearing) ended(err error, now time.Time, maxAge time.Duration) hearing {
	h.connected, h.lastErr = false, err
	if h.bundlesEnd.IsZero() && !h.updated.IsZero() {
		h.bundlesEnd = now.Add(maxAge)
	}
	return h
}

// trust is the bundles of one update. Its address is the basis of verdicts.
type trust struct {
	bundles map[spiffeid.TrustDomain]*x509bundle.Bundle
}

// GetX509BundleForTrustDomain implements x509bundle.Source.
func (t *trust) GetX509BundleForTrustDomain(domain spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	b, ok := t.bundles[domain]
	if !ok {
		return nil, fmt.Errorf("the Workload API gives no bundle for trust domain %q", domain.Name())
	}
	return b, nil
}

// bundlesUsable fails when an outage of the Workload API has lasted longer than
// bundles may.
func (h hearing) bundlesUsable(now time.Time) error {
	if h.bundlesEnd.IsZero() || (now.Before(h.bundlesEnd) && now.Round(0).Before(h.bundlesEnd.Round(0))) {
		// Both clocks must say so: the monotonic one stands still while the host
		// is suspended, the wall clock can be set back.
		return nil
	}
	return fmt.Errorf("%w: the Workload API has not been heard for longer than bundles may be trusted (until %s)",
		ErrUntrusted, h.bundlesEnd.UTC().Format(time.RFC3339))
}

// svidAt returns the SVID if it can be used at now.
func (s *snapshot) svidAt(now time.Time) (*x509svid.SVID, error) {
	switch {
	case s.svid != nil && now.Before(s.svid.Certificates[0].NotAfter):
		return s.svid, nil
	case s.svid != nil:
		return nil, fmt.Errorf("%w: its own, %s, expired at %s and the Workload API has given no other%s",
			ErrNotReady, s.svid.ID, s.svid.Certificates[0].NotAfter.UTC().Format(time.RFC3339), s.because())
	case s.denied:
		return nil, fmt.Errorf("%w: the Workload API gives this process no identity; register the agent as a workload%s", ErrNotReady, s.because())
	default:
		return nil, fmt.Errorf("%w: the Workload API has not answered yet%s", ErrNotReady, s.because())
	}
}

func (h hearing) because() string {
	if h.lastErr == nil {
		return ""
	}
	return " (" + h.lastErr.Error() + ")"
}
