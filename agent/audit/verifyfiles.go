package audit

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Span is a range of sequence numbers, both ends in it.
type Span struct {
	From uint64 `json:"from"`
	To   uint64 `json:"to"`
}

// VerifyFiles verifies a log that is spread over files, which may be named in any
// order: the numbers of their records tell it. Of a directory, every file is
// taken that begins like a log; the others are in Report.Ignored. Files whose
// names end with .gz are decompressed. Records that are missing because a file
// was deleted after its retention, as a later record says, are in
// Report.Expired; every other hole is a fault. The files must not be changed
// meanwhile, but for what an agent appends.
func VerifyFiles(initialKey []byte, o VerifyOptions, names ...string) (Report, error) {
	var all []survey
	var ignored []string
	for _, name := range names {
		found, others, err := surveyed(name)
		if err != nil {
			return Report{}, err
		}
		all, ignored = append(all, found...), append(ignored, others...)
	}
	// Files without a record go last: with them the log would end in a line
	// that is none.
	slices.SortStableFunc(all, func(a, b survey) int { return cmp.Compare(a.first-1, b.first-1) })
	inputs := make([]Input, len(all))
	for i, s := range all {
		o.expired = append(o.expired, s.expired...)
		inputs[i] = Input{Name: s.name, Reader: &lazyFile{name: s.name}}
	}
	report, err := Verify(initialKey, o, inputs...)
	report.Ignored = ignored
	for _, in := range inputs {
		if lazy, ok := in.Reader.(*lazyFile); ok {
			err = errors.Join(err, lazy.close())
		}
	}
	return report, err
}

// LogFiles lists the log at path and what was rotated of it, by the agent or by
// others, as far as it begins like a log.
func LogFiles(path string) ([]string, error) {
	names, err := siblings(path)
	if err != nil {
		return nil, fmt.Errorf("look for rotated audit logs: %w", err)
	}
	files := []string{path}
	for _, name := range names {
		s, err := surveyFile(name)
		if err != nil {
			return nil, err
		}
		if s.first > 0 {
			files = append(files, name)
		}
	}
	return files, nil
}

// survey is what a file claims, before any of it is verified.
type survey struct {
	name    string
	first   uint64 // 0: it holds no record
	expired []Span
}

// surveyed looks at a file, or at the files of a directory.
func surveyed(name string) (found []survey, ignored []string, err error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, nil, err
	}
	if !info.IsDir() {
		s, err := surveyFile(name)
		return []survey{s}, nil, err
	}
	entries, err := os.ReadDir(name)
	if err != nil {
		return nil, nil, err
	}
	for _, e := range entries {
		inside := filepath.Join(name, e.Name())
		if !e.Type().IsRegular() {
			ignored = append(ignored, inside)
			continue
		}
		s, err := surveyFile(inside)
		if err != nil {
			return nil, nil, err
		}
		if s.first == 0 {
			ignored = append(ignored, inside)
			continue
		}
		found = append(found, s)
	}
	return found, ignored, nil
}

func surveyFile(name string) (survey, error) {
	s := survey{name: name}
	f := &lazyFile{name: name}
	err := s.read(f)
	if err = errors.Join(err, f.close()); err != nil {
		return s, fmt.Errorf("read %s: %w", name, err)
	}
	return s, nil
}

func (s *survey) read(r io.Reader) error {
	lines := newLineReader(r)
	for n := 0; ; n++ {
		line, _, whole, err := lines.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if s.first == 0 && n > maxUnclaimed {
			return nil // no log
		}
		if s.first > 0 && !bytes.Contains(line, []byte(`"`+EventExpired+`"`)) {
			continue
		}
		signed, ok := parseLine(line)
		if !ok || !whole {
			continue
		}
		if s.first == 0 {
			s.first = signed.sequence
		}
		if e := signed.event(EventExpired); e != nil {
			s.expired = append(s.expired, Span{e.ExpiredFrom, e.ExpiredTo})
		}
	}
}

// lazyFile opens a file when it is read first, and decompresses it when its name
// says so.
type lazyFile struct {
	name string
	f    *os.File
	r    io.Reader
}

func (l *lazyFile) Read(p []byte) (int, error) {
	if l.r == nil {
		f, err := os.Open(l.name)
		if err != nil {
			return 0, err
		}
		l.f, l.r = f, f
		if strings.HasSuffix(l.name, ".gz") {
			if l.r, err = gzip.NewReader(f); err != nil {
				return 0, fmt.Errorf("decompress: %w", err)
			}
		}
	}
	return l.r.Read(p)
}

func (l *lazyFile) close() error {
	if l.f == nil {
		return nil
	}
	return l.f.Close()
}

// maxSkipped bounds how far records that are said to have expired lead.
const maxSkipped = 1 << 34

// expired goes on behind records that are missing before the first of a file,
// when a record that is to come says that they have expired.
func (v *verifier) expired(s signedLine) {
	hole := Span{v.check.chain.next, s.sequence - 1}
	if s.sequence <= hole.From || s.sequence-hole.From > maxSkipped || !covers(v.options.expired, hole) {
		return
	}
	v.check.chain.skip(s.sequence)
	v.anyLink, v.suspect, v.check.stray = true, nil, section{}
	v.report.Expired = append(v.report.Expired, hole)
}

// covers reports whether the spans, together, have every number of the hole.
func covers(spans []Span, hole Span) bool {
	spans = slices.Clone(spans)
	slices.SortFunc(spans, func(a, b Span) int { return cmp.Compare(a.From, b.From) })
	next := hole.From
	for _, s := range spans {
		if s.From <= next && s.To >= next {
			next = s.To + 1
		}
	}
	return next > hole.To
}
