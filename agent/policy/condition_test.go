package policy_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/identity"
)

// conditioned is a rule for everything with a condition.
func conditioned(name, effect, when string) policy.Rule {
	return policy.Rule{
		Name: name, Effect: policy.Effect(effect), Callers: []string{"*"}, Keys: []string{"*"},
		Operations: []string{"encrypt", "decrypt", "describe"}, When: policy.Condition(when),
	}
}

// monday is 23:30 UTC in winter: Tuesday in Berlin, still Monday in New York.
func monday() time.Time { return time.Date(2026, 1, 5, 23, 30, 0, 0, time.UTC) }

func fullRequest() policy.Request {
	return policy.Request{
		Caller: identity.Caller{
			ID: spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/orders"), Proof: identity.ProofX509SVID,
			Peer: identity.Peer{UID: 1001, GID: 1002, PID: 77},
		},
		Operation: policy.Encrypt, Key: "shared/cards",
		Labels:  map[string]string{"team": "shop"},
		Context: map[string]string{"tenant": "shop", "secret": "s3cr3t", "n": "5"}, Time: monday(),
	}
}

// failing is how the table says that a condition cannot be evaluated.
const failing = "failing: "

func TestConditions(t *testing.T) {
	cases := []struct{ when, want string }{
		{`true`, "true"},
		{`caller.id == 'spiffe://example.org/ns/shop/sa/orders'`, "true"},
		{`caller.trust_domain == 'example.org' && caller.proof == 'x509-svid'`, "true"},
		{`caller.path == ['ns', 'shop', 'sa', 'orders'] && caller.path.size() == 4`, "true"},
		{`context.tenant == caller.path[1]`, "true"},
		{`context['tenant'] == caller.path[3]`, "false"},
		{`caller.uid == 1001 && caller.gid == 1002 && caller.pid == 77`, "true"},
		{`caller.uid in [0, 1001]`, "true"},
		{`has(caller.pid) && has(context.tenant) && !has(context.user) && !has(key.labels.owner)`, "true"},
		{`key.name.startsWith('shared/') && key.labels.team == 'shop'`, "true"},
		{`'team' in key.labels`, "true"},
		{`operation == 'decrypt'`, "false"},
		{`operation in ['encrypt', 'decrypt']`, "true"},
		{`context.all(k, k in ['tenant', 'secret', 'n'])`, "true"},
		{`context.exists(k, context[k] == 'nothing')`, "false"},
		{`int(context.n) < 6`, "true"},
		{`time >= timestamp('2026-01-05T00:00:00Z') && time < timestamp('2026-01-06T00:00:00Z')`, "true"},
		{`time.getHours() == 23 && time.getDayOfWeek() == 1`, "true"},
		{`time.getHours('Europe/Berlin') == 0 && time.getDayOfWeek('Europe/Berlin') == 2`, "true"},
		{`time.getHours('America/New_York') == 18 && time.getDate('America/New_York') == 5`, "true"},
		{`time - timestamp('2026-01-05T23:00:00Z') < duration('1h')`, "true"},

		{`context.user == 'x'`, failing + "context.user is missing"},
		{`context.user == 'x' || true`, "true"},
		{`key.labels.owner == 'x'`, failing + "key.labels.owner is missing"},
		{`caller.path[9] == 'x'`, failing + "caller.path[9] is missing"},
		{`int(context.secret) == 5`, failing + "int(context.secret) cannot be computed"},
		{`context[context.secret] == 'x'`, failing + "context[context.secret] is missing"},
		{`timestamp(context.secret) < time`, failing + "timestamp(context.secret) cannot be computed"},
		{`1 / int(context.n == '5' ? '0' : '1') == 1`, failing + `1 / int((context.n == "5") ? "0" : "1") cannot be computed`},
	}
	for _, c := range cases {
		for _, effect := range []string{policy.Allow, policy.Deny} {
			rules := []policy.Rule{conditioned("judged", effect, c.when)}
			if effect == policy.Deny {
				rules = append(rules, conditioned("others", policy.Allow, "true"))
			}
			d := compile(t, rules...).Decide(fullRequest())
			want := policy.Decision{Allowed: effect == policy.Allow, Rule: "judged"}
			why, fails := strings.CutPrefix(c.want, failing)
			if fails {
				want.Failures = []policy.Failure{{Rule: "judged", Why: why}}
			}
			if matches := c.want == "true" || fails && effect == policy.Deny; !matches {
				want.Allowed, want.Rule = effect == policy.Deny, ""
				if effect == policy.Deny {
					want.Rule = "others"
				}
			}
			if diff := cmp.Diff(want, d); diff != "" {
				t.Errorf("%s with %s (-want +got):\n%s", effect, c.when, diff)
			}
			if strings.Contains(fmt.Sprint(d.Failures), "s3cr3t") {
				t.Errorf("%s: a value of the context stands in %v", c.when, d.Failures)
			}
		}
	}
}

