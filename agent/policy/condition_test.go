package policy_test

import (
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/identity"
)

const shopOrders = "spiffe://example.org/ns/shop/sa/orders"

// conditional is a rule for everybody with a condition.
func conditional(name, effect, when string) policy.Rule {
	return policy.Rule{Name: name, Effect: effect, Callers: []string{"*"}, Keys: []string{"*"}, Operations: []string{"encrypt"}, When: when}
}

func fullQuestion() policy.Request {
	return policy.Request{
		Caller: identity.Caller{
			ID: spiffeid.RequireFromString(shopOrders), Proof: identity.ProofX509SVID, Peer: identity.Peer{UID: 1000, GID: 100},
		},
		Operation: policy.Encrypt, Key: "orders",
		Labels:  map[string]string{"team": "shop"},
		Context: map[string]string{"tenant": "shop", "x-y": "z"},
		Time:    time.Date(2026, 11, 23, 9, 30, 0, 0, time.UTC),
	}
}

func TestConditionsSeeTheRequest(t *testing.T) {
	for when, want := range map[string]bool{
		`context.tenant == caller.path[1]`:                            true,
		`context.tenant == "other"`:                                   false,
		`context["x-y"] == "z"`:                                       true,
		`has(context.tenant) && !has(context.none)`:                   true,
		`"none" in context`:                                           false,
		`caller.id == "spiffe://example.org/ns/shop/sa/orders"`:       true,
		`caller.trust_domain == "example.org"`:                        true,
		`caller.path == ["ns", "shop", "sa", "orders"]`:               true,
		`caller.proof == "x509-svid"`:                                 true,
		`caller.uid == 1000 && caller.gid == 100`:                     true,
		`key.name.startsWith("ord") && key.labels.team == "shop"`:     true,
		`operation in ["encrypt", "wrap"]`:                            true,
		`time.getHours("Europe/Berlin") >= 9 && time.getHours() < 17`: true,
		`time < timestamp("2026-12-01T00:00:00Z")`:                    true,
		`context.all(k, k.size() < 10)`:                               true,
		`context.tenant.matches("^[a-z]+$")`:                          true,
	} {
		t.Run(when, func(t *testing.T) {
			if got := compile(t, conditional("r", "", when)).Decide(fullQuestion()); got.Allowed != want || got.Failed != "" {
				t.Errorf("allowed = %v (%s), want %v", got.Allowed, got.Failed, want)
			}
		})
	}
}

// A condition without a value: an allow does not match, a deny does, and the
// record can say why.
func TestConditionsWithoutAValue(t *testing.T) {
	allow := conditional("allow", "", `context.missing == "x"`)
	got := compile(t, allow).Decide(fullQuestion())
	if got.Allowed || got.Rule != "" || !strings.Contains(got.Failed, `"allow"`) || !strings.Contains(got.Failed, "missing") {
		t.Errorf("an allow: %+v", got)
	}
	deny := conditional("deny", policy.Deny, `context.missing == "x"`)
	got = compile(t, conditional("every", "", ""), deny).Decide(fullQuestion())
	if got.Allowed || got.Rule != "deny" || !strings.Contains(got.Failed, `"deny"`) {
		t.Errorf("a deny: %+v", got)
	}
	// What costs too much at run time has no value either.
	costly := conditional("costly", policy.Deny, `context.exists(a, context.exists(b, context[a] + context[b] == "no"))`)
	q := fullQuestion()
	q.Context = map[string]string{}
	for i := range 64 {
		q.Context[strings.Repeat("k", i+1)] = strings.Repeat("v", 1000)
	}
	if _, err := policy.Compile(policy.Config{TrustDomain: q.Caller.ID.TrustDomain(), Rules: []policy.Rule{costly}}); err == nil {
		if got := compile(t, conditional("every", "", ""), costly).Decide(q); got.Allowed {
			t.Errorf("a deny that costs too much: %+v", got)
		}
	}
}

func TestConditionsThatAreNotLoaded(t *testing.T) {
	for when, want := range map[string]string{
		`context.tenant =`:                        "at 1:",
		`caller.name == "x"`:                      "known: caller.id",
		`context.tenant`:                          "must be true or false",
		`context.tenant == 1`:                     "no matching overload",
		`1 == 1 &&` + "\n" + ` context.a + 1`:     "at 2:",
		`context.tenant.matches("(")`:             "at 1:",
		`time > timestamp("yesterday")`:           "at 1:",
		strings.Repeat("true && ", 1000) + "true": "longer than 4096",
		`context.exists(a, context.exists(b, context.exists(c, a + b + c == "x")))`: "nest",
		`dyn(1)`: "must be true or false",
	} {
		t.Run(when[:min(len(when), 30)], func(t *testing.T) {
			_, err := policy.Compile(policy.Config{
				TrustDomain: spiffeid.RequireTrustDomainFromString(ownDomain), Rules: []policy.Rule{conditional("r", "", when)},
			})
			faults := policy.Faults(err)
			if len(faults) != 1 || faults[0].Field != "when" || !strings.Contains(faults[0].Message, want) {
				t.Errorf("error = %v, want one fault of when with %q", err, want)
			}
		})
	}
}

// What a caller may do depends on what it will ask: a conditional allow counts
// as possible, a conditional deny does not take away.
func TestPossibleOperations(t *testing.T) {
	p := compile(t, conditional("a", "", `context.tenant == "x"`), conditional("d", policy.Deny, `context.tenant == "y"`))
	if got := p.Operations(fullQuestion().Caller, "orders"); len(got) != 1 || got[0] != policy.Encrypt {
		t.Errorf("operations = %v", got)
	}
}

// Conditions are read while others are evaluated.
func TestConditionsConcurrently(t *testing.T) {
	p := compile(t, conditional("a", "", `context.tenant == caller.path[1]`))
	done := make(chan bool)
	for i := range 8 {
		go func() {
			q := fullQuestion()
			if i%2 == 0 {
				q.Context = map[string]string{"tenant": "other"}
			}
			good := true
			for range 1000 {
				good = good && p.Decide(q).Allowed == (i%2 == 1)
			}
			done <- good
		}()
	}
	for range 8 {
		if !<-done {
			t.Error("a decision of another request")
		}
	}
}

// FuzzCondition: whatever a configuration says, it is loaded or refused, and
// what is loaded decides.
func FuzzCondition(f *testing.F) {
	f.Add(`context.tenant == caller.path[1]`, "tenant", "shop")
	f.Add(`context.all(k, k.matches("a*"))`, "a", "b")
	f.Add(`time.getHours("Mars/Olympus") > 1`, "", "")
	f.Add(`caller.path[99] == ""`, "x", "")
	f.Fuzz(func(t *testing.T, when, name, value string) {
		p, err := policy.Compile(policy.Config{
			TrustDomain: spiffeid.RequireTrustDomainFromString(ownDomain), Rules: []policy.Rule{conditional("r", "", when)},
		})
		if err != nil {
			return
		}
		q := fullQuestion()
		q.Context = map[string]string{name: value}
		if got := p.Decide(q); got.Allowed && got.Failed != "" {
			t.Errorf("allowed though the condition has no value: %+v", got)
		}
	})
}

func BenchmarkCondition(b *testing.B) {
	p := compile(b, conditional("r", "", `context.tenant == caller.path[1]`))
	q := fullQuestion()
	b.ReportAllocs()
	for b.Loop() {
		if !p.Decide(q).Allowed {
			b.Fatal("denied")
		}
	}
}
