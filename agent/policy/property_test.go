package policy_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/identity"
)

const ownDomain = "example.org"

// path draws short paths over few segments, so that patterns often match.
func path(t *rapid.T) string {
	segments := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "ab"}), 1, 3).Draw(t, "segments")
	return strings.Join(segments, "/")
}

func spiffe(t *rapid.T) string {
	return "spiffe://" + rapid.SampledFrom([]string{ownDomain, "other.org"}).Draw(t, "domain") + "/" + path(t)
}

func patternOf(name func(*rapid.T) string) func(*rapid.T) string {
	return func(t *rapid.T) string {
		switch rapid.IntRange(0, 3).Draw(t, "kind") {
		case 0:
			return "*"
		case 1:
			return name(t) + "/*"
		}
		return name(t)
	}
}

func some[V any](t *rapid.T, of func(*rapid.T) V) []V {
	values := make([]V, rapid.IntRange(1, 3).Draw(t, "n"))
	for i := range values {
		values[i] = of(t)
	}
	return values
}

func keyedOperations() []policy.Operation {
	return slices.DeleteFunc(policy.Operations(), policy.Operation.Keyless)
}

func drawRule(t *rapid.T, name string) policy.Rule {
	r := policy.Rule{
		Name: name, Effect: rapid.SampledFrom([]policy.Effect{"", policy.Allow, policy.Deny}).Draw(t, "effect"),
		Callers: some(t, patternOf(spiffe)), Keys: some(t, patternOf(path)),
	}
	for _, o := range some(t, drawOperation) {
		r.Operations = append(r.Operations, string(o))
	}
	if rapid.Bool().Draw(t, "proven") {
		r.Proof = some(t, func(t *rapid.T) identity.Proof {
			return rapid.SampledFrom([]identity.Proof{identity.ProofX509SVID, identity.ProofStaticPeer}).Draw(t, "proof")
		})
	}
	r.When = policy.Condition(rapid.SampledFrom([]string{"", "", "", "context.t == 'a'", "context.t == 'a' || operation == 'wrap'", "context.t != 'b'"}).Draw(t, "when"))
	if r.Effect != policy.Deny && rapid.Bool().Draw(t, "bounded") {
		r.MaxStale = stale(time.Duration(rapid.IntRange(0, 5).Draw(t, "stale")) * time.Minute)
	}
	if r.Effect != policy.Deny && rapid.Bool().Draw(t, "limited") {
		r.Limits = &policy.Limits{PerDay: number(1)}
	}
	return r
}

func drawOperation(t *rapid.T) policy.Operation {
	return rapid.SampledFrom(keyedOperations()[:3]).Draw(t, "operation")
}

func drawRules(t *rapid.T) []policy.Rule {
	rules := make([]policy.Rule, rapid.IntRange(0, 12).Draw(t, "rules"))
	for i := range rules {
		rules[i] = drawRule(t, fmt.Sprintf("rule-%02d", i))
	}
	return rules
}

func drawRequest(t *rapid.T) policy.Request {
	c := identity.Caller{
		ID:    spiffeid.RequireFromString(spiffe(t)),
		Proof: rapid.SampledFrom([]identity.Proof{identity.ProofX509SVID, identity.ProofStaticPeer}).Draw(t, "proof"),
	}
	contexts := []map[string]string{nil, {"t": "a"}, {"t": "b"}, {"u": "a"}}
	return policy.Request{Caller: c, Operation: drawOperation(t), Key: path(t), Context: rapid.SampledFrom(contexts).Draw(t, "context")}
}

// holds is what drawRule's conditions mean; without context.t they fail, unless
// the rest decides.
func holds(rule policy.Rule, r policy.Request) (holds, fails bool) {
	value, known := r.Context["t"]
	switch rule.When {
	case "context.t == 'a'":
		return value == "a", !known
	case "context.t != 'b'":
		return value != "b", !known
	case "":
		return true, false
	}
	wraps := r.Operation == policy.Wrap
	return value == "a" || wraps, !known && !wraps
}

