package quota_test

import (
	"context"
	"testing"

	"github.com/kms-agent/kms-agent/agent/quota"
)

func TestAdmittedCostsNoAllocation(t *testing.T) {
	r := newRig(t, quota.Limits{Rate: 1e9, Burst: 1e9, PerDay: 1e15, BytesPerDay: 1 << 60, Concurrency: 10})
	rules := []*quota.Rule{r.rules["r"]}
	var h quota.Held
	allocs := testing.AllocsPerRun(1000, func() {
		if err := h.Take(context.Background(), r.host.now(), rules, "a", 10); err != nil {
			t.Fatal(err)
		}
		h.Release()
	})
	if allocs > 0 {
		t.Errorf("%v allocations per request, want none", allocs)
	}
}

func BenchmarkTake(b *testing.B) {
	for name, limits := range map[string]quota.Limits{
		"rate":  {Rate: 1e9, Burst: 1e9, Concurrency: 1e6},
		"daily": {PerDay: 1e15, BytesPerDay: 1 << 60},
	} {
		b.Run(name, func(b *testing.B) {
			r := newRig(b, limits)
			rules := []*quota.Rule{r.rules["r"]}
			b.ReportAllocs()
			var h quota.Held
			for b.Loop() {
				if err := h.Take(context.Background(), r.host.now(), rules, "spiffe://example.org/ns/shop/sa/orders", 10); err != nil {
					b.Fatal(err)
				}
				h.Release()
			}
		})
	}
}
