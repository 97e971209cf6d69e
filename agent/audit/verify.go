package audit

import (
	"errors"
	"fmt"
	"io"
	"time"
)

// Input is one file of a log.
type Input struct {
	// Name is what the report calls the file.
	Name   string
	Reader io.Reader
}

// VerifyOptions change what Verify expects. The zero value expects a whole log,
// from its first record on, without gaps.
type VerifyOptions struct {
	// From is the sequence number of the first record given; 0 is 1. It costs
	// one HMAC per record before it.
	From uint64
	// AtLeast is a sequence number that the log is known to have reached, by
	// word of anybody but the log itself; 0 is unknown.
	AtLeast uint64
	// AllowGaps accepts records that declare others missing.
	AllowGaps bool
	// Checkpoints of this log, and of others, in any order, as ParseCheckpoints
	// returns them.
	Checkpoints []Checkpoint

	// expired are the records that the log says have expired, unverified yet.
	expired []Span
}

// Report is the result of Verify.
type Report struct {
	// Chain identifies the initial key.
	Chain string `json:"chain"`
	// Records is how many records verified, First and Last the first and last
	// sequence number of them, FirstTime and LastTime their times.
	Records   uint64       `json:"records"`
	First     uint64       `json:"first,omitempty"`
	Last      uint64       `json:"last,omitempty"`
	FirstTime time.Time    `json:"first_time,omitzero"`
	LastTime  time.Time    `json:"last_time,omitzero"`
	Files     []FileReport `json:"files,omitempty"`
	// Recovered are the places where a crash or a full disk left bytes that
	// belong to no record; a record describes each. Nothing is wrong with them.
	Recovered []Place `json:"recovered,omitempty"`
	// Gaps are the records that a record declares missing.
	Gaps []Gap `json:"gaps,omitempty"`
	// Expired are the records that were deleted after their retention, as records
	// say that verified.
	Expired []Span `json:"expired,omitempty"`
	// Ignored are files of a directory that hold no records.
	Ignored []string `json:"ignored,omitempty"`
	// Fault is the first line that does not verify; nil when all do.
	Fault *Fault `json:"fault,omitempty"`
	// Checkpoints is how many checkpoints agree with the log, CheckpointsIgnored
	// how many belong to another chain or to nobody. Proven is the last record
	// that one of them is about.
	Checkpoints        int    `json:"checkpoints,omitempty"`
	CheckpointsIgnored int    `json:"checkpoints_ignored,omitempty"`
	Proven             uint64 `json:"proven,omitempty"`
	// TailUnproven says that nothing but the log vouches for its end: records
	// after Last could have been removed. It is false when AtLeast is Last, or
	// a checkpoint is about that record.
	TailUnproven bool `json:"tail_unproven"`

	allowGaps bool
}

// OK reports whether every record that was given verified, and none is missing
// before the last of them. It says nothing about an unproven tail.
func (r Report) OK() bool { return r.Fault == nil && (r.allowGaps || len(r.Gaps) == 0) }

// FileReport tells which records a file holds; First is 0 when it holds none.
type FileReport struct {
	Name  string `json:"name"`
	First uint64 `json:"first,omitempty"`
	Last  uint64 `json:"last,omitempty"`
}

// Place is a line of a file; lines count from 1.
type Place struct {
	File string `json:"file"`
	Line int    `json:"line"`
}

func (p Place) String() string { return fmt.Sprintf("%s:%d", p.File, p.Line) }

// Gap is what is missing before the record at Place, which declares it. The
// last of these numbers may never have been used.
type Gap struct {
	Place
	From   uint64 `json:"from"`
	To     uint64 `json:"to"`
	Reason string `json:"reason"`
}

// Reason says what is wrong with a line.
type Reason string

// The reasons.
const (
	// ReasonEdited: the line was changed, or is no record.
	ReasonEdited Reason = "edited"
	// ReasonRemoved: records before the line, or at the end, are missing.
	ReasonRemoved Reason = "removed"
	// ReasonReordered: the line stands before an earlier record.
	ReasonReordered Reason = "reordered"
	// ReasonInserted: the line does not belong here; what follows it does.
	ReasonInserted Reason = "inserted"
	// ReasonForked: the line is genuine but continues another record than the
	// last: two agents wrote from one state.
	ReasonForked Reason = "forked"
	// ReasonTorn: the last line is incomplete: a crash, or a write under way.
	ReasonTorn Reason = "torn"
	// ReasonWrongKey: no line verifies under the initial key.
	ReasonWrongKey Reason = "wrong-key"
)

