package chaos

import (
	"fmt"
	"strings"
	"time"
)

// coverage says how much of a run the rules had a say in: where nothing had to be
// served, and nothing had to be refused, a good run proves little.
func (m *model) coverage() string {
	var b strings.Builder
	must, mustNot, expired, revoked := 0, 0, 0, 0
	for _, c := range m.Calls {
		if c.Hostile != "" || c.Hasty || len(c.Uses) == 0 {
			continue
		}
		switch {
		case !m.Setup.Allowed[c.Caller+" "+c.Key+" "+c.Operation] || m.surely(forbidden, c.Caller, c.Start, c.End) != nil:
			mustNot++
		case !m.excusedByOutage(c) && !m.excusedByRevocation(c):
			must++
		}
		for _, u := range c.Uses {
			served := *c
			served.Reason = ""
			if servedTooLong(m, &served, u) != "" {
				expired++
			}
			if servedThoughDisabled(m, &served, u) != "" {
				revoked++
			}
		}
	}
	fmt.Fprintf(&b, "judged: %d had to be served, %d in grace; %d had to be refused by policy, %d after grace, %d as revoked; calm:", must, m.inGrace(), mustNot, expired, revoked)
	for _, backend := range m.allBackends() {
		fmt.Fprintf(&b, " %s %d%%", backend, m.calmPart(backend))
	}
	return b.String()
}

// calmPart is the part of the time, in percent, in which a backend surely answered.
func (m *model) calmPart(backend string) int {
	end, calm, all := time.Duration(0), 0, 0
	for _, c := range m.Calls {
		end = max(end, c.End)
	}
	for at := time.Duration(0); at < end; at += 100 * time.Millisecond {
		if all++; m.calm(backend, at, at) {
			calm++
		}
	}
	return 100 * calm / max(1, all)
}

// inGrace is how many calls in troubled times would have been violations of rule grace,
// had they been refused.
func (m *model) inGrace() int {
	n := 0
	m.eachHeld(func(c *call, last held) {
		refused := *c
		refused.Reason = "BACKEND_UNAVAILABLE"
		if m.excusedByOutage(&refused) && m.mustServe(&refused, last) {
			n++
		}
	})
	return n
}
