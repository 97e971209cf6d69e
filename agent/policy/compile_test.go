package policy_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/identity"
)

func TestEveryFaultAtOnce(t *testing.T) {
	good := func(change func(*policy.Rule)) policy.Rule {
		r := policy.Rule{Name: "r", Callers: []string{"spiffe://example.org/a"}, Keys: []string{"k"}, Operations: []string{"encrypt"}}
		change(&r)
		return r
	}
	cases := []struct {
		rule         policy.Rule
		field, gives string // the fault's field and a part of its message
	}{
		{good(func(r *policy.Rule) { r.Name = "" }), "name", "is missing"},
		{good(func(r *policy.Rule) { r.Name = "a\nb" }), "name", "cannot be printed"},
		{good(func(r *policy.Rule) { r.Name = " a" }), "name", "space"},
		{good(func(r *policy.Rule) { r.Name = strings.Repeat("a", policy.MaxNameLength+1) }), "name", "longer than 128"},
		{good(func(r *policy.Rule) { r.Name = "first" }), "name", "policy[0] is called"},
		{good(func(r *policy.Rule) { r.Effect = "permit" }), "effect", `write "allow" or "deny"`},
		{good(func(r *policy.Rule) { r.Callers = nil }), "callers", "no caller"},
		{good(func(r *policy.Rule) { r.Callers = []string{"*", "orders"} }), "callers[0]", "own trust domain"},
		{good(func(r *policy.Rule) { r.Callers = []string{"orders"} }), "callers[0]", "not a SPIFFE ID"},
		{good(func(r *policy.Rule) { r.Callers = []string{"spiffe://example.org/a", ""} }), "callers[1]", "not a SPIFFE ID"},
		{good(func(r *policy.Rule) { r.Callers = []string{"spiffe://example.org"} }), "callers[0]", `"spiffe://example.org/*"`},
		{good(func(r *policy.Rule) { r.Callers = []string{"spiffe://example.org/a*"} }), "callers[0]", "at the end"},
		{good(func(r *policy.Rule) { r.Callers = []string{"spiffe://example.org/*/a"} }), "callers[0]", "at the end"},
		{good(func(r *policy.Rule) { r.Callers = []string{"spiffe://EXAMPLE.org/a"} }), "callers[0]", "not a SPIFFE ID"},
		{good(func(r *policy.Rule) { r.Callers = []string{"spiffe://example.org/a/"} }), "callers[0]", "not a SPIFFE ID"},
		{good(func(r *policy.Rule) { r.Callers = []string{"spiffe://*"} }), "callers[0]", "not a SPIFFE ID"},
		{good(func(r *policy.Rule) { r.Keys = nil }), "keys", "no key"},
		{good(func(r *policy.Rule) { r.Keys = []string{""} }), "keys[0]", "empty"},
		{good(func(r *policy.Rule) { r.Keys = []string{"/*"} }), "keys[0]", "empty"},
		{good(func(r *policy.Rule) { r.Keys = []string{"a*"} }), "keys[0]", "at the end"},
		{good(func(r *policy.Rule) { r.Keys = []string{"a//b"} }), "keys[0]", "empty"},
		{good(func(r *policy.Rule) { r.Keys = []string{"a b"} }), "keys[0]", "spaces"},
		{good(func(r *policy.Rule) { r.Keys = []string{"a\xff"} }), "keys[0]", "spaces"},
		{good(func(r *policy.Rule) { r.Operations = nil }), "operations", "no operation"},
		{good(func(r *policy.Rule) { r.Operations = []string{"encrypt", "enc"} }), "operations[1]", "generate-random"},
		{good(func(r *policy.Rule) { r.Operations = []string{"usr"} }), "operations[0]", "roles: mixed, user"},
		{good(func(r *policy.Rule) { r.Operations = []string{"*"} }), "operations[0]", "only in a deny"},
		{good(func(r *policy.Rule) { r.Operations = []string{"generate-random"} }), "operations[0]", "no key"},
		{good(func(r *policy.Rule) { r.Operations = []string{"mixed"} }), "operations[0]", "no key"},
		{good(func(r *policy.Rule) { r.Proof = []identity.Proof{"x509-svid", "password"} }), "proof[1]", "static-peer"},
		{good(func(r *policy.Rule) { r.MaxStale = stale(-time.Second) }), "max_stale", "negative"},
		{good(func(r *policy.Rule) { r.Effect, r.MaxStale = policy.Deny, stale(time.Second) }), "max_stale", "deny"},
	}
	cfg := policy.Config{
		Rules: []policy.Rule{good(func(r *policy.Rule) { r.Name = "first" })},
		Roles: map[string][]policy.Operation{"user": {policy.Encrypt}, "mixed": {policy.Encrypt, policy.GenerateRandom}},
	}
	for i, c := range cases {
		if c.rule.Name == "r" {
			c.rule.Name += string(rune('0' + i))
		}
		cfg.Rules = append(cfg.Rules, c.rule)
	}
	_, err := policy.Compile(cfg)
	found := make(map[int][]*policy.Fault)
	for _, f := range policy.Faults(err) {
		found[f.Index] = append(found[f.Index], f)
	}
	for i, c := range cases {
		at := found[i+1]
		if len(at) == 0 || at[0].Field != c.field || !strings.Contains(at[0].Message, c.gives) {
			t.Errorf("rule %+v\n got faults %v\nwant %s: ...%s...", c.rule, at, c.field, c.gives)
			continue
		}
		if want := cfg.Rules[i+1].Name; at[0].Rule != want {
			t.Errorf("fault %v names rule %q, want %q", at[0], at[0].Rule, want)
		}
	}
	if len(found[0]) != 0 {
		t.Errorf("the rule without a mistake has faults: %v", found[0])
	}
}

func TestRoleFaults(t *testing.T) {
	_, err := policy.Compile(policy.Config{Roles: map[string][]policy.Operation{
		"encrypt": {policy.Encrypt},
		"empty":   nil,
		"nested":  {policy.Encrypt, "user"},
		"user":    {policy.Encrypt},
		"*":       {policy.Encrypt},
		"":        {policy.Encrypt},
	}})
	var got []string
	for _, f := range policy.Faults(err) {
		if f.Index != -1 {
			t.Errorf("fault %v has index %d, want -1", f, f.Index)
		}
		got = append(got, f.Field)
	}
	if diff := cmp.Diff([]string{"", "*", "empty", "encrypt", "nested[1]"}, got); diff != "" {
		t.Errorf("fields of the faults (-want +got):\n%s", diff)
	}
}

func TestFaultNamesItsPlace(t *testing.T) {
	_, err := policy.Compile(policy.Config{Rules: []policy.Rule{
		{Name: "orders", Callers: []string{"spiffe://example.org/a"}, Keys: []string{"k"}, Operations: []string{"encript"}},
		{Callers: []string{"spiffe://example.org/a"}, Keys: []string{"k"}, Operations: []string{"encrypt"}},
	}})
	if err == nil {
		t.Fatal("Compile accepted an unknown operation")
	}
	for _, want := range []string{`policy[0].operations[0] (rule "orders"): unknown operation or role "encript"`, "policy[1].name: the rule's name is missing"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q lacks %q", err, want)
		}
	}
	if policy.Faults(nil) != nil {
		t.Error("no error has faults")
	}
}

func TestAnEmptyPolicyDenies(t *testing.T) {
	if d := compile(t).Decide(question(caller("spiffe://example.org/a"), policy.Encrypt, "k")); d.Allowed {
		t.Errorf("got %+v, want denied", d)
	}
}