func mustCompile(t *rapid.T, rules []policy.Rule) *policy.Policy {
	p, err := policy.Compile(policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString(ownDomain), Rules: rules})
	if err != nil {
		t.Fatalf("Compile: %v", err)
	}
	return p
}

// decide leaves out the failures, which the plain decision does not tell.
func decide(t *rapid.T, rules []policy.Rule, r policy.Request) policy.Decision {
	d := mustCompile(t, rules).Decide(r)
	d.Failures = nil
	return d
}

// matches is the documented meaning of a pattern, written as plainly as possible.
func matches(pattern, everything, name string) bool {
	if pattern == "*" {
		return strings.HasPrefix(name, everything)
	}
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(name, prefix) && name != prefix
	}
	return pattern == name
}

// plainly decides by looking at every rule.
func plainly(rules []policy.Rule, r policy.Request) policy.Decision {
	var denial, allowance string
	var bound *time.Duration
	var limited []string
	for _, rule := range rules {
		everybody := "spiffe://" + ownDomain + "/"
		if rule.Effect == policy.Deny {
			everybody = "spiffe://"
		}
		caller := slices.ContainsFunc(rule.Callers, func(p string) bool { return matches(p, everybody, r.Caller.ID.String()) })
		key := slices.ContainsFunc(rule.Keys, func(p string) bool { return matches(p, "", r.Key) })
		proven := len(rule.Proof) == 0 || slices.Contains(rule.Proof, r.Caller.Proof)
		if !caller || !key || !proven || !slices.Contains(rule.Operations, string(r.Operation)) {
			continue
		}
		if met, fails := holds(rule, r); fails && rule.Effect != policy.Deny || !fails && !met {
			continue
		}
		if rule.Effect == policy.Deny {
			if denial == "" || rule.Name < denial {
				denial = rule.Name
			}
			continue
		}
		if allowance == "" || rule.Name < allowance {
			allowance = rule.Name
		}
		if rule.MaxStale != nil && (bound == nil || *rule.MaxStale < *bound) {
			bound = rule.MaxStale
		}
		if rule.Limits != nil {
			limited = append(limited, rule.Name)
		}
	}
	if denial != "" {
		return policy.Decision{Rule: denial}
	}
	return policy.Decision{Allowed: allowance != "", Rule: allowance, MaxStale: bound, Limited: slices.Sorted(slices.Values(limited))}
}

func TestDecisionsAreThePlainOnes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rules, r := drawRules(t), drawRequest(t)
		if diff := cmp.Diff(plainly(rules, r), decide(t, rules, r)); diff != "" {
			t.Fatalf("decision (-plain +got):\n%s", diff)
		}
	})
}

// Most rules share few patterns here, so that their sets are dense.
func TestManyRulesDecideAsPlainly(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var rules []policy.Rule
		for i := range 200 {
			rules = append(rules, policy.Rule{
				Name: fmt.Sprintf("rule-%03d", i), Callers: []string{"*"}, Keys: []string{"*"}, Operations: []string{"wrap"},
			})
		}
		for i, r := range drawRules(t) {
			rules[i*16] = r
			rules[i*16].Name = fmt.Sprintf("rule-%03d", i*16)
		}
		r := drawRequest(t)
		if diff := cmp.Diff(plainly(rules, r), decide(t, rules, r)); diff != "" {
			t.Fatalf("decision (-plain +got):\n%s", diff)
		}
	})
}

func TestADenyNeverAllowsMore(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rules, r := drawRules(t), drawRequest(t)
		before := mustCompile(t, rules).Decide(r)
		deny := drawRule(t, "added")
		deny.Effect, deny.MaxStale, deny.Limits = policy.Deny, nil, nil
		after := mustCompile(t, append(rules, deny)).Decide(r)
		if after.Allowed && !before.Allowed {
			t.Fatalf("allowed by %q only after a deny was added", after.Rule)
		}
		before.Failures, after.Failures = nil, nil
		if after.Allowed && !cmp.Equal(before, after) {
			t.Fatalf("a deny that does not match changed %+v to %+v", before, after)
		}
	})
}

