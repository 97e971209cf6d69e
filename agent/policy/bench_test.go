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

func TestDecideDoesNotAllocate(t *testing.T) {
	for name, rules := range shapes(1000) {
		p := compile(t, rules...)
		r := question(caller("spiffe://example.org/ns/shop/sa/s500"), policy.Encrypt, "key500")
		if n := testing.AllocsPerRun(100, func() { p.Decide(r) }); n != 0 {
			t.Errorf("%s: %v allocations for a decision, want none", name, n)
		}
	}
}
