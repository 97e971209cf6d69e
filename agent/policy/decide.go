package policy

import (
	"slices"
	"time"
)

// Policy decides. It is immutable and safe for concurrent use; a nil Policy
// denies everything.
type Policy struct {
	bits    map[Operation]uint32
	rules   []rule // denials first, then by name: the lowest that matches decides
	callers index
	keys    index
	keyless ruleSet // rules for operations without a key
}

// rule is what a decision needs of a rule once caller and key match.
type rule struct {
	name     string
	ops      uint32
	proofs   uint8
	deny     bool
	maxStale *time.Duration // nil: no bound
	when     *condition     // nil: none
	limits   *Limits        // nil: none
	// limited is the rule's own name where it has limits, so that a decision by
	// one such rule need not make a list.
	limited []string
}

// Decide decides r. It denies what no rule allows, what one rule denies, and
// whatever is empty or ambiguous: a caller without SPIFFE ID, without path or
// without known proof, an unknown operation, an operation on a key without one
// or the other way round, a key name with an empty segment.
func (p *Policy) Decide(r Request) Decision {
	v := verdict{request: r}
	if !p.collect(&v) {
		return Decision{}
	}
	return v.decision()
}

// Operations returns the operations that r's caller could be allowed on r's key
// in some context at some time, in the order of the function Operations; with an
// empty key, the allowed operations that act on none. The operation, context and
// time of r do not matter.
func (p *Policy) Operations(r Request) []Operation {
	var allowed []Operation
	for _, r.Operation = range Operations() {
		v := verdict{request: r, possible: true}
		if p.collect(&v) && v.decision().Allowed {
			allowed = append(allowed, r.Operation)
		}
	}
	return allowed
}

// collect shows v the rules for its caller and key. It is false for a request
// that is denied whatever the rules say.
func (p *Policy) collect(v *verdict) bool {
	if p == nil {
		return false
	}
	r := &v.request
	v.rules, v.op, v.proof, v.decider = p.rules, p.bits[r.Operation], proofBit(r.Caller.Proof), len(p.rules)
	if v.op == 0 || v.proof == 0 || r.Caller.ID.IsZero() || r.Caller.ID.Path() == "" || r.Operation.Keyless() != (r.Key == "") {
		return false
	}
	var callerSpace, keySpace [8]*ruleSet
	callers := p.callers.find(callerPath(r.Caller.ID), callerSpace[:0])
	keys := p.keysOf(r.Key, keySpace[:0])
	for _, c := range callers {
		for _, k := range keys {
			common(c, k, v)
		}
	}
	return true
}

// keysOf appends the sets of the rules for a key, or for none, to found.
func (p *Policy) keysOf(key string, found []*ruleSet) []*ruleSet {
	if key == "" {
		return append(found, &p.keyless)
	}
	return p.keys.find(key, found)
}

// verdict collects the rules that match one request. It sees each of them once:
// no two patterns of a rule match the same caller or key.
type verdict struct {
	request Request
	// possible asks what could be: a condition on context or time holds in an
	// allow and does not in a deny.
	possible bool

	rules    []rule
	op       uint32
	proof    uint8
	decider  int            // lowest rule that matches; len(rules): none
	maxStale *time.Duration // smallest of the allowing rules; nil: no bound
	limited  []string       // allowing rules with limits
	vars     *requestVars   // nil until a condition is met
	failures []Failure
}

// denied reports whether a deny has matched.
func (v *verdict) denied() bool {
	return v.decider < len(v.rules) && v.rules[v.decider].deny
}

// visit weighs a rule whose caller and key match, and reports whether a later
// one can matter.
func (v *verdict) visit(i uint32) bool {
	r := &v.rules[i]
	if v.denied() && int(i) > v.decider {
		return false
	}
	if r.ops&v.op == 0 || r.proofs&v.proof == 0 || r.when != nil && !v.holds(r) {
		return true
	}
	v.decider = min(v.decider, int(i))
	if r.maxStale != nil && (v.maxStale == nil || *r.maxStale < *v.maxStale) {
		v.maxStale = r.maxStale
	}
	switch {
	case r.limited == nil:
	case v.limited == nil:
		v.limited = r.limited
	default:
		v.limited = append(v.limited, r.name) // makes a list: r.limited has no room
	}
	return !r.deny
}

// holds evaluates the condition of a rule. A failure counts against the caller.
func (v *verdict) holds(r *rule) bool {
	if v.possible && r.when.open {
		return !r.deny
	}
	if v.vars == nil {
		v.vars = &requestVars{Request: v.request}
	}
	holds, err := r.when.holds(v.vars)
	if err == nil {
		return holds
	}
	v.failed(Failure{Rule: r.name, Why: err.Error()}, r.deny)
	return r.deny
}

func (v *verdict) failed(f Failure, deny bool) {
	switch {
	case deny:
		v.failures = slices.Insert(v.failures, 0, f)
	default:
		v.failures = append(v.failures, f)
	}
	v.failures = v.failures[:min(len(v.failures), MaxFailures)]
}

func (v *verdict) decision() Decision {
	d := Decision{Failures: v.failures}
	if v.decider == len(v.rules) {
		return d
	}
	d.Rule, d.Allowed = v.rules[v.decider].name, !v.rules[v.decider].deny
	if d.Allowed && v.maxStale != nil {
		stale := *v.maxStale
		d.MaxStale = &stale
	}
	if d.Allowed {
		d.Limited = v.limited
		if len(d.Limited) > 1 {
			slices.Sort(d.Limited)
		}
	}
	return d
}
