package chaos

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// step is one entry of the schedule: what is done, when, and for how long at least.
type step struct {
	Lane, Fault string
	At, For     time.Duration
	// Roll is for what the fault leaves to chance.
	Roll uint64
}

// lane is what happens one after the other. Lanes know nothing of each other.
type lane struct {
	name       string
	faults     []string
	every      time.Duration // from the end of one step to the next, half of it to half more
	short      time.Duration // how long most of them last, at most
	long       time.Duration // how long one of five lasts, and every other of the outages
	atOnceOnly []string      // these have no length
}

// outages are the faults in which a backend answers nobody: those that last are what
// grace is for.
func outages() []string {
	return []string{"general error", "dead", "refuse", "gone", "silence", "keystore away"}
}

// lies is a token that answers, and not with what it should.
const lies = "lies"

func lanes() []lane {
	return []lane{
		{"hsm", []string{"kill", "stop", "general error", "dead", "slow", "loss", "token away", "wrong PIN", "kill", "hang", lies}, 9 * time.Second, 5 * time.Second, 26 * time.Second, []string{"kill"}},
		{"net", []string{"cut", "refuse", "gone", "silence", "halves", "delay", "throttle", "corrupt", "kill", "stop"}, 9 * time.Second, 5 * time.Second, 26 * time.Second, []string{"cut", "kill"}},
		{"local", []string{"kill", "stop", "keystore away", "keystore away"}, 12 * time.Second, 5 * time.Second, 26 * time.Second, []string{"kill"}},
		{"keys", []string{"rotate orders", "disable orders", "disable ledger", "disable pair-a", "disable pair-b", "rotate pair-a", "rotate ledger"}, 8 * time.Second, 15 * time.Second, 28 * time.Second, []string{"rotate orders", "rotate pair-a", "rotate ledger"}},
		{"agent", []string{
			"evict", "evict all", "bad configuration", "same configuration", "forbid carol", "limit carol", "no grace", "replace hsm", "replace net",
			"kill agent", "restart agent",
		}, 9 * time.Second, 6 * time.Second, 9 * time.Second, []string{"evict", "evict all", "bad configuration", "same configuration", "replace hsm", "replace net", "kill agent", "restart agent"}},
	}
}

// warm is how long everything works before the first step, cool how long before the
// end the last one is over.
func warm(length time.Duration) time.Duration { return min(6*time.Second, length/8) }
func cool(length time.Duration) time.Duration { return min(20*time.Second, length/6) }

// plan is the schedule of a seed: nothing but the seed and the length decides it.
func plan(seed uint64, length time.Duration) []step {
	var steps []step
	squeeze := min(1, float64(length)/float64(2*time.Minute)) // short runs have short faults
	scaled := func(d time.Duration, least float64) time.Duration {
		return time.Duration(float64(d) * max(squeeze, least))
	}
	for i, l := range lanes() {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		within := func(d time.Duration) time.Duration { return d/2 + time.Duration(r.Int64N(int64(d))) }
		bag := r.Perm(len(l.faults)) // each comes before any comes again
		for at := warm(length) + time.Duration(r.Int64N(int64(scaled(l.every, 0.25)))); ; {
			if len(bag) == 0 {
				bag = r.Perm(len(l.faults))
			}
			fault := l.faults[bag[0]]
			bag = bag[1:]
			lasts := time.Duration(0)
			if long := r.IntN(5) == 0; !slices.Contains(l.atOnceOnly, fault) {
				lasts = min(within(scaled(l.short, 0.5)), scaled(l.short, 0.5))
				if long || slices.Contains(outages(), fault) && r.IntN(2) == 0 {
					lasts = scaled(l.long, 0.3)
				}
			}
			if at+lasts > length-cool(length) {
				break
			}
			steps = append(steps, step{l.name, fault, at.Round(time.Millisecond), lasts.Round(time.Millisecond), r.Uint64()})
			at += lasts + within(scaled(l.every, 0.25))
		}
	}
	slices.SortStableFunc(steps, func(a, b step) int { return int(a.At - b.At) })
	return steps
}

// table is a schedule for people.
func table(seed uint64, length time.Duration, steps []step) string {
	var b strings.Builder
	fmt.Fprintf(&b, "schedule of CHAOS_SEED=%d CHAOS_TIME=%s\n%8s  %-6s %8s  %s\n", seed, length, "at", "lane", "for", "what")
	for _, s := range steps {
		lasts := s.For.String()
		if s.For == 0 {
			lasts = "-"
		}
		fmt.Fprintf(&b, "%7.2fs  %-6s %8s  %s\n", s.At.Seconds(), s.Lane, lasts, s.Fault)
	}
	return b.String()
}
