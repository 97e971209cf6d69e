package audit

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// tail is where a log ends: what the next write has to know.
type tail struct {
	chain    chain
	torn     section   // bytes after the last record that belong to none
	unsealed bool      // the file does not end with a newline
	skipped  bool      // the chain leaps, and the record that says so is in events
	events   []*Record // to be written before any other record
	notes    []string
}

// recoverTail finds the end of the log of a saved state, and follows the chain
// from there over the records written since.
func recoverTail(l *file, saved savedState) (*tail, error) {
	at, err := saved.chain()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	t := &tail{chain: at}
	f := l.open.Load()
	begin, found, err := locate(f, saved)
	if err != nil {
		return nil, fmt.Errorf("read audit log %s: %w", l.path, err)
	}
	if found {
		return t, t.follow(f, begin)
	}
	if l.size == 0 {
		return t, t.continueMoved(l.path, saved)
	}
	if startsWith(f, at) {
		return t, t.follow(f, 0) // moved away, and written since
	}
	moved, begin, err := findMoved(l.path, saved)
	if err != nil {
		return nil, err
	}
	if moved == nil {
		return nil, gapError(l.path, saved, "the log does not contain that record")
	}
	err = t.follow(moved, begin)
	if err = errors.Join(err, moved.Close()); err != nil {
		return nil, err
	}
	return t, t.follow(f, 0)
}

func gapError(path string, saved savedState, why string) error {
	return fmt.Errorf("%w: %s must contain record %d, or a rotated file %s* beside it: %s. Put the file back; "+
		"if it is lost, accept the gap with \"kms-agent audit accept-gap\", which leaves a record of it",
		ErrGap, path, saved.Sequence, path, why)
}

// continueMoved goes on in a new file after the old one was moved away while
// nobody wrote.
func (t *tail) continueMoved(path string, saved savedState) error {
	moved, begin, err := findMoved(path, saved)
	if err != nil {
		return err
	}
	if moved != nil {
		if err := errors.Join(t.follow(moved, begin), moved.Close()); err != nil {
			return err
		}
		t.unsealed = false // the next write goes to another file
	} else if names, err := siblings(path); err != nil || len(names) == 0 || !saved.Closed {
		return errors.Join(gapError(path, saved, "the log is empty or was not there"), err)
	}
	t.events = append(t.events, &Record{Kind: KindEvent, Operation: EventContinued,
		Detail: fmt.Sprintf("the log file was new when the agent started; record %d is in an earlier file", t.chain.next-1)})
	return nil
}

// follow checks the lines of f from offset begin to its end.
func (t *tail) follow(f *os.File, begin int64) error {
	c := checker{chain: t.chain, stray: t.torn}
	lines := newLineReader(io.NewSectionReader(f, begin, 1<<62))
	unsealed, err := endsInside(f, begin)
	if err != nil {
		return fmt.Errorf("read audit log %s: %w", f.Name(), err)
	}
	t.unsealed = unsealed
	for {
		line, newline, whole, err := lines.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read audit log %s: %w", f.Name(), err)
		}
		t.unsealed = !newline
		if !whole {
			c.stray.add(line, newline)
			continue
		}
		result, s := c.check(line, newline)
		_, record := parseLine(line)
		if result == stepUnlinked || result == stepIntruded || result == stepStray && record {
			return fmt.Errorf("%w: record %d in %s is not what follows record %d. Keep a copy of the file, run \"kms-agent audit verify\" on it; "+
				"then move the file away and accept the gap with \"kms-agent audit accept-gap\"", ErrTampered, s.sequence, f.Name(), c.chain.next-1)
		}
	}
	t.chain, t.torn = c.chain, c.stray
	if !t.torn.empty() {
		t.torn.flush()
		t.notes = append(t.notes, fmt.Sprintf("%d bytes after record %d in %s belong to no record: an earlier process "+
			"ended, or the disk was full, in the middle of a write; the next record says so", t.torn.bytes, t.chain.next-1, f.Name()))
	}
	return nil
}

// endsInside reports whether the byte before offset is not the end of a line.
func endsInside(f *os.File, offset int64) (bool, error) {
	if offset == 0 {
		return false, nil
	}
	var before [1]byte
	_, err := f.ReadAt(before[:], offset-1)
	return before[0] != '\n', err
}

