// Package policy decides whether a caller may perform an operation on a key.
//
// It is a pure function of its configuration and of one request: it keeps no
// state, reads no clock and does no I/O. docs/policy.md explains the model.
package policy

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/identity"
)

// Effects of a rule. The empty effect is Allow.
const (
	Allow = "allow"
	Deny  = "deny"
)

// Rule gives operations on keys to callers, or takes them away.
type Rule struct {
	// Name appears in the audit record. Mandatory, unique, at most 128 bytes.
	Name string `yaml:"name"`
	// Effect is Allow, Deny or empty (Allow). One deny that matches outweighs
	// every allow.
	Effect string `yaml:"effect"`
	// Callers are exact SPIFFE IDs, SPIFFE IDs that end in "/*" (one or more
	// further path segments), or "*": everybody of the own trust domain in an
	// allow, everybody at all in a deny.
	Callers []string `yaml:"callers"`
	// Keys are exact names, names that end in "/*" (one or more further
	// segments), or "*" for every key. A rule whose operations all act on no
	// key may leave them out.
	Keys []string `yaml:"keys"`
	// Operations are operations or roles; "*", every operation there is and
	// will be, only in a deny.
	Operations []string `yaml:"operations"`
	// MaxStale bounds how old the last upstream confirmation of the key may be
	// for what this rule allows. Nil is no bound; zero demands a confirmation
	// made for the request. Only in an allow.
	MaxStale *time.Duration `yaml:"max_stale"`
	// When is a condition in CEL (cel.dev) over the request; the rule matches only
	// where it is true. Where it has no value, as when it reads a context that is
	// not there, an allow does not match and a deny does. Empty is true.
	// docs/policy.md lists what it sees. At most MaxConditionLength bytes.
	When string `yaml:"when"`
	// Proof lists how the caller must have been proven for the rule to match;
	// empty is any proof.
	Proof []identity.Proof `yaml:"proof"`
}

// Config is what a policy is compiled from. It is read during Compile only.
type Config struct {
	// TrustDomain is the own one, which "*" means in an allow. It may be zero
	// when no allow says "*".
	TrustDomain spiffeid.TrustDomain
	// Rules in any order: their order never changes a decision.
	Rules []Rule
	// Roles names sets of operations. A role holds operations, not roles.
	Roles map[string][]Operation
}

// Request asks for one decision.
type Request struct {
	Caller identity.Caller
	// Operation on Key. Key is empty for the operations that act on none
	// (Operation.Keyless) and only for those.
	Operation Operation
	Key       string
	// Labels of the key, Context and Time describe the request to conditions; no
	// rule without one reads them. They are read only.
	Labels  map[string]string
	Context map[string]string
	Time    time.Time
}

// Decision answers a Request. The zero value is the default: denied, by no rule.
type Decision struct {
	Allowed bool
	// Rule is the deciding rule, empty for the default deny. Where several
	// rules of the deciding effect match it is the one whose name sorts first,
	// so that it does not depend on the order of the rules.
	Rule string
	// Failed tells of the first rule, by name, whose condition had no value, and
	// why; empty where there was none. It is for the record, not for the caller.
	Failed string
	// MaxStale is the smallest bound of all allowing rules that match; nil is
	// no bound, and always nil in a denial. An allow without a bound does not
	// lift the bound of another.
	MaxStale *time.Duration
}