// Fault is the first line that does not verify.
type Fault struct {
	Place
	Reason Reason `json:"reason"`
	// Detail is a sentence for people.
	Detail string `json:"detail"`
}

func (f *Fault) Error() string { return fmt.Sprintf("%s: %s: %s", f.Place, f.Reason, f.Detail) }

// Verify checks a log against its initial key: the files in the order of
// writing. It reads each once and holds one line in memory. What is wrong with
// the log is in the report; the error is for an unusable key and for reads that
// fail.
func Verify(initialKey []byte, o VerifyOptions, inputs ...Input) (Report, error) {
	initial, err := newChain(initialKey)
	if err != nil {
		return Report{}, err
	}
	v := verifier{initial: initial, check: checker{chain: initial}, options: o}
	v.report = Report{Chain: initial.id(), allowGaps: o.AllowGaps}
	v.checkpoints, v.report.CheckpointsIgnored = sortedCheckpoints(o.Checkpoints, v.report.Chain)
	v.check.chain.skip(max(o.From, 1))
	v.anyLink = o.From > 1
	for _, in := range inputs {
		if err := v.file(in); err != nil {
			return v.report, fmt.Errorf("read %s: %w", in.Name, err)
		}
	}
	v.finish()
	return v.report, nil
}

// verifier reads the lines of a log.
type verifier struct {
	initial chain
	check   checker
	options VerifyOptions
	report  Report
	place   Place
	// anyLink: the record before the first one is not known.
	anyLink bool
	suspect *suspect
	// proven are the expired records of which a record has verified.
	proven []Span
	// checkpoints are those whose record is still to come.
	checkpoints checkpoints
}

func (v *verifier) file(in Input) error {
	v.report.Files = append(v.report.Files, FileReport{Name: in.Name})
	v.place = Place{File: in.Name}
	lines := newLineReader(in.Reader)
	for v.report.Fault == nil {
		begins := !lines.split
		line, newline, whole, err := lines.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if begins {
			v.place.Line++
		}
		v.line(line, newline, whole)
	}
	return nil
}

func (v *verifier) line(line []byte, newline, whole bool) {
	if !whole {
		v.check.stray.add(line, newline)
		v.stray(signedLine{}, newline)
		return
	}
	if s, ok := parseLine(line); ok {
		if v.report.Files[len(v.report.Files)-1].First == 0 {
			v.expired(s)
		}
		if v.anyLink {
			v.check.chain.previous = s.previous
		}
	}
	result, s := v.check.check(line, newline)
	switch result {
	case stepRecord:
		v.record(s)
	case stepRecovered:
		v.report.Recovered = append(v.report.Recovered, v.suspect.place)
		v.record(s)
	case stepGap:
		from := max(v.report.Last+1, v.options.From, 1)
		v.report.Gaps = append(v.report.Gaps, Gap{Place: v.place, From: from, To: s.sequence - 1, Reason: v.record(s).Detail})
	case stepStray:
		v.stray(s, newline)
	case stepUnlinked:
		v.fault(v.place, ReasonForked, "record %d is genuine but does not follow the record before it: "+
			"two agents wrote from one state, such as a restored backup of the state directory", s.sequence)
	case stepIntruded:
		v.intruded(s)
	}
}

func (v *verifier) fault(at Place, reason Reason, format string, a ...any) {
	v.report.Fault = &Fault{Place: at, Reason: reason, Detail: fmt.Sprintf(format, a...)}
}

// record counts a record that verified.
func (v *verifier) record(s signedLine) Record {
	v.anyLink, v.suspect = false, nil
	r, err := s.record()
	if err != nil {
		// Under a right MAC this is a fault of the program that wrote it.
		v.fault(v.place, ReasonEdited, "record %d is genuine, but no JSON that can be read: %v", s.sequence, err)
	}
	f := &v.report.Files[len(v.report.Files)-1]
	if f.First == 0 {
		f.First = s.sequence
	}
	f.Last = s.sequence
	if v.report.Records == 0 {
		v.report.First, v.report.FirstTime = s.sequence, r.Time
	}
	if r.Kind == KindEvent && r.Operation == EventExpired && r.Log != nil {
		v.proven = append(v.proven, Span{r.Log.ExpiredFrom, r.Log.ExpiredTo})
	}
	v.report.Records++
	v.report.Last, v.report.LastTime = s.sequence, r.Time
	v.reached(s)
	return r
}
