package policy

import (
	"slices"
	"strings"
)

// Finding says what one rule has to do with a request.
type Finding struct {
	Rule string
	// Effect is Allow or Deny.
	Effect string
	// Matches: the rule counts.
	Matches bool
	// Why it does not match, in a few words; of a deny that matches because its
	// condition has no value, that.
	Why string
}

// Explain tells of every rule whether it matches r, denials first, then by name,
// and which of its parts did not. What Decide says follows from those that match.
func (p *Policy) Explain(r Request) []Finding {
	if p == nil {
		return nil
	}
	findings := make([]Finding, len(p.parsed))
	for i := range p.parsed {
		findings[i] = p.parsed[i].explain(p.bits[r.Operation], &r)
	}
	return findings
}

func (rule *parsedRule) explain(op uint32, r *Request) Finding {
	f := Finding{Rule: rule.name, Effect: Allow}
	if rule.deny {
		f.Effect = Deny
	}
	named := func(patterns []pattern, path string) bool {
		return slices.ContainsFunc(patterns, func(p pattern) bool { return p.matches(path) })
	}
	switch {
	case !named(rule.callers, callerPath(r.Caller.ID)):
		f.Why = "is for other callers"
	case r.Key == "" && len(rule.keys) > 0 && !slices.ContainsFunc(rule.keys, pattern.everything), r.Key != "" && !named(rule.keys, r.Key):
		f.Why = "is for other keys"
	case rule.ops&op == 0:
		f.Why = "is for other operations"
	case rule.proofs&proofBit(r.Caller.Proof) == 0:
		f.Why = "is for callers proven in another way"
	case rule.when != nil:
		yes, err := rule.when.holds(r)
		if f.Matches = yes; err != nil {
			f.Matches, f.Why = rule.deny, "its condition has no value: "+err.Error()
		} else if !yes {
			f.Why = "its condition is false"
		}
	default:
		f.Matches = true
	}
	return f
}

// matches is what the index finds, for one pattern.
func (p pattern) matches(path string) bool {
	switch {
	case path == "" || strings.HasPrefix(path, separator) || strings.HasSuffix(path, separator) || strings.Contains(path, separator+separator):
		return false
	case p.everything():
		return true
	case p.below:
		return strings.HasPrefix(path, p.path+separator)
	default:
		return path == p.path
	}
}
