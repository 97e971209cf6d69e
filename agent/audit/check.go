package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"hash"
)

// section counts and digests bytes that belong to no record. The newline that
// ends them counts only when more bytes follow.
type section struct {
	bytes   uint64
	digest  hash.Hash // nil: empty
	newline bool
}

func (s *section) empty() bool { return s.digest == nil }

// add adds a line, or a part of one, and whether a newline ended it.
func (s *section) add(line []byte, newline bool) {
	if s.digest == nil {
		s.digest = sha256.New()
	}
	if s.newline {
		s.write([]byte("\n"))
	}
	s.write(line)
	s.newline = newline
}

func (s *section) write(p []byte) {
	s.digest.Write(p)
	s.bytes += uint64(len(p))
}

// flush counts the last newline too.
func (s *section) flush() {
	if s.newline {
		s.write([]byte("\n"))
		s.newline = false
	}
}

// is reports whether e describes the section, with or without its last newline:
// a line is ended before the record that describes it, a file is not.
func (s *section) is(e *LogEvent) bool {
	if s.empty() || e == nil {
		return false
	}
	if s.bytes == e.TornBytes {
		return s.sum() == e.TornSHA256
	}
	s.flush()
	return s.bytes == e.TornBytes && s.sum() == e.TornSHA256
}

func (s *section) sum() string { return hex.EncodeToString(s.digest.Sum(nil)) }

// event describes the section.
func (s *section) event() *LogEvent {
	return &LogEvent{TornBytes: s.bytes, TornSHA256: s.sum()}
}

// step is what a line turned out to be.
type step uint8

const (
	stepStray     step = iota // no next record: collected in checker.stray
	stepRecord                // the next record
	stepRecovered             // the next record, which describes the stray lines before it
	stepGap                   // a later record that says which may be missing
	stepUnlinked              // the next record, but it follows another record than the last
	stepIntruded              // the next record, but stray lines before it are not described
)

// checker follows a chain along the lines of a log.
type checker struct {
	chain chain
	// stray holds the lines since the last record that are none.
	stray section
	// probed counts the keys computed for lines that say to be later records.
	probed uint64
}

// maxProbe bounds how many keys ahead of the chain are computed for the lines
// of one log, which may be anybody's.
const maxProbe = 1 << 22

// check looks at one line without its newline. After stepUnlinked and
// stepIntruded the checker is of no more use.
func (c *checker) check(line []byte, newline bool) (step, signedLine) {
	s, ok := parseLine(line)
	if !ok {
		c.stray.add(line, newline)
		return stepStray, s
	}
	previous := c.chain.previous
	if c.chain.accept(s) {
		return c.link(s, previous), s
	}
	if c.gap(s) {
		c.stray = section{}
		return stepGap, s
	}
	c.stray.add(line, newline)
	return stepStray, s
}

func (c *checker) link(s signedLine, previous [sha256.Size]byte) step {
	switch {
	case s.previous != previous:
		return stepUnlinked
	case c.stray.empty():
		return stepRecord
	case s.event(EventRecovered) != nil && c.stray.is(s.event(EventRecovered)):
		c.stray = section{}
		return stepRecovered
	}
	return stepIntruded
}

// gap accepts a later record that says that those before it may be missing.
func (c *checker) gap(s signedLine) bool {
	if s.sequence <= c.chain.next || s.sequence-c.chain.next > maxProbe-c.probed {
		return false
	}
	e := s.event(EventGap)
	if e == nil || e.GapFrom > c.chain.next || e.GapTo != s.sequence-1 {
		return false
	}
	c.probed += s.sequence - c.chain.next
	later := c.chain
	later.skip(s.sequence)
	if !later.accept(s) {
		return false
	}
	c.chain = later
	return true
}

// event decodes s as one of the log's own events; nil when it is not that one.
func (s signedLine) event(operation string) *LogEvent {
	if !bytes.Contains(s.text, []byte(`"`+operation+`"`)) {
		return nil
	}
	r, err := s.record()
	if err != nil || r.Kind != KindEvent || r.Operation != operation {
		return nil
	}
	return r.Log
}

// record decodes the fields of s.
func (s signedLine) record() (Record, error) {
	var r Record
	text := append(bytes.Clone(s.text), '}')
	err := json.Unmarshal(text, &r)
	return r, err
}
