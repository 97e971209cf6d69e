package identity

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// StaticPeer gives ID to plaintext callers by what the kernel says of them. Nil
// matches any; where both are given, both must match. A rule with neither is
// refused.
//
// Inside a user namespace the kernel shows every uid and gid that is not mapped
// into it as one overflow ID, 65534 as a rule: do not give that one an identity.
type StaticPeer struct {
	UID *uint32
	// GID is compared with the caller's primary group only.
	GID *uint32
	// ID has a path and belongs to the agent's own trust domain.
	ID spiffeid.ID
}

func (s StaticPeer) matches(p Peer) bool {
	return (s.UID == nil || *s.UID == p.UID) && (s.GID == nil || *s.GID == p.GID)
}

// staticVerifier takes plaintext callers for what a table says of them.
type staticVerifier struct {
	own   spiffeid.TrustDomain
	table atomic.Pointer[staticTable]
}

// staticTable is immutable; its address is the basis of verdicts.
type staticTable struct{ rules []StaticPeer }

func (v *staticVerifier) set(rules []StaticPeer) error {
	var faults []error
	for i, r := range rules {
		if err := v.check(r); err != nil {
			faults = append(faults, fmt.Errorf("static peer %d: %w", i+1, err))
		}
	}
	if err := errors.Join(faults...); err != nil {
		return err
	}
	v.table.Store(&staticTable{rules: append([]StaticPeer(nil), rules...)})
	return nil
}

func (v *staticVerifier) check(r StaticPeer) error {
	switch {
	case r.UID == nil && r.GID == nil:
		return errors.New("matches every process of the host; give it a uid, a gid or both")
	case r.ID.IsZero():
		return errors.New("has no SPIFFE ID")
	case r.ID.Path() == "":
		return fmt.Errorf("%s names a trust domain, not a workload; add a path", r.ID)
	case !v.own.IsZero() && !r.ID.MemberOf(v.own):
		return fmt.Errorf("%s is not of the agent's own trust domain, %s", r.ID, v.own.Name())
	}
	return nil
}

// Verify implements Verifier.
func (v *staticVerifier) Verify(_ context.Context, c *Conn) (Caller, error) {
	table := v.table.Load()
	if d := c.verdict.Load(); d != nil && d.basis == any(table) {
		return d.caller, d.err
	}
	d := &verdict{basis: table}
	d.caller, d.err = table.find(c.Peer)
	c.verdict.Store(d)
	return d.caller, d.err
}

func (t *staticTable) find(p Peer) (Caller, error) {
	for _, r := range t.rules {
		if r.matches(p) {
			return Caller{ID: r.ID, Proof: ProofStaticPeer, Peer: p}, nil
		}
	}
	return Caller{}, fmt.Errorf("%w: no static peer is configured for uid %d, gid %d; connect with an X.509-SVID over TLS or have one configured",
		ErrUnidentified, p.UID, p.GID)
}
