package policy_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/agent/policy"
)

func number(n uint64) *uint64 { return &n }

func limited(name, effect string, l policy.Limits) policy.Rule {
	r := conditioned(name, effect, "")
	r.Limits = &l
	return r
}

// Every allowing rule with limits is named, sorted, whatever the order of rules;
// none in a denial.
func TestLimitedRules(t *testing.T) {
	plain := conditioned("aa", "", "")
	b, a := limited("b", "", policy.Limits{PerDay: number(5)}), limited("a", "", policy.Limits{Rate: &policy.Rate{Count: 5, Per: 1e9}})
	other := limited("c", "", policy.Limits{PerDay: number(5)})
	other.When = "context.tenant == 'nobody'"
	deny := conditioned("d", "deny", "")
	for _, c := range []struct {
		rules []policy.Rule
		want  []string
	}{
		{[]policy.Rule{plain}, nil},
		{[]policy.Rule{b}, []string{"b"}},
		{[]policy.Rule{b, plain, other, a}, []string{"a", "b"}},
		{[]policy.Rule{a, b, deny}, nil},
	} {
		p := compile(t, c.rules...)
		for range 2 { // a decision changes nothing
			if diff := cmp.Diff(c.want, p.Decide(fullRequest()).Limited); diff != "" {
				t.Errorf("limited (-want +got):\n%s", diff)
			}
		}
	}
	p := compile(t, a, plain)
	if got := p.Limits(); len(got) != 1 || got["a"].String() != "rate 5/s, burst 5" {
		t.Errorf("limits = %v", got)
	}
	r := fullRequest()
	if n := testing.AllocsPerRun(100, func() { p.Decide(r) }); n > 0 {
		t.Errorf("%v allocations for a decision by one rule with limits, want none", n)
	}
}

func TestRates(t *testing.T) {
	for text, want := range map[string]float64{"500/s": 500, "30/m": 0.5, "7200/h": 2} {
		var r policy.Rate
		if err := r.UnmarshalText([]byte(text)); err != nil || r.PerSecond() != want || r.String() != text {
			t.Errorf("%s = %v (%v/s), %v", text, r, r.PerSecond(), err)
		}
	}
	for _, text := range []string{"", "5", "/s", "-5/s", "1.5/s", "5/d", "5/s/s", "5 /s"} {
		var r policy.Rate
		if err := r.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q = %v, want an error", text, r)
		}
	}
	slow := policy.Limits{Rate: &policy.Rate{Count: 1, Per: 3600e9}}
	if got := slow.BurstOrDefault(); got != 1 {
		t.Errorf("burst of 1/h = %d, want 1", got)
	}
}

// Limits that are none, or no use, are told all at once.
func TestLimitFaults(t *testing.T) {
	zero, huge := policy.Bytes(0), number(1<<63)
	rules := []policy.Rule{
		limited("empty", "", policy.Limits{}),
		limited("zero", "", policy.Limits{
			Rate: &policy.Rate{Per: 1e9}, Burst: number(0), PerDay: number(0), BytesPerDay: &zero, Concurrency: number(0),
		}),
		limited("huge", "", policy.Limits{PerDay: huge, Concurrency: huge}),
		limited("alone", "", policy.Limits{Burst: number(5)}),
		limited("deny", "deny", policy.Limits{PerDay: number(5)}),
	}
	_, err := policy.Compile(policy.Config{Rules: rules, TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")})
	var got []string
	for _, f := range policy.Faults(err) {
		got = append(got, f.Rule+" "+f.Field)
	}
	want := "empty limits, zero limits.rate, zero limits.burst, zero limits.per_day, zero limits.bytes_per_day, " +
		"zero limits.concurrency, huge limits.per_day, huge limits.concurrency, alone limits.burst, deny limits"
	if diff := cmp.Diff(want, strings.Join(got, ", ")); diff != "" {
		t.Errorf("faults (-want +got):\n%s\n%v", diff, err)
	}
}
