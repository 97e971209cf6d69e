package audit

import (
	"fmt"
	"slices"
)

// suspect is the first line that did not verify. The lines after it tell why.
type suspect struct {
	place   Place
	line    signedLine
	genuine bool // it verifies under the key of its own number
	ends    bool // it is the last line, and has no newline
	// keyProven: some line verifies under the initial key.
	keyProven bool
	probe     chain
}

// stray takes note of a line that is not the next record. The zero signedLine
// is no record at all.
func (v *verifier) stray(s signedLine, newline bool) {
	if v.suspect == nil {
		v.suspect = v.newSuspect(s)
		v.suspect.ends = !newline
		return
	}
	v.suspect.ends = v.suspect.ends && v.suspect.place == v.place && !newline
	if !v.suspect.keyProven && v.suspect.reach(s) {
		v.suspect.keyProven = v.suspect.probe.accept(s)
	}
}

func (v *verifier) newSuspect(s signedLine) *suspect {
	s.text = append([]byte(nil), s.text...) // the line is gone after this call
	p := &suspect{place: v.place, line: s, probe: v.check.chain, keyProven: v.report.Records > 0}
	switch next := v.check.chain.next; {
	case s.sequence > next && p.reach(s):
		p.genuine = p.probe.accept(s)
	case s.sequence > 0 && s.sequence < next:
		earlier := v.initial
		earlier.skip(s.sequence)
		p.genuine = earlier.accept(s)
	}
	if e := s.event(EventStarted); e != nil && e.Chain == v.report.Chain {
		p.keyProven = true
	}
	p.keyProven = p.keyProven || p.genuine
	return p
}

// reach moves the probe to the key of a later record, when it is not too far.
func (p *suspect) reach(s signedLine) bool {
	if s.sequence < p.probe.next || s.sequence-p.probe.next > maxProbe {
		return false
	}
	p.probe.skip(s.sequence)
	return true
}

// intruded explains stray lines after which the next record follows.
func (v *verifier) intruded(next signedLine) {
	p := v.suspect
	switch {
	case p.genuine && p.line.sequence > next.sequence:
		v.fault(p.place, ReasonReordered, "record %d stands before record %d", p.line.sequence, next.sequence)
	case p.genuine:
		v.fault(p.place, ReasonInserted, "record %d stands here a second time", p.line.sequence)
	default:
		v.fault(p.place, ReasonInserted, "the lines from here to the one before %s, record %d, are not of this log", v.place, next.sequence)
	}
}

// finish explains what is left at the end of the log.
func (v *verifier) finish() {
	r := &v.report
	if r.Fault == nil && v.suspect != nil {
		v.unresolved(v.suspect)
	}
	if r.Fault == nil {
		v.beyond()
	}
	r.TailUnproven = r.Last == 0 || max(v.options.AtLeast, r.Proven) < r.Last
	if r.Fault != nil {
		return
	}
	switch {
	case r.Records == 0:
		v.fault(v.place, ReasonRemoved, "there is no record at all; record %d should be the first", v.check.chain.next)
	case slices.ContainsFunc(r.Expired, func(hole Span) bool { return !covers(v.proven, hole) }):
		v.fault(v.place, ReasonRemoved, "records are missing that no record says have expired: the one that said so does not verify")
	case r.Proven > r.Last:
		v.fault(v.place, ReasonRemoved, "the log ends with record %d, and a checkpoint proves that it reached %d", r.Last, r.Proven)
	case v.options.AtLeast > r.Last:
		v.fault(v.place, ReasonRemoved, "the log ends with record %d but reached %d", r.Last, v.options.AtLeast)
	}
}

func (v *verifier) unresolved(p *suspect) {
	next := v.check.chain.next
	switch {
	case p.ends && p.line.sequence == 0:
		v.fault(p.place, ReasonTorn, "the last line is incomplete: the agent was writing it, or ended in the middle; "+
			"records 1 to %d are not touched by that", next-1)
	case !p.keyProven:
		v.fault(p.place, ReasonWrongKey, "no record verifies under the key of chain %s%s; use the initial key that belongs to this log%s", v.report.Chain, p.claim(), p.hint(next))
	case p.genuine && p.line.sequence > next:
		v.fault(p.place, ReasonRemoved, "records %d to %d are missing before record %d", next, p.line.sequence-1, p.line.sequence)
	case p.genuine:
		v.fault(p.place, ReasonInserted, "record %d stands here a second time", p.line.sequence)
	case p.line.sequence == 0:
		v.fault(p.place, ReasonEdited, "the line, which should be record %d, is no record", next)
	default:
		v.fault(p.place, ReasonEdited, "the line, which should be record %d, is not what was written", next)
	}
}

// hint says how to verify a log whose beginning is gone.
func (p *suspect) hint(next uint64) string {
	if p.line.sequence <= next {
		return ""
	}
	return fmt.Sprintf("; if the files before record %d are gone on purpose, say --from %[1]d", p.line.sequence)
}

// claim says which chain the suspect claims to begin.
func (p *suspect) claim() string {
	if e := p.line.event(EventStarted); e != nil {
		return ", and the log begins chain " + e.Chain
	}
	return ""
}
