package policy

import (
	"time"

	"github.com/kms-agent/kms-agent/identity"
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
	maxStale time.Duration // -1: no bound
}

// Decide decides r. It denies what no rule allows, what one rule denies, and
// whatever is empty or ambiguous: a caller without SPIFFE ID, without path or
// without known proof, an unknown operation, an operation on a key without one
// or the other way round, a key name with an empty segment.
func (p *Policy) Decide(r Request) Decision {
	if p == nil {
		return Decision{}
	}
	return p.decide(r.Caller, r.Operation, r.Key)
}

// Operations returns the operations that c could be allowed on key in some
// context, in the order of the function Operations; with an empty key, the
// allowed operations that act on none.
func (p *Policy) Operations(c identity.Caller, key string) []Operation {
	var allowed []Operation
	for _, o := range Operations() {
		if p.Decide(Request{Caller: c, Operation: o, Key: key}).Allowed {
			allowed = append(allowed, o)
		}
	}
	return allowed
}

func (p *Policy) decide(c identity.Caller, o Operation, key string) Decision {
	v := verdict{rules: p.rules, op: p.bits[o], proof: proofBit(c.Proof), decider: len(p.rules), maxStale: -1}
	if v.op == 0 || v.proof == 0 || c.ID.IsZero() || c.ID.Path() == "" || o.Keyless() != (key == "") {
		return Decision{}
	}
	var callerSpace, keySpace [8]*ruleSet
	callers := p.callers.find(callerPath(c.ID), callerSpace[:0])
	keys := append(keySpace[:0], &p.keyless)
	if key != "" {
		keys = p.keys.find(key, keySpace[:0])
	}
	for _, c := range callers {
		for _, k := range keys {
			common(c, k, &v)
		}
	}
	return v.decision()
}

// verdict collects the rules that match one request.
type verdict struct {
	rules    []rule
	op       uint32
	proof    uint8
	decider  int           // lowest rule that matches; len(rules): none
	maxStale time.Duration // smallest of the allowing rules; -1: no bound
}

// visit weighs a rule whose caller and key match, and reports whether a later
// one can matter.
func (v *verdict) visit(i uint32) bool {
	r := &v.rules[i]
	if r.ops&v.op == 0 || r.proofs&v.proof == 0 {
		return true
	}
	v.decider = min(v.decider, int(i))
	if r.maxStale >= 0 && (v.maxStale < 0 || r.maxStale < v.maxStale) {
		v.maxStale = r.maxStale
	}
	return !r.deny
}

func (v *verdict) decision() Decision {
	if v.decider == len(v.rules) {
		return Decision{}
	}
	d := Decision{Rule: v.rules[v.decider].name, Allowed: !v.rules[v.decider].deny}
	if d.Allowed && v.maxStale >= 0 {
		stale := v.maxStale
		d.MaxStale = &stale
	}
	return d
}
