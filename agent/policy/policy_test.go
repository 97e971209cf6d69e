package policy_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/identity"
)

func caller(id string) identity.Caller {
	return identity.Caller{ID: spiffeid.RequireFromString(id), Proof: identity.ProofX509SVID}
}

func compile(t testing.TB, rules ...policy.Rule) *policy.Policy {
	t.Helper()
	p, err := policy.Compile(policy.Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"),
		Roles: map[string][]policy.Operation{
			"user":   {policy.Encrypt, policy.Decrypt},
			"reader": {policy.Decrypt, policy.Describe},
		},
		Rules: rules,
	})
	if err != nil {
		t.Fatalf("Compile: %v", err)
	}
	return p
}

func stale(d time.Duration) *time.Duration { return &d }

// question asks for o on key, or on none where o acts on none.
func question(c identity.Caller, o policy.Operation, key string) policy.Request {
	if o.Keyless() {
		key = ""
	}
	return policy.Request{Caller: c, Operation: o, Key: key}
}

func TestEveryOperationAllowedDeniedAndUnknownCaller(t *testing.T) {
	alice, mallory := caller("spiffe://example.org/alice"), caller("spiffe://example.org/mallory")
	for _, o := range policy.Operations() {
		allow := policy.Rule{Name: "allow", Callers: []string{alice.ID.String()}, Keys: []string{"*"}, Operations: []string{string(o)}}
		deny := policy.Rule{
			Name: "deny", Effect: policy.Deny, Callers: []string{alice.ID.String()},
			Keys: []string{"*"}, Operations: []string{string(o)},
		}
		p := compile(t, allow)
		if d := p.Decide(question(alice, o, "orders")); !d.Allowed || d.Rule != "allow" {
			t.Errorf("%s, allowed caller: got %+v, want allowed by rule allow", o, d)
		}
		if d := p.Decide(question(mallory, o, "orders")); d.Allowed || d.Rule != "" {
			t.Errorf("%s, unknown caller: got %+v, want the default deny", o, d)
		}
		if d := compile(t, allow, deny).Decide(question(alice, o, "orders")); d.Allowed || d.Rule != "deny" {
			t.Errorf("%s, denied caller: got %+v, want denied by rule deny", o, d)
		}
		for _, other := range policy.Operations() {
			if d := p.Decide(question(alice, other, "orders")); d.Allowed != (other == o) {
				t.Errorf("rule for %s, operation %s: got allowed %v", o, other, d.Allowed)
			}
		}
	}
}

func TestCallerPatterns(t *testing.T) {
	const allow, deny = policy.Allow, policy.Deny
	cases := []struct {
		effect, pattern, caller string
		want                    bool
	}{
		{allow, "spiffe://example.org/ns/shop", "spiffe://example.org/ns/shop", true},
		{allow, "spiffe://example.org/ns/shop", "spiffe://example.org/ns/shop/a", false},
		{allow, "spiffe://example.org/ns/shop", "spiffe://example.org/ns", false},
		{allow, "spiffe://example.org/ns/shop", "spiffe://example.org/ns/Shop", false},
		{allow, "spiffe://example.org/ns/shop", "spiffe://other.org/ns/shop", false},
		{allow, "spiffe://example.org/ns/shop/*", "spiffe://example.org/ns/shop/a", true},
		{allow, "spiffe://example.org/ns/shop/*", "spiffe://example.org/ns/shop/sa/b/c", true},
		{allow, "spiffe://example.org/ns/shop/*", "spiffe://example.org/ns/shop", false},
		{allow, "spiffe://example.org/ns/shop/*", "spiffe://example.org/ns/shopping/a", false},
		{allow, "spiffe://example.org/*", "spiffe://example.org/a", true},
		{allow, "spiffe://example.org/*", "spiffe://example.org.evil/a", false},
		{allow, "spiffe://other.org/*", "spiffe://other.org/a", true},
		{allow, "*", "spiffe://example.org/a/b", true},
		{allow, "*", "spiffe://other.org/a/b", false},
		{deny, "*", "spiffe://example.org/a/b", true},
		{deny, "*", "spiffe://other.org/a/b", true},
		{deny, "spiffe://other.org/*", "spiffe://other.org/a", true},
		{deny, "spiffe://other.org/*", "spiffe://example.org/a", false},
	}
	for _, c := range cases {
		rule := policy.Rule{Name: "r", Effect: policy.Effect(c.effect), Callers: []string{c.pattern}, Keys: []string{"k"}, Operations: []string{"encrypt"}}
		d := compile(t, rule).Decide(question(caller(c.caller), policy.Encrypt, "k"))
		if matched := d.Rule == "r"; matched != c.want {
			t.Errorf("%s %q, caller %q: matched %v, want %v", c.effect, c.pattern, c.caller, matched, c.want)
		}
	}
}

