// Package policy decides whether a caller may perform an operation on a key.
//
// It is a pure function of its configuration and of one request: it keeps no
// state, reads no clock and does no I/O. docs/policy.md explains the model.
package policy

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/identity"
)

// Effects of a rule. The empty effect is Allow.
const (
	Allow = "allow"
	Deny  = "deny"
)

// Effect is Allow, Deny or empty.
type Effect string

// UnmarshalText refuses an empty effect: who writes one down means something.
func (e *Effect) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		return fmt.Errorf("the effect is empty; write %q or %q, or remove it for %q", Allow, Deny, Allow)
	}
	*e = Effect(text)
	return nil
}

// Rule gives operations on keys to callers, or takes them away.
type Rule struct {
	// Name appears in the audit record. Mandatory, unique, at most 128 bytes.
	Name string `yaml:"name"`
	// Effect is Allow, Deny or empty (Allow). One deny that matches outweighs
	// every allow.
	Effect Effect `yaml:"effect"`
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
	// Proof lists how the caller must have been proven for the rule to match;
	// nil is any proof. A list that names none is a fault.
	Proof []identity.Proof `yaml:"proof"`
	// When is a condition in CEL that must hold for the rule to match; empty is
	// none. docs/policy.md lists what it can read. One that cannot be evaluated
	// for a request does not match in an allow, and matches in a deny.
	When Condition `yaml:"when"`
	// Limits bound each caller under this rule; nil is none. Only in an allow.
	Limits *Limits `yaml:"limits"`
}

// Condition is the text of a condition.
type Condition string

// UnmarshalText refuses an empty condition, which would be taken for none.
func (c *Condition) UnmarshalText(text []byte) error {
	if strings.TrimSpace(string(text)) == "" {
		return errors.New("the condition is empty; remove it, or write one such as context.tenant == caller.path[1]")
	}
	*c = Condition(text)
	return nil
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
	// Labels of the key, Context and Time describe the request to conditions and
	// matter to nothing else. The maps are read during the call only. A context
	// that is too large for the message format makes conditions fail.
	Labels  map[string]string
	Context map[string]string
	Time    time.Time
	// PeerUnknown says that nothing is known of the caller's process, so that
	// conditions that read caller.uid, caller.gid or caller.pid fail.
	PeerUnknown bool
}

// Decision answers a Request. The zero value is the default: denied, by no rule.
type Decision struct {
	Allowed bool
	// Rule is the deciding rule, empty for the default deny. Where several
	// rules of the deciding effect match it is the one whose name sorts first,
	// so that it does not depend on the order of the rules.
	Rule string
	// MaxStale is the smallest bound of all allowing rules that match; nil is
	// no bound, and always nil in a denial. An allow without a bound does not
	// lift the bound of another.
	MaxStale *time.Duration
	// Limited names the allowing rules that match and have limits, sorted: those
	// of every one apply. It is empty in a denial, and not to be changed.
	Limited []string
	// Failures are the conditions that could not be evaluated, at most
	// MaxFailures of them. Those of denials, which therefore match, come first.
	Failures []Failure
}

// MaxFailures bounds the failures that one decision tells.
const MaxFailures = 4

// Failure is a condition that could not be evaluated.
type Failure struct {
	// Rule that has the condition.
	Rule string
	// Why, in words, without any value of the request.
	Why string
}

func (f Failure) String() string {
	return fmt.Sprintf("the condition of rule %q could not be evaluated: %s", f.Rule, f.Why)
}
