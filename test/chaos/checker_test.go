package chaos

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// violation is what must not have happened.
type violation struct {
	Rule, Says string
	Call       *call // nil where it is of no one call
}

func (v violation) String() string {
	if v.Call == nil {
		return fmt.Sprintf("%s: %s", v.Rule, v.Says)
	}
	return fmt.Sprintf("%s: %s\n  %s", v.Rule, v.Says, v.Call)
}

// rule is one thing that holds for each call. check returns what is wrong, or "".
type rule struct {
	name  string
	check func(*model, *call) string
}

func rules() []rule {
	return []rule{
		{"content", wrongContent},
		{"hostile", hostileServed},
		{"policy", servedThoughForbidden},
		{"revocation", ofUses(servedThoughDisabled)},
		{"grace-end", ofUses(servedTooLong)},
		{"cold", ofUses(servedFromNothing)},
		{"freshness", ofUses(implausible)},
		{"max-stale", ofUses(tooStale)},
		{"false-upstream", ofUses(falselyUpstream)},
		{"false-grace", ofUses(falselyGrace)},
		{"available", refusedThoughAllowed},
	}
}

// check returns all violations of a history.
func check(h *history) ([]violation, *model) {
	m := newModel(h)
	var found []violation
	for _, r := range rules() {
		for _, c := range h.Calls {
			if says := r.check(m, c); says != "" {
				found = append(found, violation{r.name, says, c})
			}
		}
	}
	found = append(found, m.overused()...)
	found = append(found, m.shared()...)
	found = append(found, m.refusedThoughCached()...)
	found = append(found, m.forgotten()...)
	found = append(found, m.slowRecoveries()...)
	return found, m
}

// ofUses makes a rule of answers of one about the keys behind them.
func ofUses(check func(*model, *call, use) string) func(*model, *call) string {
	return func(m *model, c *call) string {
		if c.Reason != "" {
			return ""
		}
		for _, u := range c.Uses {
			if says := check(m, c, u); says != "" {
				return says
			}
		}
		return ""
	}
}

// wrongContent: what was encrypted is what is decrypted. A token that lies is found out
// where a message proves it, or a key check; key material of a caller's own proves nothing.
func wrongContent(m *model, c *call) string {
	if c.Operation == "unwrap" && (m.lied(c, 0) || m.garbled(c, tolerance)) {
		return ""
	}
	return c.Wrong
}

// lied tells whether a backend of a call may have given other bytes than were wrapped,
// in the call or up to late before.
func (m *model) lied(c *call, late time.Duration) bool {
	return slices.ContainsFunc(m.Actions, func(a *action) bool {
		return a.Fault == lies && (span{a.Begin, a.Ended + late}).overlaps(c.Start, c.End) && slices.ContainsFunc(c.Uses, func(u use) bool {
			return slices.Contains(m.backendsOf(u), a.Target)
		})
	})
}

func hostileServed(_ *model, c *call) string {
	if c.Reason == "" && c.Hostile != "" {
		return "a request was served that nobody could have made honestly: " + c.Hostile
	}
	return ""
}

// servedThoughForbidden: policy forbade it from before the call until after it.
func servedThoughForbidden(m *model, c *call) string {
	if c.Reason != "" {
		return ""
	}
	if !m.Setup.Allowed[c.Caller+" "+c.Key+" "+c.Operation] {
		return "a call was served that no rule allows"
	}
	if a := m.surely(forbidden, c.Caller, c.Start, c.End); a != nil {
		return "a call was served though the caller's rule was gone all the time: " + a.String()
	}
	return ""
}

