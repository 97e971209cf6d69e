package policy_test

import (
	"fmt"
	"testing"

	"github.com/kms-agent/kms-agent/agent/policy"
)

// shapes are policies of many rules, each built to be the worst of its kind.
func shapes(n int) map[string][]policy.Rule {
	shapes := make(map[string][]policy.Rule)
	add := func(shape string, i int, caller, key, operation string) {
		shapes[shape] = append(shapes[shape], policy.Rule{
			Name: fmt.Sprintf("rule-%05d", i), Callers: []string{caller, "spiffe://example.org/x/y/z"}, Keys: []string{key}, Operations: []string{operation},
		})
	}
	for i := range n {
		add("exact", i, fmt.Sprintf("spiffe://example.org/ns/shop/sa/s%d", i), fmt.Sprintf("key%d", i), "encrypt")
		add("every caller", i, "*", fmt.Sprintf("key%d", i), "encrypt")
		add("every key", i, fmt.Sprintf("spiffe://example.org/ns/shop/sa/s%d", i), "*", "encrypt")
		if i%2 == 0 {
			add("crossed", i, "*", fmt.Sprintf("key%d", i), "encrypt")
		} else {
			add("crossed", i, fmt.Sprintf("spiffe://example.org/ns/shop/sa/s%d", i-1), "*", "encrypt")
		}
	}
	return shapes
}

func BenchmarkDecide(b *testing.B) {
	const n = 5000
	for name, rules := range shapes(n) {
		b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
			p := compile(b, rules...)
			r := question(caller("spiffe://example.org/ns/shop/sa/s2500"), policy.Encrypt, "key2500")
			b.ReportAllocs()
			for b.Loop() {
				if !p.Decide(r).Allowed {
					b.Fatal("denied")
				}
			}
		})
	}
}

func BenchmarkDecideWithCondition(b *testing.B) {
	for _, when := range []string{
		"caller.uid == 1001", "context.tenant == caller.path[1]", "operation == 'encrypt' && key.labels.team == 'shop'",
		"time.getHours('Europe/Berlin') < 8 && context.all(k, k in ['tenant', 'secret', 'n'])",
	} {
		b.Run(when, func(b *testing.B) {
			p, r := compile(b, conditioned("r", "", when)), fullRequest()
			b.ReportAllocs()
			for b.Loop() {
				if !p.Decide(r).Allowed {
					b.Fatal("denied")
				}
			}
		})
	}
}

// Few rules have conditions, and those that have none must not pay.
func TestConditionsOfOtherRulesCostNothing(t *testing.T) {
	r := question(caller("spiffe://example.org/a"), policy.Encrypt, "k")
	other := conditioned("other", "", "context.tenant == 'a'")
	other.Keys = []string{"other"}
	p := compile(t, other, policy.Rule{Name: "r", Callers: []string{"*"}, Keys: []string{"k"}, Operations: []string{"encrypt"}})
	if n := testing.AllocsPerRun(100, func() { p.Decide(r) }); n != 0 {
		t.Errorf("%v allocations, want none", n)
	}
}

func TestAConditionAllocatesLittle(t *testing.T) {
	p, r := compile(t, conditioned("r", "", "context.tenant == caller.path[1]")), fullRequest()
	if n := testing.AllocsPerRun(100, func() { p.Decide(r) }); n > 20 {
		t.Errorf("%v allocations for a decision with a condition, want 20 at most", n)
	}
}

func TestDecideDoesNotAllocate(t *testing.T) {
	for name, rules := range shapes(1000) {
		p := compile(t, rules...)
		r := question(caller("spiffe://example.org/ns/shop/sa/s500"), policy.Encrypt, "key500")
		if n := testing.AllocsPerRun(100, func() { p.Decide(r) }); n != 0 {
			t.Errorf("%s: %v allocations for a decision, want none", name, n)
		}
	}
}