func TestWhatIsNotKnownFails(t *testing.T) {
	strange := fullRequest()
	strange.PeerUnknown = true
	elsewhere := fullRequest()
	elsewhere.Caller.Peer.PID = 0
	keyless := policy.Request{Caller: strange.Caller, Operation: policy.GenerateRandom}
	cases := []struct {
		when    string
		request policy.Request
		why     string
	}{
		{"caller.uid == 1001", strange, "caller.uid is not known"},
		{"caller.gid == 1002", strange, "caller.gid is not known"},
		{"caller.pid == 77", elsewhere, "caller.pid is not known"},
		{"key.name == ''", keyless, "key.name is not known"},
		{"'x' in key.labels", keyless, ""},
		{"has(caller.uid)", strange, ""},
	}
	for _, c := range cases {
		rule := conditioned("r", "", c.when)
		rule.Operations = []string{"encrypt", "generate-random"}
		d := compile(t, rule).Decide(c.request)
		var why string
		if len(d.Failures) > 0 {
			why = d.Failures[0].Why
		}
		if d.Allowed || why != c.why {
			t.Errorf("%s: got allowed %v, failure %q, want denied, failure %q", c.when, d.Allowed, why, c.why)
		}
	}
}

func TestConditionFaults(t *testing.T) {
	nested := "context.exists(a, context.exists(b, a != b && context[a] == context[b]))"
	cases := []struct{ when, gives string }{
		{`contxt.tenant == 'x'`, "line 1, column 1 of the condition: undeclared reference to 'contxt' (did you mean 'context'?); there are caller, key, operation, context, time"},
		{"true &&\n  caller.name == 'x'", "line 2, column 9 of the condition: undefined field 'name'; caller has id, trust_domain, path, proof, uid, gid, pid; key has name, labels"},
		{`key.label.team == 'x'`, "undefined field 'label'"},
		{`context.tenant == `, "line 1, column 19 of the condition: Syntax error"},
		{`context.tenant == orders`, "text stands in quotes"},
		{`context.tenant == 5`, "no matching overload"},
		{`context.tenant`, "gives a string; it must say true or false"},
		{`key.name.matches('(a+)+b')`, "no regular expressions"},
		{`context.map(k, k)[0] == 'a'`, "undeclared reference to 'map'"},
		{`context.filter(k, true)[0] == 'a'`, "undeclared reference to 'filter'"},
		{`dyn(1) == 'a'`, "undeclared reference to 'dyn'"},
		{`time.getHours('Mars/Olympus') == 1`, `"Mars/Olympus" is not a time zone of this host`},
		{`time.getHours('Local') == 1`, `"Local" is not a time zone`},
		{`time.getHours(context.zone) == 1`, "must be written out"},
		{`time < timestamp('yesterday')`, "invalid timestamp"},
		{`time - time < duration('1 hour')`, "invalid duration"},
		{nested, "could cost"},
		{strings.Repeat("(", 60) + "true" + strings.Repeat(")", 60), "recursion limit"},
		{"true" + strings.Repeat(" && true", 600), "the condition has"},
		{"true" + strings.Repeat("&&!true", 580), "limit"},
		{"\x00", "of the condition"},
		{" ", "is empty"},
	}
	for _, c := range cases {
		_, err := policy.Compile(policy.Config{
			TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Rules: []policy.Rule{conditioned("r", "", c.when)},
		})
		faults := policy.Faults(err)
		if len(faults) != 1 || faults[0].Field != "when" || !strings.Contains(faults[0].Message, c.gives) {
			t.Errorf("%.60s\n got %v\nwant ...%s...", c.when, err, c.gives)
		}
	}
}

