package agent

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Fault is one thing wrong with a configuration. Its message says how to put it
// right and never repeats a file's content beyond the value at fault.
type Fault struct {
	File string
	// Line and Column count from 1; both are 0 where the fault is not in the
	// file's text (it cannot be read).
	Line, Column int
	// Path is the place in the YAML document, such as keys[0].cache.max_age;
	// empty for the document itself.
	Path    string
	Message string
}

// Error writes file:line:column: path: message.
func (f Fault) Error() string {
	var b strings.Builder
	b.WriteString(f.File)
	if f.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", f.Line, f.Column)
	}
	if f.Path != "" {
		b.WriteString(": " + f.Path)
	}
	b.WriteString(": " + f.Message)
	return b.String()
}

// maxFaults bounds the faults of one file; nobody reads more at once.
const maxFaults = 1000

// Faults are all that is wrong with a configuration, by file and line; of each
// file the first thousand.
type Faults []Fault

// Error writes one fault per line.
func (f Faults) Error() string {
	lines := make([]string, len(f))
	for i := range f {
		lines[i] = f[i].Error()
	}
	return strings.Join(lines, "\n")
}

// err is nil when there is no fault.
func (f Faults) err() error {
	if len(f) == 0 {
		return nil
	}
	return f
}

// sorted is f by place, each fault once.
func (f Faults) sorted() Faults {
	slices.SortStableFunc(f, func(a, b Fault) int {
		return cmp.Or(strings.Compare(a.File, b.File), a.Line-b.Line, a.Column-b.Column, strings.Compare(a.Path, b.Path))
	})
	return slices.Compact(f)
}

// Lengths beyond which a value is shortened in a message, and is not compared
// with known words; and how many of those it is compared with.
const (
	maxQuoted   = 80
	maxGuessed  = 40
	maxCompared = 2000
)

// quote writes text in quotes, shortened.
func quote(text string) string {
	if len(text) > maxQuoted {
		return strconv.Quote(text[:maxQuoted]) + "..."
	}
	return strconv.Quote(text)
}

// nearest returns the known word that text most likely meant, or "".
func nearest(text string, known []string) string {
	best, bestDistance := "", len(text)/3+1
	if len(text) > maxGuessed {
		return ""
	}
	for _, word := range known[:min(len(known), maxCompared)] {
		if d := editDistance(text, word); d <= bestDistance && d < len(word) {
			if d < bestDistance || best == "" {
				best, bestDistance = word, d
			}
		}
	}
	return best
}

// editDistance is Levenshtein's.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next := min(diagonal+cost, row[j]+1, row[j+1]+1)
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}