// locate returns the offset after the last record of a saved state.
func locate(f *os.File, saved savedState) (offset int64, found bool, err error) {
	if saved.Sequence == 0 {
		return 0, true, nil
	}
	begin := []byte(linePrefix + strconv.FormatUint(saved.Sequence, 10) + ",")
	end := []byte(macPrefix + saved.Previous + lineSuffix)
	const window = 1 << 20
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, false, err
	}
	buffer := make([]byte, window+maxLine+1)
	for at := size; at > 0; {
		from := max(at-window, 0)
		n, err := f.ReadAt(buffer[:min(int64(len(buffer)), size-from)], from)
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, false, err
		}
		if i := bytes.LastIndex(buffer[:n], end); i >= 0 {
			line := buffer[:i+len(end)]
			line = line[bytes.LastIndexByte(line, '\n')+1:]
			if bytes.HasPrefix(line, begin) {
				after := i + len(end)
				if after < n && buffer[after] == '\n' {
					after++
				}
				return from + int64(after), true, nil
			}
		}
		at = from
	}
	return 0, false, nil
}

// startsWith reports whether the first line of f is the next record of c.
func startsWith(f *os.File, c chain) bool {
	line, _, whole, err := newLineReader(io.NewSectionReader(f, 0, 1<<62)).next()
	if err != nil || !whole {
		return false
	}
	s, ok := parseLine(line)
	return ok && c.accept(s)
}

// siblings lists the files that log rotation may have made of path, newest first.
func siblings(path string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	type aged struct {
		name string
		age  int64
	}
	var found []aged
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), filepath.Base(path))
		if !ok || rest == "" || !strings.ContainsAny(rest[:1], ".-_") || !e.Type().IsRegular() {
			continue
		}
		if info, err := e.Info(); err == nil {
			found = append(found, aged{filepath.Join(filepath.Dir(path), e.Name()), info.ModTime().UnixNano()})
		}
	}
	slices.SortFunc(found, func(a, b aged) int { return cmp.Compare(b.age, a.age) })
	names := make([]string, len(found))
	for i, f := range found {
		names[i] = f.name
	}
	return names, nil
}

// lastSequence is the sequence number that the last record of f claims; 0 when
// there is none near its end.
func lastSequence(f *os.File) (uint64, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, err
	}
	from := max(size-4*maxLine, 0)
	end := make([]byte, size-from)
	if _, err := f.ReadAt(end, from); err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	var last uint64
	for line := range bytes.SplitSeq(end, []byte("\n")) {
		if s, ok := parseLine(line); ok {
			last = s.sequence
		}
	}
	return last, nil
}

// lastKept is the last record that the log and the files beside it claim to have.
func lastKept(l *file) (uint64, error) {
	last, err := lastSequence(l.open.Load())
	if err != nil || last > 0 {
		return last, err
	}
	names, err := siblings(l.path)
	for _, name := range names[:min(len(names), maxMoved)] {
		f, openErr := os.Open(name)
		if openErr != nil {
			return 0, openErr
		}
		n, readErr := lastSequence(f)
		if err := errors.Join(readErr, f.Close()); err != nil {
			return 0, err
		}
		last = max(last, n)
	}
	return last, err
}

// maxMoved bounds how many rotated files are searched.
const maxMoved = 8

// findMoved looks for the last record of a saved state in the files that were
// moved away; nil when none has it.
func findMoved(path string, saved savedState) (*os.File, int64, error) {
	names, err := siblings(path)
	if err != nil {
		return nil, 0, fmt.Errorf("look for rotated audit logs: %w", err)
	}
	for _, name := range names[:min(len(names), maxMoved)] {
		f, err := os.Open(name)
		if err != nil {
			return nil, 0, fmt.Errorf("look for rotated audit logs: %w", err)
		}
		offset, found, err := locate(f, saved)
		if err == nil && found {
			return f, offset, nil
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, 0, fmt.Errorf("look for rotated audit logs: %w", err)
		}
	}
	return nil, 0, nil
}

// skipped is the tail after records that cannot be known, from is the first of
// them: the chain goes on beyond every number that may have been used.
func skipped(saved savedState, from uint64, why string) (*tail, error) {
	at, err := saved.chain()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	from = min(from, at.next)
	at.skip(at.next + maxUnsaved)
	return &tail{chain: at, skipped: true, events: []*Record{{
		Kind: KindEvent, Operation: EventGap, Detail: why,
		Log: &LogEvent{GapFrom: from, GapTo: at.next - 1},
	}}}, nil
}