func TestKeyPatterns(t *testing.T) {
	cases := []struct {
		pattern, key string
		want         bool
	}{
		{"orders", "orders", true},
		{"orders", "orders2", false},
		{"orders", "Orders", false},
		{"orders", "orders/a", false},
		{"shared/*", "shared/a", true},
		{"shared/*", "shared/a/b", true},
		{"shared/*", "shared", false},
		{"shared/*", "sharedness/a", false},
		{"shared/*", "shared/", false},
		{"shared/*", "shared//a", false},
		{"*", "orders", true},
		{"*", "shared/a", true},
		{"*", "*", true},
		{"orders", "*", false},
		{"*", "/a", false},
		{"*", "a/", false},
	}
	for _, c := range cases {
		p := compile(t, policy.Rule{Name: "r", Callers: []string{"*"}, Keys: []string{c.pattern}, Operations: []string{"encrypt"}})
		d := p.Decide(policy.Request{Caller: caller("spiffe://example.org/a"), Operation: policy.Encrypt, Key: c.key})
		if d.Allowed != c.want {
			t.Errorf("pattern %q, key %q: got allowed %v, want %v", c.pattern, c.key, d.Allowed, c.want)
		}
	}
}

func TestEmptyOrAmbiguousIsDenied(t *testing.T) {
	p := compile(t,
		policy.Rule{
			Name: "everything", Callers: []string{"*", "spiffe://example.org/*"}, Keys: []string{"*"},
			Operations: []string{"encrypt", "generate-random"},
		})
	good := policy.Request{Caller: caller("spiffe://example.org/a"), Operation: policy.Encrypt, Key: "k"}
	cases := map[string]func(*policy.Request){
		"no caller":             func(r *policy.Request) { r.Caller = identity.Caller{} },
		"no SPIFFE ID":          func(r *policy.Request) { r.Caller.ID = spiffeid.ID{} },
		"a trust domain":        func(r *policy.Request) { r.Caller.ID = spiffeid.RequireFromString("spiffe://example.org") },
		"no proof":              func(r *policy.Request) { r.Caller.Proof = "" },
		"unknown proof":         func(r *policy.Request) { r.Caller.Proof = "word-of-honour" },
		"no operation":          func(r *policy.Request) { r.Operation = "" },
		"unknown operation":     func(r *policy.Request) { r.Operation = "enc" },
		"role as operation":     func(r *policy.Request) { r.Operation = "user" },
		"star as operation":     func(r *policy.Request) { r.Operation = "*" },
		"no key":                func(r *policy.Request) { r.Key = "" },
		"key with keyless call": func(r *policy.Request) { r.Operation = policy.GenerateRandom },
	}
	if d := p.Decide(good); !d.Allowed {
		t.Fatalf("the request that the cases change is denied: %+v", d)
	}
	for name, change := range cases {
		r := good
		change(&r)
		if d := p.Decide(r); d.Allowed {
			t.Errorf("%s: allowed by %q", name, d.Rule)
		}
	}
	var none *policy.Policy
	if none.Decide(good).Allowed || len(none.Operations(policy.Request{Caller: good.Caller, Key: "k"})) != 0 {
		t.Error("a nil policy allows")
	}
}

