package chaos

import (
	"fmt"
	"slices"
	"time"
)

// holder is whose data key it is: for old messages anybody's, for new ones a caller's.
type holder struct {
	key, edks, caller string
	encrypt           bool
}

// held is what the last good answer proves of a data key: that it was in the cache
// then, and that upstream confirmed it no longer ago than confirmed.
type held struct {
	call      *call
	confirmed time.Duration
}

// refusedThoughCached finds calls that were refused in an outage though their data key
// must have been there, within its grace.
func (m *model) refusedThoughCached() []violation {
	var found []violation
	m.eachHeld(func(c *call, last held) {
		if c.Reason != "" && m.mustServe(c, last) {
			found = append(found, violation{"grace", fmt.Sprintf("a call was refused though call %d had its data key in the cache, which was in grace still", last.call.ID), c})
		}
	})
	return found
}

// eachHeld visits the calls whose data key an earlier one proves to have been cached.
func (m *model) eachHeld(visit func(c *call, last held)) {
	calls := slices.Clone(m.Calls)
	slices.SortFunc(calls, func(a, b *call) int { return int(a.End - b.End) })
	cache := map[holder]held{}
	for _, c := range calls {
		h, ok := m.holderOf(c)
		if !ok {
			continue
		}
		last, ok := cache[h]
		if ok && last.call.End < c.Start {
			visit(c, last)
		}
		if c.Reason == "" {
			if confirmed := c.Start - c.Uses[0].Age; !ok || confirmed > last.confirmed {
				cache[h] = held{c, confirmed}
			}
		}
	}
}

// forgotten finds calls that were served by a version after a no to it had been told:
// that the backend which said so is away since does not make it a yes. What others of
// its data keys' backends have confirmed serves for max_age at most.
func (m *model) forgotten() []violation {
	var found []violation
	for _, a := range m.Actions {
		if a.Effect != disabled {
			continue
		}
		told := map[string]*call{} // by key and direction
		for _, c := range m.Calls {
			if c.Start < a.Begun || c.End > a.Ending {
				continue
			}
			for _, u := range c.Uses {
				name := fmt.Sprint(u.Key, u.Encrypt)
				switch first := told[name]; {
				case c.Reason == "KEY_UNUSABLE" && len(c.Uses) == 1 && first == nil && slices.Contains(u.Wraps, a.Target):
					told[name] = c
				case c.Reason == "" && m.hasASay(u, a) && first != nil && first.End+m.keys[u.Key].MaxAge+swept+tolerance < c.Start && !m.possibly(agentDown, "", first.Start, c.End, 0):
					found = append(found, violation{"forgotten", fmt.Sprintf("call %d was told that %s must not be used, it is disabled still, and it served", first.ID, a.Target), c})
				}
			}
		}
	}
	return found
}

// holderOf is the data key that a call needs, where that is known: one whose messages
// are counted may be used up.
func (m *model) holderOf(c *call) (holder, bool) {
	if len(c.Uses) != 1 || c.Hostile != "" || c.Hasty {
		return holder{}, false
	}
	k, u := m.keys[c.Key], c.Uses[0]
	if k == nil || len(k.Objects) != 1 {
		return holder{}, false
	}
	switch c.Operation {
	case "decrypt":
		return holder{key: c.Key, edks: u.EDKs}, true
	case "encrypt":
		return holder{key: c.Key, caller: c.Caller, encrypt: true}, k.MaxMessages > plenty
	}
	return holder{}, false
}

// plenty is more messages than a run has.
const plenty = 1 << 30

// mustServe tells whether a refusal was one of a data key in grace.
func (m *model) mustServe(c *call, last held) bool {
	switch c.Reason {
	case "BACKEND_UNAVAILABLE", "BACKEND_BROKEN", "DEADLINE_EXCEEDED":
	default:
		return false // another rule is for it
	}
	if _, bounded := m.stale(c); bounded {
		return false
	}
	k, from := m.keys[c.Key], last.call.Start
	for e, late := range map[effect]time.Duration{agentDown: 0, evicted: 0, graceless: 0, disabled: recovery, rotated: recovery} {
		for _, target := range m.targetsOf(e, k) {
			if m.possibly(e, target, from, c.End, late) {
				return false
			}
		}
	}
	most := k.Grace
	if last.call.Operation == "encrypt" {
		most = k.Encrypt
	}
	return c.End < min(m.outageSince(k, from), last.confirmed+k.MaxAge)+most-tolerance
}

// outageSince is before any outage that may have begun at some time could have.
func (m *model) outageSince(k *keySetup, from time.Duration) time.Duration {
	since := never
	for _, s := range m.troubles[k.Objects[0].Backend] {
		if s.to >= from {
			since = min(since, s.from)
		}
	}
	return since
}

// targetsOf are what an effect on a key may be aimed at.
func (m *model) targetsOf(e effect, k *keySetup) []string {
	var targets []string
	switch e {
	case evicted, graceless:
		return []string{k.Name}
	case disabled, rotated:
		for _, a := range m.Actions {
			if a.Effect == e && objectOf(a.Target) == k.Objects[0].Name {
				targets = append(targets, a.Target)
			}
		}
		return targets
	default:
		return []string{""}
	}
}
