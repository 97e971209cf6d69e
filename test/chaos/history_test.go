// Package chaos disturbs a running agent with everything that it depends on, writes
// down every call with its answer, and checks them against what may have been true at
// the time.
package chaos

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// history is all that happened in a run, in times since it began. Whoever has it can
// check it again.
type history struct {
	Seed    uint64
	Setup   setup
	Actions []*action
	Calls   []*call
}

// setup is what the configuration says, as far as the checker needs it.
type setup struct {
	Keys []keySetup
	// Allowed has "caller key operation" for all that policy gives while no rule is
	// taken away.
	Allowed map[string]bool
	// RuleStale is the max_stale of rules, by "caller key".
	RuleStale map[string]time.Duration
}

// keySetup is a logical key.
type keySetup struct {
	Name string
	// Objects are the names of its wrapping keys; each has a backend.
	Objects        []objectSetup
	MaxAge         time.Duration
	Encrypt, Grace time.Duration // grace for new messages, and for old ones
	MaxMessages    int
}

type objectSetup struct{ Name, Backend, URI string }

// effect says what an action does, as far as callers can see.
type effect string

const (
	// down: a backend, the target, may be out of reach.
	down effect = "down"
	// agentDown: the agent is away, and has forgotten what was cached when it is back.
	agentDown effect = "agent"
	// evicted: the data keys of a key, the target, or of all ("") are destroyed.
	evicted effect = "evict"
	// disabled: an object's version, "object@version", is.
	disabled effect = "disabled"
	// rotated: an object has a new version.
	rotated effect = "rotated"
	// forbidden: the rules of a caller, the target, are taken away.
	forbidden effect = "forbidden"
	// limited: a caller, the target, has a quota.
	limited effect = "limited"
	// graceless: a key, the target, has no grace.
	graceless effect = "graceless"
	// harmless: nobody may notice.
	harmless effect = "harmless"
)

// action is one deed of the nemesis. What it does is in effect for certain from Begun
// to Ending, and may be from Begin to Ended.
type action struct {
	Lane, Fault, Target         string
	Effect                      effect
	Begin, Begun, Ending, Ended time.Duration
	// Sure: from Begun to Ending no call reaches the backend, not just some.
	Sure bool
	// Current: what is disabled is the current version.
	Current bool
	Failed  string `json:",omitempty"`
}

func (a *action) String() string {
	text := fmt.Sprintf("%s %s (%s %s): begins %s to %s, ends %s to %s", a.Lane, a.Fault, a.Effect, a.Target, at(a.Begin), at(a.Begun), at(a.Ending), at(a.Ended))
	if a.Failed != "" {
		text += ", failed: " + a.Failed
	}
	return text
}

// source is a freshness, as the API names it.
type source string

const (
	upstream source = "upstream"
	cached   source = "cached"
	grace    source = "grace"
)

// use is a key behind an answer, or behind a request that was refused.
type use struct {
	Key     string
	Encrypt bool // the direction
	// Wraps are "object@version" of the data key's EDKs.
	Wraps          []string
	EDKs           string // a hash of them
	Version        string
	Source         source
	Age, GraceLeft time.Duration
}

// call is what somebody asked for, and what came of it.
type call struct {
	ID                     int
	Caller, Operation, Key string
	Start, End             time.Duration
	// Patience is the deadline that the caller gave. Hasty: it may be too short for an
	// answer, or the call was cancelled.
	Patience time.Duration
	Hasty    bool
	MaxStale *time.Duration `json:",omitempty"`
	// Hostile says what is wrong with the request: it must not succeed.
	Hostile string `json:",omitempty"`
	// Uses are the keys: of a re-encryption two. Of a refused request they are what its
	// message says.
	Uses []use
	// Message is the message that was made; Wrong says why an answer is not what it
	// must be.
	Message string `json:",omitempty"`
	Wrong   string `json:",omitempty"`
	// Reason is "" for success, else the agent's, or "unreachable" where nobody answered.
	Reason, Error, RequestID string `json:",omitempty"`
}

// unreachable is the reason of calls that the agent did not answer.
const unreachable = "unreachable"

func (c *call) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "call %d: %s %s %s, %s to %s", c.ID, c.Caller, c.Operation, c.Key, at(c.Start), at(c.End))
	if c.MaxStale != nil {
		fmt.Fprintf(&b, ", max_stale %s", *c.MaxStale)
	}
	if c.Hostile != "" {
		fmt.Fprintf(&b, ", hostile: %s", c.Hostile)
	}
	if c.Hasty {
		fmt.Fprintf(&b, ", hasty (%s)", c.Patience)
	}
	for _, u := range c.Uses {
		fmt.Fprintf(&b, "; %s %v", u.Key, u.Wraps)
		if u.Source != "" {
			fmt.Fprintf(&b, " %s age %s left %s", u.Source, u.Age, u.GraceLeft)
		}
	}
	if c.Reason != "" {
		fmt.Fprintf(&b, ": %s: %s", c.Reason, c.Error)
	} else {
		b.WriteString(": ok")
	}
	if c.Wrong != "" {
		fmt.Fprintf(&b, ", but %s", c.Wrong)
	}
	return b.String()
}

func at(d time.Duration) string {
	if d >= never {
		return "the end"
	}
	return fmt.Sprintf("%.3fs", d.Seconds())
}

// never is the end of what has not ended.
const never = time.Duration(1 << 62)

// window is what happened around a call, for people.
func (h *history) window(c *call, before, after time.Duration) string {
	from, to := c.Start-before, c.End+after
	type line struct {
		at   time.Duration
		text string
	}
	var lines []line
	for _, a := range h.Actions {
		if a.Begin <= to && a.Ended >= from-20*time.Second {
			lines = append(lines, line{a.Begin, "# " + a.String()})
		}
	}
	n := 0
	for _, other := range h.Calls {
		if other.Start <= to && other.End >= from && sameKey(other, c) {
			if n++; n > 60 && other != c {
				continue
			}
			text := other.String()
			if other == c {
				text = ">>> " + text
			}
			lines = append(lines, line{other.Start, text})
		}
	}
	slices.SortStableFunc(lines, func(a, b line) int { return int(a.at - b.at) })
	var b strings.Builder
	for _, l := range lines {
		b.WriteString("  " + l.text + "\n")
	}
	return b.String()
}

func sameKey(a, b *call) bool { return a.Key == b.Key || a == b }

func (h *history) save(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	return json.NewEncoder(f).Encode(h)
}

func loadHistory(path string) (*history, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	h := &history{}
	return h, json.Unmarshal(b, h)
}
