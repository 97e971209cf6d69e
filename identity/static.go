package identity

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// StaticPeer gives ID to plaintext callers by what the kernel says of them. What
// is nil or empty matches any; all that is given must match. A rule that gives
// nothing is refused.
//
// Inside a user namespace the kernel shows every uid and gid that is not mapped
// into it as one overflow ID, 65534 as a rule: do not give that one an identity.
type StaticPeer struct {
	UID *uint32
	// GID is compared with the caller's primary group only.
	GID *uint32
	// Group matches a member: by primary or supplementary group, as of connect(2).
	Group *uint32
	// Unit is the service or scope of the system's service manager in whose
	// cgroup the process that connected is when it is first asked for, such as
	// "orders.service". Units of users' own managers are not told apart: a process
	// below one belongs to "user@UID.service". It needs Linux 6.5, cgroup v2 and
	// the host's cgroup namespace.
	Unit string
	// ID has a path and belongs to the agent's own trust domain.
	ID spiffeid.ID
}

// matches fails when the kernel does not say what the rule asks.
func (s StaticPeer) matches(p *process) (bool, error) {
	if (s.UID != nil && *s.UID != p.peer.UID) || (s.GID != nil && *s.GID != p.peer.GID) {
		return false, nil
	}
	if s.Group != nil {
		if member, err := p.memberOf(*s.Group); err != nil || !member {
			return false, err
		}
	}
	if s.Unit != "" {
		unit, err := p.systemUnit()
		return err == nil && unit == s.Unit, err
	}
	return true, nil
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
	case r.UID == nil && r.GID == nil && r.Group == nil && r.Unit == "":
		return errors.New("matches every process of the host; give it a uid, a gid, a group or a unit")
	case r.Unit != "" && CheckUnit(r.Unit) != nil:
		return CheckUnit(r.Unit)
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
	d.caller, d.err = table.find(&process{peer: c.Peer, pidfd: c.pidfd, transport: c.transport})
	c.verdict.Store(d)
	return d.caller, d.err
}

// find returns the caller of the first rule that matches. A rule that cannot be
// judged ends the search: a later one could give more than it would have.
func (t *staticTable) find(p *process) (Caller, error) {
	for i, r := range t.rules {
		ok, err := r.matches(p)
		if err != nil {
			return Caller{}, fmt.Errorf("%w: static peer %d (%s) cannot be judged: %w", ErrUnidentified, i+1, r.ID, err)
		}
		if ok {
			return Caller{ID: r.ID, Proof: ProofStaticPeer, Peer: p.peer}, nil
		}
	}
	return Caller{}, fmt.Errorf("%w: no static peer is configured for uid %d, gid %d%s; connect with an X.509-SVID over TLS, send a JWT-SVID or have one configured",
		ErrUnidentified, p.peer.UID, p.peer.GID, p.unitText())
}
