package chaos

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// peace is a history in which all is well: one caller uses each key ten times a second,
// for two minutes, without a fault.
func peace() *history {
	h := &history{Seed: 1, Setup: (&cluster{}).setup()}
	for at := time.Duration(0); at < 2*time.Minute; at += 100 * time.Millisecond {
		for i, key := range []string{"orders", "ledger", "notes", "pair"} {
			for _, operation := range []string{"encrypt", "decrypt", "wrap"} {
				h.Calls = append(h.Calls, good("alice", operation, key, at+time.Duration(i)*time.Millisecond))
			}
		}
	}
	return h
}

// good is a call of a millisecond that was served well.
func good(caller, operation, key string, at time.Duration) *call {
	c := &call{Caller: caller, Operation: operation, Key: key, Start: at, End: at + time.Millisecond, Patience: patience}
	u := use{Key: key, Encrypt: operation != "decrypt", Wraps: []string{key + "@1"}, Source: cached, Age: time.Second, EDKs: fmt.Sprint(caller, operation, key, at)}
	switch {
	case operation == "wrap":
		u.Source, u.Age = upstream, 0
	case key == "pair":
		u.Wraps = []string{"pair-a@1", "pair-b@1"}
	}
	if operation == "wrap" && key == "pair" {
		u.Wraps = []string{"pair-a@1"}
	}
	if operation == "encrypt" {
		c.Message = u.EDKs
	}
	if operation == "decrypt" {
		u.EDKs = "the same of " + key
	}
	c.Uses = []use{u}
	return c
}

// refused is good, but for its answer.
func refused(c *call, reason string) *call {
	c.Reason, c.Error = reason, "as planted"
	for i := range c.Uses {
		c.Uses[i].Source, c.Uses[i].Age = "", 0
	}
	return c
}

// graced is good, but in grace.
func graced(c *call, age, left time.Duration) *call {
	c.Uses[0].Source, c.Uses[0].Age, c.Uses[0].GraceLeft = grace, age, left
	return c
}

func changed(c *call, change func(*call)) *call {
	change(c)
	return c
}

// lasting is an action that begins and ends in no time.
func lasting(e effect, target string, from, to time.Duration) *action {
	return &action{Lane: "planted", Fault: string(e), Target: target, Effect: e, Begin: from, Begun: from, Ending: to, Ended: to, Sure: e == down}
}

// current is lasting, of the version that is the current one.
func current(target string, from, to time.Duration) *action {
	a := lasting(disabled, target, from, to)
	a.Current = true
	return a
}

// alone is a decryption of what one of two backends has wrapped.
func alone(at time.Duration) *call {
	return changed(good("alice", "decrypt", "pair", at), func(c *call) { c.Uses[0].Wraps = []string{"pair-a@1"} })
}

// unwrapped is an Unwrap that was served.
func unwrapped(at time.Duration) *call {
	return changed(good("alice", "decrypt", "orders", at), func(c *call) {
		c.Operation = "unwrap"
		c.Uses[0].Source, c.Uses[0].Age = upstream, 0
	})
}

// shaky is a fault of "hsm" in which some calls are answered.
func shaky(from, to time.Duration) *action {
	a := lasting(down, "hsm", from, to)
	a.Sure = false
	return a
}

// quiet takes out what would not have been in a time.
func (h *history) quiet(from, to time.Duration, keys ...string) {
	h.Calls = slices.DeleteFunc(h.Calls, func(c *call) bool {
		return slices.Contains(keys, c.Key) && c.End >= from && c.Start <= to
	})
}

const (
	second = time.Second
	ms     = time.Millisecond
)

// planted is something that must be found, or must not be, in an otherwise good history.
type planted struct {
	name, rule string // "" where nothing is wrong
	actions    []*action
	calls      []*call
}