// servedThoughDisabled: a version that is disabled serves no longer than the last
// confirmation allows, and in an outage no longer than grace.
func servedThoughDisabled(m *model, c *call, u use) string {
	k := m.keys[u.Key]
	for _, a := range m.disabledOf(c, u) {
		w := a.Target
		known := a.Begun + catalogueAge
		heard := catalogueAge + k.MaxAge + swept + tolerance // in so long a time, without a fault
		if c.Start > a.Begun+heard && m.calm(m.backendOf(w), c.Start-heard, c.End) {
			return fmt.Sprintf("%s was disabled for longer than max_age (%s), its backend could be reached, and it served", w, k.MaxAge)
		}
		// Of several backends the others confirm the key, while this one is out of reach.
		if len(k.Objects) == 1 && c.Start > known+k.MaxAge+m.graceOf(u)+tolerance {
			return fmt.Sprintf("%s was disabled for longer than max_age (%s) and grace (%s) together, and it served", w, k.MaxAge, m.graceOf(u))
		}
	}
	return ""
}

// disabledOf are the actions which surely have disabled something all the time that has a say
// in a use: what it was wrapped under, and of several backends the current version of one that
// has not wrapped it.
func (m *model) disabledOf(c *call, u use) (actions []*action) {
	for _, a := range m.Actions {
		if a.Effect == disabled && a.Begun <= c.Start && a.Ending >= c.End && m.hasASay(u, a) {
			actions = append(actions, a)
		}
	}
	return actions
}

// hasASay tells whether what an action disables has one in a use that was served.
func (m *model) hasASay(u use, a *action) bool {
	if slices.Contains(u.Wraps, a.Target) {
		return true
	}
	name := objectOf(a.Target)
	ours := slices.ContainsFunc(m.keys[u.Key].Objects, func(o objectSetup) bool { return o.Name == name })
	wrapped := slices.ContainsFunc(u.Wraps, func(w string) bool { return objectOf(w) == name })
	return ours && !wrapped && a.Current && !u.Encrypt
}

// unreachableFor is since when all backends of a use's key were surely out of reach,
// until the end of a call: any of them confirms the key.
func (m *model) unreachableFor(c *call, u use) (since time.Duration, ok bool) {
	for _, b := range m.backendsOf(use{Key: u.Key}) {
		a := m.surely(down, b, c.Start, c.End)
		if a == nil {
			return 0, false
		}
		since = max(since, a.Begun)
	}
	return since, true
}

// servedTooLong: grace ends.
func servedTooLong(m *model, c *call, u use) string {
	since, ok := m.unreachableFor(c, u)
	k := m.keys[u.Key]
	if ok && c.Start > since+k.MaxAge+m.graceOf(u)+tolerance {
		return fmt.Sprintf("upstream was surely out of reach since %s, for longer than max_age (%s) and grace (%s) together, and the key served", at(since), k.MaxAge, m.graceOf(u))
	}
	return ""
}

// servedFromNothing: an agent that starts in an outage has nothing that it could serve.
func servedFromNothing(m *model, c *call, u use) string {
	since, ok := m.unreachableFor(c, u)
	if !ok {
		return ""
	}
	for _, a := range m.Actions {
		if a.Effect == agentDown && a.Begin > since+tolerance && a.Ended <= c.Start {
			return fmt.Sprintf("upstream was surely out of reach since %s, the agent has started since, and the key served: %s", at(since), a)
		}
	}
	return ""
}

// implausible: what an answer says of its freshness contradicts itself, or the limits.
func implausible(m *model, c *call, u use) string {
	k, took := m.keys[u.Key], c.End-c.Start
	switch u.Source {
	case upstream:
		if u.Age != 0 || u.GraceLeft != 0 {
			return "an answer confirmed upstream has an age, or a rest of grace"
		}
	case cached:
		if u.GraceLeft != 0 {
			return "a cached answer has a rest of grace"
		}
		if u.Age > max(k.MaxAge, took)+tolerance {
			return fmt.Sprintf("a cached answer is older than max_age (%s)", k.MaxAge)
		}
	case grace:
		most := k.MaxAge + m.graceOf(u)
		switch {
		case u.GraceLeft <= 0 || u.GraceLeft > m.graceOf(u):
			return fmt.Sprintf("an answer in grace has a rest that is none, or more than all of it (%s)", m.graceOf(u))
		case u.Age+u.GraceLeft > most+time.Millisecond:
			return fmt.Sprintf("age and rest of grace are more than max_age and grace together (%s)", most)
		}
	default:
		return fmt.Sprintf("an answer has no freshness (%q)", u.Source)
	}
	return ""
}

