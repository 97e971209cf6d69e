package policy

import (
	"slices"
	"time"
)

// Finding says what one rule has to do with a request.
type Finding struct {
	Rule string
	// Effect is Allow or Deny.
	Effect string
	// Matches: the rule counts.
	Matches bool
	// Why it does not match, in a few words; of a deny that matches because its
	// condition could not be evaluated, that.
	Why string
	// MaxStale is the rule's own bound; nil: none.
	MaxStale *time.Duration
	// Limits are the rule's own; nil: none.
	Limits *Limits
}

// Explain tells of every rule whether it matches r, denials first, then by name,
// and which of its parts did not. What Decide says follows from those that match.
func (p *Policy) Explain(r Request) []Finding {
	if p == nil {
		return nil
	}
	callers := p.callers.find(callerPath(r.Caller.ID), nil)
	keys := p.keysOf(r.Key, nil)
	vars := &requestVars{Request: r}
	findings := make([]Finding, len(p.rules))
	for i := range p.rules {
		rule, f := &p.rules[i], &findings[i]
		*f = Finding{Rule: rule.name, Effect: rule.effect(), Limits: rule.limits}
		if rule.maxStale != nil {
			bound := *rule.maxStale
			f.MaxStale = &bound
		}
		within := func(s *ruleSet) bool { return s.has(uint32(i)) }
		switch {
		case !slices.ContainsFunc(callers, within):
			f.Why = "is for other callers"
		case !slices.ContainsFunc(keys, within):
			f.Why = "is for other keys"
		case rule.ops&p.bits[r.Operation] == 0:
			f.Why = "is for other operations"
		case rule.proofs&proofBit(r.Caller.Proof) == 0:
			f.Why = "is for callers proven in another way"
		default:
			f.Matches, f.Why = rule.met(vars)
		}
	}
	return findings
}

func (r *rule) effect() string {
	if r.deny {
		return Deny
	}
	return Allow
}

// met reports whether the rule matches as far as its condition goes, and why not
// or why all the same.
func (r *rule) met(v *requestVars) (matches bool, why string) {
	if r.when == nil {
		return true, ""
	}
	holds, err := r.when.holds(v)
	switch {
	case err != nil:
		return r.deny, "its condition could not be evaluated: " + err.Error()
	case !holds:
		return false, "its condition is false"
	}
	return true, ""
}