func cases() []planted {
	out := func(key string) *action { // an outage of a minute
		return lasting(down, map[string]string{"orders": "hsm", "ledger": "net"}[key], 30*second, 90*second)
	}
	decrypt := func(at time.Duration) *call { return good("alice", "decrypt", "orders", at) }
	encrypt := func(at time.Duration) *call { return good("alice", "encrypt", "orders", at) }
	off := lasting(disabled, "orders@1", 30*second, 90*second)
	return []planted{
		{"nothing", "", nil, nil},
		{"another plaintext", "content", nil, []*call{changed(decrypt(second), func(c *call) { c.Wrong = "it is another" })}},
		{"another plaintext of a token that lies", "content", []*action{{Lane: "hsm", Fault: lies, Target: "hsm", Effect: down, Begin: second, Begun: second, Ending: 3 * second, Ended: 3 * second}}, []*call{changed(decrypt(2*second), func(c *call) { c.Wrong = "it is another" })}},
		{"another data key of a token that lies", "content", []*action{{Lane: "hsm", Fault: lies, Target: "hsm", Effect: down, Begin: second, Begun: second, Ending: 3 * second, Ended: 3 * second}}, []*call{changed(good("alice", "decrypt-data-key", "orders", 2*second), func(c *call) { c.Wrong = "it is another" })}},
		{"other key material of a token that lies", "", []*action{{Lane: "hsm", Fault: lies, Target: "hsm", Effect: down, Begin: second, Begun: second, Ending: 3 * second, Ended: 3 * second}}, []*call{changed(unwrapped(2*second), func(c *call) { c.Wrong = "it is another" })}},
		{"other key material when the line is whole again", "content", []*action{{Lane: "net", Fault: "corrupt", Target: "hsm", Effect: down, Begin: second, Begun: second, Ending: 3 * second, Ended: 3 * second}}, []*call{changed(unwrapped(8*second), func(c *call) { c.Wrong = "it is another" })}},
		{"a forged message", "hostile", nil, []*call{changed(decrypt(second), func(c *call) { c.Hostile = "forged" })}},
		{"no rule", "policy", nil, []*call{good("bob", "wrap", "orders", second)}},
		{"a rule that is gone", "policy", []*action{lasting(forbidden, "carol", 10*second, 20*second)}, []*call{good("carol", "decrypt", "orders", 15*second)}},
		{"a rule that goes meanwhile", "", []*action{lasting(forbidden, "carol", 10*second, 20*second)}, []*call{changed(good("carol", "decrypt", "orders", 9*second), func(c *call) { c.End = 11 * second })}},
		{"a revoked version serves", "revocation", []*action{off}, []*call{decrypt(36 * second)}},
		{"a revoked version serves for max_age", "", []*action{off}, []*call{decrypt(31 * second)}},
		{"a revoked version serves in an outage", "", []*action{out("orders"), off}, []*call{graced(decrypt(36*second), 6*second, second)}},
		{"a no is forgotten in an outage", "forgotten", []*action{off, lasting(down, "hsm", 35*second, 90*second)}, []*call{refused(decrypt(33*second), "KEY_UNUSABLE"), graced(decrypt(37*second), 7*second, second)}},
		{"a no is forgotten with another backend's yes", "forgotten", []*action{lasting(disabled, "pair-a@1", 30*second, 90*second), lasting(down, "hsm", 35*second, 90*second)},
			[]*call{refused(good("alice", "decrypt", "pair", 33*second), "KEY_UNUSABLE"), good("alice", "decrypt", "pair", 38*second)}},
		{"what one has not wrapped serves though it refuses", "revocation", []*action{current("pair-b@1", 30*second, 90*second)}, []*call{alone(50 * second)}},
		{"what one has not wrapped serves for max_age", "", []*action{current("pair-b@1", 30*second, 90*second)}, []*call{alone(31 * second)}},
		{"a no is forgotten for what it has not wrapped", "forgotten", []*action{current("pair-b@1", 30*second, 90*second), lasting(down, "net", 35*second, 90*second)},
			[]*call{refused(good("alice", "decrypt", "pair", 33*second), "KEY_UNUSABLE"), alone(38 * second)}},
		{"a revoked version serves after grace", "revocation", []*action{shaky(30*second, 80*second), off}, []*call{decrypt(45 * second)}},
		{"served after grace", "grace-end", []*action{out("orders")}, []*call{graced(decrypt(45*second), 8*second, second)}},
		{"cached after grace", "grace-end", []*action{out("orders")}, []*call{decrypt(45 * second)}},
		{"an agent serves that started in the outage", "cold", []*action{out("orders"), lasting(agentDown, "", 31*second, 32*second)}, []*call{graced(decrypt(33*second), 3*second, second)}},
		{"cached for too long", "freshness", nil, []*call{changed(decrypt(second), func(c *call) { c.Uses[0].Age = 3 * second })}},
		{"too much grace", "freshness", []*action{out("orders")}, []*call{graced(decrypt(33*second), 3*second, graceDecrypt)}},
		{"grace of the other direction", "freshness", []*action{out("orders")}, []*call{graced(encrypt(33*second), 3*second, 5*second)}},
		{"no freshness", "freshness", nil, []*call{changed(decrypt(second), func(c *call) { c.Uses[0].Source = "" })}},
		{"older than the request wants", "max-stale", nil, []*call{changed(decrypt(second), func(c *call) { d := 500 * ms; c.MaxStale = &d })}},
		{"older than the rule wants", "max-stale", nil, []*call{changed(good("bob", "decrypt", "orders", second), func(c *call) { c.Uses[0].Age = 1900 * ms })}},
		{"confirmed by nobody", "false-upstream", []*action{out("orders")}, []*call{changed(decrypt(33*second), func(c *call) { c.Uses[0].Source, c.Uses[0].Age = upstream, 0 })}},
		{"grace without an outage", "false-grace", nil, []*call{graced(decrypt(second), 3*second, second)}},
		{"grace in another's outage", "false-grace", []*action{out("ledger")}, []*call{graced(decrypt(33*second), 3*second, second)}},
		{"grace that was taken away", "false-grace", []*action{out("orders"), lasting(graceless, "orders", 20*second, 90*second)}, []*call{graced(decrypt(33*second), 3*second, second)}},
		{"refused for nothing", "available", nil, []*call{refused(encrypt(second), "BACKEND_UNAVAILABLE")}},
		{"refused though another's backend is down", "available", []*action{out("ledger")}, []*call{refused(encrypt(40*second), "BACKEND_UNAVAILABLE")}},
		{"refused in an outage", "", []*action{out("orders")}, []*call{refused(encrypt(40*second), "BACKEND_UNAVAILABLE")}},
		{"refused long after an outage", "available", []*action{lasting(down, "hsm", 10*second, 20*second)}, []*call{refused(encrypt(40*second), "BACKEND_UNAVAILABLE")}},
		{"refused though one of two backends answers", "available", []*action{out("ledger")}, []*call{refused(good("alice", "encrypt", "pair", 40*second), "BACKEND_UNAVAILABLE")}},
		{"an outage taken for a revocation", "available", []*action{out("orders")}, []*call{refused(decrypt(40*second), "KEY_UNUSABLE")}},
		{"another version's revocation", "available", []*action{lasting(disabled, "orders@2", 30*second, 90*second)}, []*call{refused(decrypt(40*second), "KEY_UNUSABLE")}},
		{"a revocation", "", []*action{off}, []*call{refused(decrypt(40*second), "KEY_UNUSABLE")}},
		{"a quota that there is not", "available", nil, []*call{refused(decrypt(second), "QUOTA_EXCEEDED")}},
		{"denied what is allowed", "available", nil, []*call{refused(decrypt(second), "ACCESS_DENIED")}},
		{"an agent that is away", "available", nil, []*call{refused(decrypt(second), unreachable)}},
		{"a deadline that was long enough", "available", nil, []*call{refused(decrypt(second), "DEADLINE_EXCEEDED")}},
		{"a deadline that was not", "", nil, []*call{changed(refused(decrypt(second), "DEADLINE_EXCEEDED"), func(c *call) { c.Hasty = true })}},
		{"an internal error", "available", []*action{out("orders")}, []*call{refused(decrypt(40*second), "INTERNAL")}},
		{"a data key of two callers", "partition", nil, []*call{changed(good("carol", "encrypt", "orders", second), func(c *call) { c.Uses[0].EDKs = fmt.Sprint("alice", "encrypt", "orders", second) })}},
		{"a cached data key is refused in grace", "grace", []*action{out("ledger")}, []*call{good("alice", "decrypt", "ledger", 29*second), refused(good("alice", "decrypt", "ledger", 34*second), "BACKEND_UNAVAILABLE")}},
		{"a cached data key is refused after grace", "", []*action{out("ledger")}, []*call{good("alice", "decrypt", "ledger", 29*second), refused(good("alice", "decrypt", "ledger", 40*second), "BACKEND_UNAVAILABLE")}},
		{"an evicted data key is refused in grace", "", []*action{out("ledger"), lasting(evicted, "ledger", 31*second, 31*second)}, []*call{refused(good("alice", "decrypt", "ledger", 34*second), "BACKEND_UNAVAILABLE")}},
		{"a data key for encryption is refused in grace", "grace", []*action{out("ledger")}, []*call{refused(good("alice", "encrypt", "ledger", 33*second), "BACKEND_UNAVAILABLE")}},
		{"a data key encrypts too much", "max-messages", nil, used(messagesEach + 1)},
		{"a data key encrypts as much as it may", "", nil, used(messagesEach)},
	}
}