func TestRemovingAnAllowNeverAllowsMore(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rules, r := drawRules(t), drawRequest(t)
		if len(rules) == 0 {
			return
		}
		i := rapid.IntRange(0, len(rules)-1).Draw(t, "removed")
		if rules[i].Effect == policy.Deny {
			return
		}
		before := mustCompile(t, rules).Decide(r)
		after := mustCompile(t, slices.Delete(slices.Clone(rules), i, i+1)).Decide(r)
		if after.Allowed && !before.Allowed {
			t.Fatalf("allowed by %q only after an allow was removed", after.Rule)
		}
	})
}

// What is explained is what is decided.
func TestExplanationsAreTheDecision(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p, r := mustCompile(t, drawRules(t)), drawRequest(t)
		want, got := p.Decide(r), policy.Decision{}
		for _, f := range p.Explain(r) {
			if f.Matches && got.Rule == "" {
				got = policy.Decision{Allowed: f.Effect == policy.Allow, Rule: f.Rule}
			}
			if f.Matches && got.Allowed && f.MaxStale != nil && (got.MaxStale == nil || *f.MaxStale < *got.MaxStale) {
				got.MaxStale = f.MaxStale
			}
			if f.Matches && got.Allowed && f.Limits != nil {
				got.Limited = append(got.Limited, f.Rule)
			}
			if !f.Matches && f.Why == "" {
				t.Fatalf("rule %s does not match and nobody says why", f.Rule)
			}
		}
		want.Failures = nil
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("explanation (-decided +explained):\n%s", diff)
		}
	})
}

func TestOrderDoesNotMatter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rules, r := drawRules(t), drawRequest(t)
		shuffled := rapid.Permutation(rules).Draw(t, "shuffled")
		if diff := cmp.Diff(mustCompile(t, rules).Decide(r), mustCompile(t, shuffled).Decide(r)); diff != "" {
			t.Fatalf("decision depends on the order of the rules (-before +after):\n%s", diff)
		}
	})
}

func TestOperationsAreTheAllowedOnes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rules, r := drawRules(t), drawRequest(t)
		p := mustCompile(t, rules)
		got := p.Operations(policy.Request{Caller: r.Caller, Key: r.Key})
		conditions := slices.ContainsFunc(rules, func(r policy.Rule) bool { return r.When != "" })
		for _, o := range keyedOperations() {
			r.Operation = o
			allowed := false
			for _, r.Context = range []map[string]string{nil, {"t": "a"}, {"t": "b"}} {
				allowed = allowed || p.Decide(r).Allowed
			}
			if listed := slices.Contains(got, o); allowed && !listed || !conditions && listed && !allowed {
				t.Fatalf("%s: allowed in some context is %v, listed %v", o, allowed, listed)
			}
		}
	})
}

// What parses matches as documented; nothing panics.
func FuzzPatterns(f *testing.F) {
	f.Add("spiffe://example.org/a/*", "shared/*", "spiffe://example.org/a/b", "shared/x")
	f.Add("*", "*", "spiffe://example.org/a", "k")
	f.Add("spiffe://example.org/*", "a/b", "spiffe://example.org/a", "a/b")
	f.Add("spiffe://example.org", "/*", "spiffe://example.org", "/")
	f.Add("spiffe://example.org/**", "a*", "spiffe://other.org/a", "a//b")
	f.Fuzz(func(t *testing.T, callers, keys, id, key string) {
		rule := policy.Rule{Name: "r", Callers: []string{callers}, Keys: []string{keys}, Operations: []string{"encrypt"}}
		p, err := policy.Compile(policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString(ownDomain), Rules: []policy.Rule{rule}})
		if err != nil {
			return
		}
		parsed, err := spiffeid.FromString(id)
		if err != nil || parsed.Path() == "" || key == "" || strings.Contains("/"+key+"/", "//") {
			return
		}
		r := policy.Request{Caller: identity.Caller{ID: parsed, Proof: identity.ProofX509SVID}, Operation: policy.Encrypt, Key: key}
		if want, got := plainly([]policy.Rule{rule}, r), p.Decide(r); want.Allowed != got.Allowed {
			t.Errorf("callers %q, keys %q; caller %q, key %q: got %v, want %v", callers, keys, id, key, got.Allowed, want.Allowed)
		}
	})
}
