package policy

import (
	"strconv"
	"strings"
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
	keyless ruleSet      // rules for operations without a key
	parsed  []parsedRule // as rules; only Explain looks at them
}

// rule is what a decision needs of a rule once caller and key match.
type rule struct {
	name     string
	ops      uint32
	proofs   uint8
	deny     bool
	maxStale time.Duration // -1: no bound
	when     *condition    // nil: always
}

// Decide decides r. It denies what no rule allows, what one rule denies, and
// whatever is empty or ambiguous: a caller without SPIFFE ID, without path or
// without known proof, an unknown operation, an operation on a key without one
// or the other way round, a key name with an empty segment.
func (p *Policy) Decide(r Request) Decision {
	if p == nil {
		return Decision{}
	}
	return p.decide(&r, false)
}

// Operations returns the operations that c could be allowed on key in some
// context at some time, in the order of the function Operations; with an empty
// key, the allowed operations that act on none.
func (p *Policy) Operations(c identity.Caller, key string) []Operation {
	var allowed []Operation
	if p == nil {
		return nil
	}
	for _, o := range Operations() {
		if p.decide(&Request{Caller: c, Operation: o, Key: key}, true).Allowed {
			allowed = append(allowed, o)
		}
	}
	return allowed
}

// decide decides r. With possible, conditions are taken for what the caller
// could make of them: that of an allow for true, that of a deny for false.
func (p *Policy) decide(r *Request, possible bool) Decision {
	c, o, key := r.Caller, r.Operation, r.Key
	v := verdict{rules: p.rules, request: r, possible: possible, op: p.bits[o], proof: proofBit(c.Proof), decider: len(p.rules), maxStale: -1}
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

	request  *Request
	possible bool
	failed   *failure // of the lowest rule whose condition had no value
}

// failure is apart from verdict so that requests without one stay off the heap.
type failure struct {
	rule int
	err  error
}

// visit weighs a rule whose caller and key match, and reports whether a later
// one can matter.
func (v *verdict) visit(i uint32) bool {
	r := &v.rules[i]
	if r.ops&v.op == 0 || r.proofs&v.proof == 0 {
		return true
	}
	if r.when != nil && !v.holds(int(i)) {
		return true
	}
	v.decider = min(v.decider, int(i))
	if r.maxStale >= 0 && (v.maxStale < 0 || r.maxStale < v.maxStale) {
		v.maxStale = r.maxStale
	}
	return !r.deny
}

// holds tells whether a rule with a condition matches. Where the condition has
// no value a deny does and an allow does not.
func (v *verdict) holds(i int) bool {
	r := &v.rules[i]
	if v.possible {
		return !r.deny
	}
	yes, err := r.when.holds(v.request)
	if err == nil {
		return yes
	}
	if v.failed == nil || i < v.failed.rule {
		v.failed = &failure{i, err}
	}
	return r.deny
}

// failures is for the record: bounded, since it may hold what the caller sent.
func (v *verdict) failures() string {
	if v.failed == nil {
		return ""
	}
	const most = 256
	text := v.failed.err.Error()
	return "the condition of rule " + strconv.Quote(v.rules[v.failed.rule].name) + " has no value: " + strings.ToValidUTF8(text[:min(len(text), most)], "")
}

func (v *verdict) decision() Decision {
	if v.decider == len(v.rules) {
		return Decision{Failed: v.failures()}
	}
	d := Decision{Failed: v.failures(), Rule: v.rules[v.decider].name, Allowed: !v.rules[v.decider].deny}
	if d.Allowed && v.maxStale >= 0 {
		stale := v.maxStale
		d.MaxStale = &stale
	}
	return d
}