// What could be allowed is told without a context; what cannot be is not.
func TestPossibleOperations(t *testing.T) {
	for when, want := range map[string]bool{
		"context.tenant == 'x'": true, "time.getHours() < 8": true, "caller.uid == 1001": true, "caller.uid == 0": false,
		"caller.uid == 0 && caller.path[9] == 'x'": false, "caller.path[9] == 'x'": false,
	} {
		r := fullRequest()
		r.Context, r.Time = nil, time.Time{}
		if got := len(compile(t, conditioned("r", "", when)).Operations(r)) > 0; got != want {
			t.Errorf("%s: could be allowed is %v, want %v", when, got, want)
		}
		denied := compile(t, conditioned("r", policy.Deny, when), conditioned("all", "", "true")).Operations(r)
		surely := when == "caller.uid == 1001" || strings.Contains(when, "path[9]") && !strings.Contains(when, "uid")
		if got := len(denied) == 0; got != surely {
			t.Errorf("deny with %s: surely denied is %v, want %v", when, got, surely)
		}
	}
}

func TestFailuresAreBoundedAndDenialsFirst(t *testing.T) {
	var rules []policy.Rule
	for i := range 3 * policy.MaxFailures {
		rules = append(rules, conditioned(fmt.Sprintf("allow-%02d", i), "", "context.missing == 'x'"))
	}
	d := compile(t, append(rules, conditioned("deny", policy.Deny, "context.missing == 'x' && caller.uid == 1"), conditioned("denies", policy.Deny, "context.missing == 'x'"))...).Decide(fullRequest())
	if d.Allowed || d.Rule != "denies" || len(d.Failures) == 0 || d.Failures[0].Rule != "denies" {
		t.Errorf("got %+v, want denied by denies, whose failure comes first", d)
	}
	d = compile(t, rules...).Decide(fullRequest())
	if d.Allowed || len(d.Failures) != policy.MaxFailures {
		t.Errorf("got %+v, want denied with %d failures", d, policy.MaxFailures)
	}
	if text := d.Failures[0].String(); !strings.Contains(text, `rule "allow-00"`) || !strings.Contains(text, "context.missing is missing") {
		t.Errorf("a failure reads %q", text)
	}
}

// A context beyond the message format's bounds must not make a decision costly.
func TestEvaluationIsBounded(t *testing.T) {
	r := fullRequest()
	r.Context = make(map[string]string)
	for i := range 100_000 {
		r.Context[fmt.Sprint(i)] = strings.Repeat("x", 100)
	}
	d := compile(t, conditioned("r", "", "context.all(k, context[k] != 'y')")).Decide(r)
	if d.Allowed || len(d.Failures) != 1 || !strings.Contains(d.Failures[0].Why, "costs more than") {
		t.Errorf("got %+v, want denied for the cost", d)
	}
}

func TestAnEmptyConditionIsRefused(t *testing.T) {
	var c policy.Condition
	if err := c.UnmarshalText([]byte(" ")); err == nil || c.UnmarshalText([]byte("true")) != nil || c != "true" {
		t.Errorf("got %q, %v", c, err)
	}
}

// Compile never panics, and what compiles decides the same way twice.
func FuzzConditions(f *testing.F) {
	for _, seed := range []string{
		"context.tenant == caller.path[1]", "has(context.a) ? context.a == 'b' : false", "time.getHours('UTC') < 3",
		"context.all(k, context.exists(j, k == j))", "caller.uid in [1, 2]", "Caller{}", "b'\\xff' == bytes('x')", "1.0e308 * 10.0 > 0.0",
		"duration('1s') < duration('2s')", "key.labels['x'] + 'y' == \"z\"", "[1][0] == 1", "{'a': 1}['a'] == 1", "-9223372036854775808 == -1",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, when string) {
		p, err := policy.Compile(policy.Config{
			TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Rules: []policy.Rule{conditioned("r", "", when)},
		})
		if err != nil {
			if policy.Faults(err) == nil {
				t.Fatalf("%q: an error without faults: %v", when, err)
			}
			return
		}
		if diff := cmp.Diff(p.Decide(fullRequest()), p.Decide(fullRequest())); diff != "" {
			t.Fatalf("%q decides in two ways: %s", when, diff)
		}
	})
}
