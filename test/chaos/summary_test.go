package chaos

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

func newRand() *rand.Rand { return rand.New(rand.NewPCG(0, 0)) }

// summary is what a run was like.
func (m *model) summary() string {
	var b strings.Builder
	outcomes, fresh := map[string]int{}, map[source]int{}
	worst := map[string]time.Duration{}
	for _, c := range m.Calls {
		reason := c.Reason
		if reason == "" {
			reason = "ok"
			for _, u := range c.Uses {
				fresh[u.Source]++
			}
		}
		outcomes[reason]++
		if !c.Hasty {
			worst[reason] = max(worst[reason], c.End-c.Start)
		}
	}
	faults := map[string]int{}
	for _, a := range m.Actions {
		faults[a.Lane+" "+a.Fault]++
	}
	fmt.Fprintf(&b, "seed %d: %d calls\n", m.Seed, len(m.Calls))
	for _, name := range sorted(outcomes) {
		fmt.Fprintf(&b, "  %-22s %8d   slowest %s\n", name, outcomes[name], worst[name].Round(time.Millisecond))
	}
	fmt.Fprintf(&b, "  fresh: %d upstream, %d cached, %d grace\n  faults:", fresh[upstream], fresh[cached], fresh[grace])
	for _, name := range sorted(faults) {
		fmt.Fprintf(&b, " %s %d,", name, faults[name])
	}
	b.WriteString("\n  " + m.coverage() + "\n  worst recovery:")
	for _, line := range m.worstRecoveries() {
		b.WriteString(" " + line + ",")
	}
	return b.String()
}

// worstRecoveries are the longest times after each kind of fault, where no other fault
// came before its end.
func (m *model) worstRecoveries() []string {
	worst := map[string]time.Duration{}
	for _, r := range m.recovers {
		if !m.troubledAfter(r) {
			name := r.action.Lane + " " + r.action.Fault
			worst[name] = max(worst[name], r.took)
		}
	}
	var lines []string
	for _, name := range sorted(worst) {
		lines = append(lines, fmt.Sprintf("%s %s", name, worst[name].Round(10*time.Millisecond)))
	}
	return lines
}

func sorted[V any](m map[string]V) []string {
	var names []string
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
