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
	slowest := map[string]time.Duration{}
	for _, c := range m.Calls {
		reason := c.Reason
		if reason == "" {
			reason = "served"
			for _, u := range c.Uses {
				fresh[u.Source]++
			}
		}
		outcomes[reason]++
		if !c.Hasty {
			slowest[reason] = max(slowest[reason], c.End-c.Start)
		}
	}
	fmt.Fprintf(&b, "seed %d: %d calls, keys %d upstream, %d cached, %d in grace\n", m.Seed, len(m.Calls), fresh[upstream], fresh[cached], fresh[grace])
	fmt.Fprintf(&b, "  %-26s %8s %12s\n", "outcome", "calls", "slowest")
	for _, name := range sorted(outcomes) {
		fmt.Fprintf(&b, "  %-26s %8d %12s\n", name, outcomes[name], slowest[name].Round(time.Millisecond))
	}
	faults, worst := map[string]int{}, m.worstRecoveries()
	for _, a := range m.Actions {
		faults[a.Lane+": "+a.Fault]++
	}
	fmt.Fprintf(&b, "  %-26s %8s %12s\n", "fault", "times", "recovery")
	for _, name := range sorted(faults) {
		recovery := ""
		if took, ok := worst[name]; ok {
			recovery = took.Round(10 * time.Millisecond).String()
		}
		fmt.Fprintf(&b, "  %-26s %8d %12s\n", name, faults[name], recovery)
	}
	b.WriteString("  " + m.coverage())
	return b.String()
}

// worstRecoveries are the longest times after each kind of fault until upstream
// answered, where no other fault came before that.
func (m *model) worstRecoveries() map[string]time.Duration {
	worst := map[string]time.Duration{}
	for _, r := range m.recovers {
		if !m.troubledAfter(r) {
			name := r.action.Lane + ": " + r.action.Fault
			worst[name] = max(worst[name], r.took)
		}
	}
	return worst
}

func sorted[V any](m map[string]V) []string {
	var names []string
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