// tooStale: max_stale holds, in an outage too.
func tooStale(m *model, c *call, u use) string {
	bound, ok := m.stale(c)
	if ok && u.Age > bound+(c.End-c.Start)+10*time.Millisecond {
		return fmt.Sprintf("an answer is older than max_stale (%s)", bound)
	}
	return ""
}

// falselyUpstream: nothing is confirmed by an upstream that is out of reach.
func falselyUpstream(m *model, c *call, u use) string {
	since, ok := m.unreachableFor(c, u)
	if ok && u.Source == upstream && c.Start > since+tolerance {
		return fmt.Sprintf("an answer says that upstream confirmed it, which was surely out of reach since %s", at(since))
	}
	return ""
}

// falselyGrace: grace is for outages, and for keys that have it.
func falselyGrace(m *model, c *call, u use) string {
	if u.Source != grace {
		return ""
	}
	if a := m.surely(graceless, u.Key, c.Start, c.End); a != nil {
		return "an answer was served in grace of a key that has none: " + a.String()
	}
	backends := m.backendsOf(use{Key: u.Key}) // a confirmation waits for all of them
	if !slices.ContainsFunc(backends, func(b string) bool { return !m.calm(b, c.Start, c.End) }) {
		return "an answer was served in grace while upstream could be reached"
	}
	return ""
}

// refusedThoughAllowed: what policy allows is served while upstream can be reached.
func refusedThoughAllowed(m *model, c *call) string {
	if c.Reason == "" || m.excused(c) {
		return ""
	}
	return "a call was refused that policy allows, and nothing that was going on explains why"
}

// excused tells whether a refusal is one that may be.
func (m *model) excused(c *call) bool {
	took := func(e effect, target string, late time.Duration) bool {
		return m.possibly(e, target, c.Start, c.End, late)
	}
	if c.Hostile != "" || c.Hasty {
		return true
	}
	switch c.Reason {
	case "ACCESS_DENIED":
		return !m.Setup.Allowed[c.Caller+" "+c.Key+" "+c.Operation] || took(forbidden, c.Caller, 0)
	case "QUOTA_EXCEEDED":
		return took(limited, c.Caller, 0)
	case unreachable, "SHUTTING_DOWN":
		return took(agentDown, "", reconnect)
	case "KEY_UNUSABLE", "KEY_SUSPENDED":
		// A key whose canary does not open is taken for another one.
		return m.excusedByRevocation(c) || m.lied(c, recovery) || m.garbled(c, recovery)
	case "DECRYPT_FAILED":
		return m.lied(c, 0) || m.garbled(c, tolerance)
	case "BACKEND_UNAVAILABLE", "BACKEND_BROKEN", "DEADLINE_EXCEEDED", "CANCELLED":
		return m.excusedByOutage(c)
	}
	return false
}

// garbled tells whether a call may have had its answer from a line that changes what it
// carries, which p11-kit does not notice: it can say anything, a no too, or another key. That
// was up to late before.
func (m *model) garbled(c *call, late time.Duration) bool {
	return slices.ContainsFunc(m.Actions, func(a *action) bool {
		return a.Fault == "corrupt" && (span{a.Begin, a.Ended + late}).overlaps(c.Start, c.End) &&
			slices.ContainsFunc(c.Uses, func(u use) bool { return slices.Contains(m.backendsOf(u), a.Target) })
	})
}

// excusedByOutage: one of the keys may have had no backend that answered.
func (m *model) excusedByOutage(c *call) bool {
	return slices.ContainsFunc(c.Uses, func(u use) bool { return !m.served(u, c.Start, c.End) })
}

