package policy_test

import (
	"fmt"
	"maps"
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
		Name: name, Effect: rapid.SampledFrom([]string{"", policy.Allow, policy.Deny}).Draw(t, "effect"),
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
	if r.Effect != policy.Deny && rapid.Bool().Draw(t, "bounded") {
		r.MaxStale = stale(time.Duration(rapid.IntRange(0, 5).Draw(t, "stale")) * time.Minute)
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

// conditionsOf are conditions with what they are worth: true, false, or nothing.
func conditionsOf() map[string]func(policy.Request) (value, known bool) {
	return map[string]func(policy.Request) (bool, bool){
		"":                       func(policy.Request) (bool, bool) { return true, true },
		`context.t == "a"`:       func(r policy.Request) (bool, bool) { return r.Context["t"] == "a", r.Context != nil },
		`key.name.contains("b")`: func(r policy.Request) (bool, bool) { return strings.Contains(r.Key, "b"), true },
		`caller.path[1] == "a"`: func(r policy.Request) (bool, bool) {
			segments := strings.Split(r.Caller.ID.Path(), "/")[1:]
			return len(segments) > 1 && segments[1] == "a", len(segments) > 1
		},
	}
}

// drawConditional is drawRules with conditions here and there.
func drawConditional(t *rapid.T) []policy.Rule {
	rules := drawRules(t)
	for i := range rules {
		rules[i].When = rapid.SampledFrom(slices.Sorted(maps.Keys(conditionsOf()))).Draw(t, "when")
	}
	return rules
}

func drawRequest(t *rapid.T) policy.Request {
	c := identity.Caller{
		ID:    spiffeid.RequireFromString(spiffe(t)),
		Proof: rapid.SampledFrom([]identity.Proof{identity.ProofX509SVID, identity.ProofStaticPeer}).Draw(t, "proof"),
	}
	r := policy.Request{Caller: c, Operation: drawOperation(t), Key: path(t)}
	if rapid.Bool().Draw(t, "context") {
		r.Context = map[string]string{"t": rapid.SampledFrom([]string{"a", "b"}).Draw(t, "t")}
	}
	return r
}

func mustCompile(t *rapid.T, rules []policy.Rule) *policy.Policy {
	p, err := policy.Compile(policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString(ownDomain), Rules: rules})
	if err != nil {
		t.Fatalf("Compile: %v", err)
	}
	return p
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
		value, known := conditionsOf()[rule.When](r)
		if known && !value || !known && rule.Effect != policy.Deny {
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
	}
	if denial != "" {
		return policy.Decision{Rule: denial}
	}
	return policy.Decision{Allowed: allowance != "", Rule: allowance, MaxStale: bound}
}

func TestDecisionsAreThePlainOnes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rules, r := drawConditional(t), drawRequest(t)
		if diff := cmp.Diff(plainly(rules, r), withoutFailure(mustCompile(t, rules).Decide(r))); diff != "" {
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
		if diff := cmp.Diff(plainly(rules, r), mustCompile(t, rules).Decide(r)); diff != "" {
			t.Fatalf("decision (-plain +got):\n%s", diff)
		}
	})
}

// withoutFailure leaves out what is for the record.
func withoutFailure(d policy.Decision) policy.Decision {
	d.Failed = ""
	return d
}

func TestADenyNeverAllowsMore(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rules, r := drawConditional(t), drawRequest(t)
		before := mustCompile(t, rules).Decide(r)
		deny := drawRule(t, "added")
		deny.When = rapid.SampledFrom(slices.Sorted(maps.Keys(conditionsOf()))).Draw(t, "when")
		deny.Effect, deny.MaxStale = policy.Deny, nil
		after := mustCompile(t, append(rules, deny)).Decide(r)
		if after.Allowed && !before.Allowed {
			t.Fatalf("allowed by %q only after a deny was added", after.Rule)
		}
		if after.Allowed && !cmp.Equal(withoutFailure(before), withoutFailure(after)) {
			t.Fatalf("a deny that does not match changed %+v to %+v", before, after)
		}
	})
}

func TestRemovingAnAllowNeverAllowsMore(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rules, r := drawConditional(t), drawRequest(t)
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
		p, r := mustCompile(t, drawConditional(t)), drawRequest(t)
		want, got := p.Decide(r), policy.Decision{}
		for _, f := range p.Explain(r) {
			if f.Matches && got.Rule == "" {
				got = policy.Decision{Allowed: f.Effect == policy.Allow, Rule: f.Rule}
			}
			if !f.Matches && f.Why == "" {
				t.Fatalf("rule %s does not match and nobody says why", f.Rule)
			}
		}
		if got.Allowed != want.Allowed || got.Rule != want.Rule {
			t.Fatalf("explained as %+v, decided as %+v", got, want)
		}
	})
}

func TestOrderDoesNotMatter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rules, r := drawConditional(t), drawRequest(t)
		shuffled := rapid.Permutation(rules).Draw(t, "shuffled")
		if diff := cmp.Diff(mustCompile(t, rules).Decide(r), mustCompile(t, shuffled).Decide(r)); diff != "" {
			t.Fatalf("decision depends on the order of the rules (-before +after):\n%s", diff)
		}
	})
}

func TestOperationsAreTheAllowedOnes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p, r := mustCompile(t, drawRules(t)), drawRequest(t)
		var want []policy.Operation
		for _, o := range keyedOperations() {
			r.Operation = o
			if p.Decide(r).Allowed {
				want = append(want, o)
			}
		}
		if diff := cmp.Diff(want, p.Operations(r.Caller, r.Key)); diff != "" {
			t.Fatalf("operations (-want +got):\n%s", diff)
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