// used is one data key for so many messages.
func used(n int) []*call {
	var calls []*call
	for i := range n {
		c := good("alice", "encrypt", "orders", second+time.Duration(i)*ms)
		c.Uses[0].EDKs = "one"
		calls = append(calls, c)
	}
	return calls
}

// A checker that finds nothing proves nothing: what is planted in a good history is
// found, by the rule that it breaks and by no other.
func TestPlanted(t *testing.T) {
	tried := map[string]bool{}
	for _, p := range cases() {
		tried[p.rule] = true
		h := peace()
		h.Actions = p.actions
		for _, a := range p.actions {
			switch a.Effect {
			case down:
				for key, backend := range map[string]string{"orders": "hsm", "ledger": "net"} {
					if backend == a.Target {
						h.quiet(a.Begin, a.Ended, key, "pair")
					}
				}
			case agentDown:
				h.quiet(a.Begin, a.Ended, "orders", "ledger", "notes", "pair")
			case disabled:
				h.quiet(a.Begin, a.Ended, "orders", "pair")
			default: // nobody else notices
			}
		}
		h.Calls = append(h.Calls, p.calls...)
		found, _ := check(h)
		var rules []string
		for _, v := range found {
			rules = append(rules, v.Rule)
		}
		rules = slices.Compact(slices.Sorted(slices.Values(rules)))
		if got := strings.Join(rules, " "); got != p.rule {
			t.Errorf("%s: the checker finds %q, want %q\n%v", p.name, got, p.rule, found)
		}
	}
	for _, name := range append(names(), "max-messages", "partition", "grace", "forgotten") {
		if !tried[name] {
			t.Errorf("rule %s has no planted violation", name)
		}
	}
}