// excusedByRevocation: one of the versions was, or may have been, disabled.
func (m *model) excusedByRevocation(c *call) bool {
	return slices.ContainsFunc(m.Actions, func(a *action) bool {
		late := a.Ended + recovery
		if b := m.backendOf(a.Target); late < c.Start && !m.heard(b, a.Ended, c.Start) {
			late = c.Start // nobody could say yes since
		}
		if a.Effect != disabled || !(span{a.Begin, late}).overlaps(c.Start, c.End) {
			return false
		}
		return slices.ContainsFunc(c.Uses, func(u use) bool { return m.hit(u, a) })
	})
}

// hit tells whether a use may be of what an action disables.
func (m *model) hit(u use, a *action) bool {
	if slices.Contains(u.Wraps, a.Target) {
		return true
	}
	objects := m.keys[u.Key].Objects
	if len(u.Wraps) > 0 && len(objects) == 1 {
		return false
	}
	// Nothing says which version was tried: the current one, or the one before it where
	// the agent may not have heard of its rotation. Of several backends all that answer
	// are asked, also those that have not wrapped this, and one no is a no for the key.
	current := a.Current || !m.calm(m.backendOf(a.Target), a.Begin-2*recovery, a.Begin)
	return current && slices.ContainsFunc(objects, func(o objectSetup) bool { return o.Name == objectOf(a.Target) })
}

// overused finds data keys that encrypted more messages than they may.
func (m *model) overused() []violation {
	made := map[string]int{}
	var found []violation
	for _, c := range m.Calls {
		u := c.made()
		if u == nil {
			continue
		}
		most := m.keys[u.Key].MaxMessages
		if made[u.EDKs]++; made[u.EDKs] == most+1 {
			found = append(found, violation{"max-messages", fmt.Sprintf("a data key of %s encrypted more than %d messages", u.Key, most), c})
		}
	}
	return found
}

// made is the key of the message that a call has made; nil where it has made none.
func (c *call) made() *use {
	if c.Reason != "" || c.Message == "" || len(c.Uses) == 0 {
		return nil
	}
	return &c.Uses[len(c.Uses)-1]
}

// shared finds data keys that encrypted for several callers.
func (m *model) shared() []violation {
	owner := map[string]string{}
	var found []violation
	for _, c := range m.Calls {
		u := c.made()
		if u == nil {
			continue
		}
		if other, ok := owner[u.EDKs]; ok && other != c.Caller {
			found = append(found, violation{"partition", fmt.Sprintf("a data key of %s encrypted for %s and for %s", u.Key, other, c.Caller), c})
		}
		owner[u.EDKs] = c.Caller
	}
	return found
}

// slowRecoveries finds faults after which a backend did not answer again in time.
func (m *model) slowRecoveries() []violation {
	var found []violation
	for _, r := range m.recovers {
		if r.took > m.bound(r.action) && !m.troubledAfter(r) {
			found = append(found, violation{"recovery", fmt.Sprintf("upstream answered %s after the end of a fault, %s at most are good: %s", r.took.Round(time.Millisecond), m.bound(r.action), r.action), nil})
		}
	}
	return found
}

// troubledAfter tells whether another fault came before the first answer.
func (m *model) troubledAfter(r recovered) bool {
	return slices.ContainsFunc(m.Actions, func(a *action) bool {
		same := a.Effect == agentDown || a.Effect == down && (r.action.Effect == agentDown || a.Target == r.action.Target)
		return a != r.action && same && span{a.Begin, a.Ended}.overlaps(r.action.Ended, r.action.Ended+r.took)
	})
}

// report is a violation as a stranger can read it.
func (h *history) report(v violation) string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d, rule %s: %s\n", h.Seed, v.Rule, v.Says)
	if v.Call != nil {
		fmt.Fprintf(&b, "  %s\naround it:\n%s", v.Call, h.window(v.Call, 3*time.Second, time.Second))
	}
	return b.String()
}
