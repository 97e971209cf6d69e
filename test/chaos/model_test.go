package chaos

import (
	"slices"
	"time"
)

const (
	// recovery is how long after the end of a fault everything must serve again.
	recovery = 15 * time.Second
	// settling is how long after the first answer from upstream calls that began in the
	// fault may still fail: as long as they may take.
	settling = 3 * time.Second
	// replacing is that time after a fault in which a module may hang for good: its
	// process is found out, and replaced, while others are answered already.
	replacing = 8 * time.Second
	// reconnect is how long callers need to find an agent that is back.
	reconnect = 3 * time.Second
	// tolerance is for what happens between a clock's being read here and there, on a
	// machine that has other things to do.
	tolerance = 700 * time.Millisecond
	// catalogueAge is how old a plugin's knowledge of a token's versions may be.
	catalogueAge = time.Second
	// swept is how often the agent looks for what it has to refresh.
	swept = time.Second
)

// span is a time.
type span struct{ from, to time.Duration }

func (s span) overlaps(from, to time.Duration) bool { return s.from <= to && s.to >= from }

// model says what may have been true when.
type model struct {
	*history

	keys     map[string]*keySetup
	backends map[string]string // by object
	// troubles are the times in which calls of a backend may fail: from the beginning
	// of a fault until after the first answer after it.
	troubles map[string][]span
	recovers []recovered
}

// recovered is how long it took until upstream answered for a backend.
type recovered struct {
	action *action
	took   time.Duration
}

func newModel(h *history) *model {
	m := &model{history: h, keys: map[string]*keySetup{}, backends: map[string]string{}, troubles: map[string][]span{}}
	for i := range h.Setup.Keys {
		k := &h.Setup.Keys[i]
		m.keys[k.Name] = k
		for _, o := range k.Objects {
			m.backends[o.Name] = o.Backend
		}
	}
	m.findTroubles()
	return m
}

// findTroubles finds when each fault was over for callers.
func (m *model) findTroubles() {
	answers := map[string][]*call{} // from upstream, by the one backend that gave them
	for _, c := range m.Calls {
		if backend := m.answeredBy(c); backend != "" {
			answers[backend] = append(answers[backend], c)
		}
	}
	for backend, calls := range answers {
		slices.SortFunc(calls, func(a, b *call) int { return int(a.Start - b.Start) })
		answers[backend] = calls
	}
	for _, backend := range m.allBackends() {
		for _, a := range m.Actions {
			if a.Effect != agentDown && (a.Effect != down || a.Target != backend) {
				continue
			}
			until := a.Ended + m.bound(a)
			for _, c := range answers[backend] {
				if c.Start >= a.Ended {
					m.recovers = append(m.recovers, recovered{a, c.End - a.Ended})
					until = min(until, c.End+a.settles())
					break
				}
			}
			m.troubles[backend] = append(m.troubles[backend], span{a.Begin, until})
		}
	}
}

// bound is how long after a fault all must be well. A plugin that cannot start waits
// twice as long before each try, and so up to as long again as it could not.
func (m *model) bound(a *action) time.Duration {
	most := recovery
	for _, other := range m.Actions {
		if other.Fault == "keystore away" && (a.Effect == agentDown || a.Target == other.Target) && other.Begin <= a.Begin && a.Begin < other.Ended+time.Minute {
			most = max(most, recovery+other.Ended-other.Begin)
		}
	}
	return most
}

// settles is how long after the first answer a fault may still be felt.
func (a *action) settles() time.Duration {
	switch a.Fault {
	case "hang", "slow", "cut", "refuse", "gone", "silence", "halves", "corrupt": // p11-kit's client hangs now and then
		return replacing
	}
	return settling
}

// answeredBy is the backend that an answer proves to have answered; "" where it proves
// nothing of one alone. A data key that one of two has wrapped may be confirmed by the other.
func (m *model) answeredBy(c *call) string {
	if c.Reason != "" || len(c.Uses) != 1 || c.Uses[0].Source != upstream || len(c.Uses[0].Wraps) != 1 {
		return ""
	}
	if c.Operation != "wrap" && len(m.keys[c.Uses[0].Key].Objects) > 1 {
		return ""
	}
	return m.backendOf(c.Uses[0].Wraps[0])
}

func (m *model) allBackends() []string {
	var names []string
	for _, b := range m.backends {
		if !slices.Contains(names, b) {
			names = append(names, b)
		}
	}
	slices.Sort(names)
	return names
}

// backendOf is the backend of "object@version".
func (m *model) backendOf(wrap string) string { return m.backends[objectOf(wrap)] }

func objectOf(wrap string) string {
	for i := len(wrap) - 1; i >= 0; i-- {
		if wrap[i] == '@' {
			return wrap[:i]
		}
	}
	return wrap
}

// calm tells whether calls of a backend surely succeeded in a time.
func (m *model) calm(backend string, from, to time.Duration) bool {
	return !slices.ContainsFunc(m.troubles[backend], func(s span) bool { return s.overlaps(from, to) })
}

// heard tells whether a backend surely answered for a while, so that all who wanted to
// know have heard what it says.
func (m *model) heard(backend string, from, to time.Duration) bool {
	for at := from; at+recovery/3 <= to; at += 100 * time.Millisecond {
		if m.calm(backend, at, at+recovery/3) {
			return true
		}
	}
	return false
}

// possibly tells whether an effect may have been there in a time, or up to late before.
func (m *model) possibly(e effect, target string, from, to, late time.Duration) bool {
	return slices.ContainsFunc(m.Actions, func(a *action) bool {
		return a.Effect == e && (a.Target == target || a.Target == "") && span{a.Begin, a.Ended + late}.overlaps(from, to)
	})
}

// surely returns the action whose effect was there all the time, for certain.
func (m *model) surely(e effect, target string, from, to time.Duration) *action {
	i := slices.IndexFunc(m.Actions, func(a *action) bool {
		return a.Effect == e && a.Target == target && a.Begun <= from && a.Ending >= to && (e != down || a.Sure)
	})
	if i < 0 {
		return nil
	}
	return m.Actions[i]
}

// backendsOf are those that a use can be served by: those that have wrapped it, or all
// of the key's where that is not known.
func (m *model) backendsOf(u use) []string {
	var names []string
	for _, w := range u.Wraps {
		names = append(names, m.backendOf(w))
	}
	if k := m.keys[u.Key]; len(names) == 0 && k != nil {
		for _, o := range k.Objects {
			names = append(names, o.Backend)
		}
	}
	return names
}

// served tells whether upstream could be reached for a use all the time.
func (m *model) served(u use, from, to time.Duration) bool {
	return slices.ContainsFunc(m.backendsOf(u), func(b string) bool { return m.calm(b, from, to) })
}

// graceOf is the most grace that a use may have had.
func (m *model) graceOf(u use) time.Duration {
	k := m.keys[u.Key]
	if u.Encrypt {
		return k.Encrypt
	}
	return k.Grace
}

// stale is the bound of max_stale on a call: the request's and the rule's; false where
// there is none.
func (m *model) stale(c *call) (time.Duration, bool) {
	bound, ok := m.Setup.RuleStale[c.Caller+" "+c.Key]
	if c.MaxStale != nil && (!ok || *c.MaxStale < bound) {
		bound, ok = *c.MaxStale, true
	}
	return bound, ok
}