func TestProof(t *testing.T) {
	p := compile(t,
		policy.Rule{
			Name: "strong", Callers: []string{"*"}, Keys: []string{"k"}, Operations: []string{"user"},
			Proof: []identity.Proof{identity.ProofX509SVID, identity.ProofJWTSVID},
		},
		policy.Rule{Name: "any", Callers: []string{"*"}, Keys: []string{"k"}, Operations: []string{"describe"}},
		policy.Rule{
			Name: "not-static", Effect: policy.Deny, Callers: []string{"*"}, Keys: []string{"k"}, Operations: []string{"describe"},
			Proof: []identity.Proof{identity.ProofStaticPeer},
		})
	want := map[identity.Proof][]policy.Operation{
		identity.ProofX509SVID:     {policy.Encrypt, policy.Decrypt, policy.Describe},
		identity.ProofJWTSVID:      {policy.Encrypt, policy.Decrypt, policy.Describe},
		identity.ProofAttestedPeer: {policy.Describe},
		identity.ProofStaticPeer:   nil,
	}
	for proof, operations := range want {
		c := caller("spiffe://example.org/a")
		c.Proof = proof
		if diff := cmp.Diff(operations, p.Operations(policy.Request{Caller: c, Key: "k"})); diff != "" {
			t.Errorf("operations of a caller proven by %s (-want +got):\n%s", proof, diff)
		}
	}
}

func TestDecidingRuleAndMaxStale(t *testing.T) {
	rules := []policy.Rule{
		{Name: "b-unbound", Callers: []string{"*"}, Keys: []string{"k"}, Operations: []string{"user"}},
		{Name: "c-hour", Callers: []string{"*"}, Keys: []string{"*"}, Operations: []string{"encrypt"}, MaxStale: stale(time.Hour)},
		{Name: "d-minute", Callers: []string{"*"}, Keys: []string{"k"}, Operations: []string{"encrypt"}, MaxStale: stale(time.Minute)},
		{Name: "a-other", Callers: []string{"*"}, Keys: []string{"other"}, Operations: []string{"encrypt"}, MaxStale: stale(0)},
	}
	p, c := compile(t, rules...), caller("spiffe://example.org/a")
	got := p.Decide(policy.Request{Caller: c, Operation: policy.Encrypt, Key: "k"})
	want := policy.Decision{Allowed: true, Rule: "b-unbound", MaxStale: stale(time.Minute)}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("encrypt on k (-want +got):\n%s", diff)
	}
	*got.MaxStale = 0 // the caller's own copy
	if again := p.Decide(policy.Request{Caller: c, Operation: policy.Encrypt, Key: "k"}); *again.MaxStale != time.Minute {
		t.Errorf("a caller changed the policy: max_stale is %v now", *again.MaxStale)
	}
	if d := p.Decide(policy.Request{Caller: c, Operation: policy.Encrypt, Key: "other"}); d.MaxStale == nil || *d.MaxStale != 0 {
		t.Errorf("zero max_stale: got %v, want a bound of 0", d.MaxStale)
	}
	if d := p.Decide(policy.Request{Caller: c, Operation: policy.Decrypt, Key: "k"}); d.MaxStale != nil {
		t.Errorf("no max_stale: got %v, want none", *d.MaxStale)
	}
}

func TestKeylessOperations(t *testing.T) {
	p := compile(t,
		policy.Rule{Name: "random", Callers: []string{"spiffe://example.org/a", "spiffe://example.org/b"}, Operations: []string{"generate-random"}},
		policy.Rule{Name: "archive", Effect: policy.Deny, Callers: []string{"*"}, Keys: []string{"archive"}, Operations: []string{"*"}},
		policy.Rule{Name: "b-out", Effect: policy.Deny, Callers: []string{"spiffe://example.org/b"}, Keys: []string{"*"}, Operations: []string{"*"}},
	)
	if diff := cmp.Diff([]policy.Operation{policy.GenerateRandom}, p.Operations(policy.Request{Caller: caller("spiffe://example.org/a"), Key: ""})); diff != "" {
		t.Errorf("operations without a key (-want +got):\n%s", diff)
	}
	if got := p.Operations(policy.Request{Caller: caller("spiffe://example.org/b"), Key: ""}); len(got) != 0 {
		t.Errorf("caller denied everything: got %v", got)
	}
	if got := p.Operations(policy.Request{Caller: caller("spiffe://example.org/a"), Key: "k"}); len(got) != 0 {
		t.Errorf("a rule without keys gives %v on a key", got)
	}
}