func names() []string {
	var all []string
	for _, r := range rules() {
		all = append(all, r.name)
	}
	return all
}

// A backend that stays away after the end of a fault is found.
func TestPlantedSlowRecovery(t *testing.T) {
	h := peace()
	h.Actions = []*action{lasting(down, "hsm", 30*second, 40*second)}
	h.quiet(30*second, 40*second+recovery+2*second, "orders", "pair")
	found, _ := check(h)
	if len(found) == 0 || found[0].Rule != "recovery" {
		t.Errorf("the checker finds %v, want a slow recovery", found)
	}
}

// That one of two backends confirms a key does not say that the other, which has wrapped its
// data key, is back.
func TestPlantedAnswerOfAnother(t *testing.T) {
	h := peace()
	h.Actions = []*action{lasting(down, "hsm", 30*second, 40*second)}
	h.quiet(30*second, 48*second, "orders", "pair")
	h.Calls = append(h.Calls, changed(alone(40*second+100*ms), func(c *call) { c.Uses[0].Source, c.Uses[0].Age = upstream, 0 }),
		refused(good("alice", "encrypt", "orders", 46*second), "BACKEND_UNAVAILABLE"))
	if found, _ := check(h); len(found) > 0 {
		t.Errorf("the checker finds %v", found)
	}
}

// Answers without a record are found.
func TestPlantedUnrecorded(t *testing.T) {
	h := &history{Calls: []*call{
		good("alice", "encrypt", "orders", second), changed(refused(good("alice", "decrypt", "orders", second), "ACCESS_DENIED"), func(c *call) { c.RequestID = "r" }),
		good("alice", "wrap", "orders", second),
	}}
	whole := trail{map[string]bool{"r": true}, map[string]bool{h.Calls[0].Message: true}, map[string]int{"spiffe://example.org/alice encrypt": 1, "spiffe://example.org/alice wrap": 1}}
	if found := whole.lacks(h); len(found) != 0 {
		t.Errorf("of a whole trail: %v", found)
	}
	if found := (trail{}).lacks(h); len(found) != 3 {
		t.Errorf("of an empty trail: %v, want three", found)
	}
}

// What is written can be read, and says the same again.
func TestHistoryIsReplayed(t *testing.T) {
	h := peace()
	h.Calls = append(h.Calls, refused(good("alice", "encrypt", "orders", second), "BACKEND_UNAVAILABLE"))
	path := t.TempDir() + "/history.json"
	if err := h.save(path); err != nil {
		t.Fatal(err)
	}
	again, err := loadHistory(path)
	if err != nil {
		t.Fatal(err)
	}
	found, _ := check(again)
	if len(found) != 1 || found[0].Rule != "available" {
		t.Fatalf("the checker finds %v", found)
	}
	if text := again.report(found[0]); !strings.Contains(text, "seed 1, rule available") || !strings.Contains(text, ">>> call") {
		t.Errorf("the report:\n%s", text)
	}
}

// The schedule is a function of its seed, and has every fault in ten minutes.
func TestPlan(t *testing.T) {
	for _, length := range []time.Duration{short, 2 * time.Minute, 10 * time.Minute} {
		if a, b := plan(5, length), plan(5, length); !slices.Equal(a, b) || len(a) == 0 {
			t.Errorf("%s: the same seed gives other schedules", length)
		}
		if slices.Equal(plan(5, length), plan(6, length)) {
			t.Errorf("%s: two seeds give one schedule", length)
		}
	}
	have := map[string]bool{}
	for _, s := range plan(5, 10*time.Minute) {
		have[s.Lane+" "+s.Fault] = true
	}
	for _, l := range lanes() {
		for _, f := range l.faults {
			if !have[l.name+" "+f] {
				t.Errorf("ten minutes have no %s %s", l.name, f)
			}
		}
	}
}
