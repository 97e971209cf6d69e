package renew

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/kms-agent/kms-agent/client"
)

// Outcome is what became of a file.
type Outcome string

// The outcomes. Only Renewed changes a file; Failed calls for somebody.
const (
	Renewed     Outcome = "renewed"
	WouldRenew  Outcome = "would-renew"  // without DryRun it would be
	Current     Outcome = "current"      // already as it should be
	DoneBefore  Outcome = "done-before"  // the state file says so
	NotSelected Outcome = "not-selected" // another key or version than the filter's
	Excluded    Outcome = "excluded"     // by its name
	Foreign     Outcome = "foreign"      // no message of a kms-agent
	Symlink     Outcome = "symlink"      // never followed
	Special     Outcome = "special"      // a device, pipe or socket
	Leftover    Outcome = "leftover"     // a temporary file of a run that was killed
	Unknown     Outcome = "unknown"      // DryRun could not find out what is current
	Failed      Outcome = "failed"
)

// Outcomes lists all, in the order in which people want them.
func Outcomes() []Outcome {
	return []Outcome{Renewed, WouldRenew, Unknown, Current, DoneBefore, NotSelected, Excluded, Foreign, Symlink, Special, Leftover, Failed}
}

// The reasons of failures that are not the agent's.
const (
	ReasonChanged    = "CHANGED"    // it changed while it was renewed, and was left alone
	ReasonHardLink   = "HARD_LINK"  // it has other names
	ReasonUnreadable = "UNREADABLE" // it cannot be read
	ReasonUnwritable = "UNWRITABLE" // it cannot be replaced
	ReasonDamaged    = "DAMAGED"    // it is a message with a header that cannot be read
	ReasonAttributes = "ATTRIBUTES" // its owner, mode or attributes cannot be kept
	ReasonMismatch   = "MISMATCH"   // the new message is not what it should be
	ReasonVersion    = "VERSION"    // its version cannot be compared
	ReasonUnexpected = "UNEXPECTED" // anything else
)

// fault is an error with a reason.
type fault struct {
	reason string
	err    error
}

func (f *fault) Error() string { return f.err.Error() }
func (f *fault) Unwrap() error { return f.err }

func fail(reason string, err error) error { return &fault{reason, err} }

// Failure is a file that was not renewed.
type Failure struct {
	Path    string `json:"path"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

func failureOf(path string, err error) Failure {
	f := Failure{Path: path, Reason: ReasonUnexpected, Message: err.Error()}
	var known *fault
	var answer *client.Error
	switch {
	case errors.As(err, &known):
		f.Reason, f.Message = known.reason, withoutPath(known.err).Error()
	case errors.As(err, &answer):
		f.Reason, f.Message = reasonOf(answer), answer.Message
		if answer.RequestID != "" {
			f.Message += ", request " + answer.RequestID
		}
	}
	return f
}

// reasonOf is the agent's reason, or why there is none.
func reasonOf(e *client.Error) string {
	switch {
	case e.Reason != "":
		return string(e.Reason)
	case e.Code == codes.Unavailable:
		return string(client.ErrUnreachable)
	case e.Code == codes.DeadlineExceeded:
		return string(client.ErrDeadlineExceeded)
	}
	return fmt.Sprint(e.Code)
}

// withoutPath leaves out the name that stands beside the message anyway.
func withoutPath(err error) error {
	var inPath *fs.PathError
	if errors.As(err, &inPath) {
		return inPath.Err
	}
	return err
}

// noRoom tells whether no other file can be written either.
func noRoom(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// Count is a number of files, and of bytes in them.
type Count struct {
	Files int64 `json:"files"`
	Bytes int64 `json:"bytes"`
}

func (c *Count) add(size int64) {
	c.Files++
	c.Bytes += size
}

// Found counts the messages that were found under one label.
type Found struct {
	Key      string     `json:"key"`
	Wrapping []Wrapping `json:"wrapping_keys"`
	Count
}

// Summary is what a run has done.
type Summary struct {
	DryRun bool              `json:"dry_run"`
	Counts map[Outcome]Count `json:"counts"`
	// Found has the messages as they were before, whether they were meant or not.
	Found []Found `json:"found"`
	// Failures has the first MaxFailures of them.
	Failures []Failure `json:"failures"`
}

// MaxFailures bounds the failures that a Summary has.
const MaxFailures = 20

// tally counts for several workers.
type tally struct {
	mu       sync.Mutex // guards what follows
	counts   map[Outcome]Count
	found    map[Label]Count
	failures []Failure
}

func (t *tally) add(o Outcome, size int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.addLocked(o, size)
}

func (t *tally) addLocked(o Outcome, size int64) {
	if t.counts == nil {
		t.counts = map[Outcome]Count{}
	}
	c := t.counts[o]
	c.add(size)
	t.counts[o] = c
}

func (t *tally) fail(f Failure, size int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.addLocked(Failed, size)
	if len(t.failures) < MaxFailures {
		t.failures = append(t.failures, f)
	}
}

func (t *tally) saw(l Label, size int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.found == nil {
		t.found = map[Label]Count{}
	}
	c := t.found[l]
	c.add(size)
	t.found[l] = c
}

func (t *tally) summary(dry bool) *Summary {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := &Summary{DryRun: dry, Counts: map[Outcome]Count{}, Found: []Found{}, Failures: append([]Failure{}, t.failures...)}
	for o, c := range t.counts {
		s.Counts[o] = c
	}
	for l, c := range t.found {
		s.Found = append(s.Found, Found{l.Key, l.Wrappings(), c})
	}
	slices.SortFunc(s.Found, func(a, b Found) int {
		return cmp.Or(cmp.Compare(a.Key, b.Key), slices.CompareFunc(a.Wrapping, b.Wrapping, func(a, b Wrapping) int {
			return cmp.Or(cmp.Compare(a.URI, b.URI), cmp.Compare(len(a.Version), len(b.Version)), cmp.Compare(a.Version, b.Version))
		}))
	})
	return s
}

// Progress tells other goroutines how far a run is.
type Progress struct {
	files, bytes, failed   atomic.Int64
	totalFiles, totalBytes atomic.Int64
	counted                atomic.Bool
	waiting                atomic.Pointer[string]
}

func (p *Progress) add(size int64) {
	p.files.Add(1)
	p.bytes.Add(size)
}

// Sight is a look at a Progress.
type Sight struct {
	Files  int64 `json:"files"`
	Bytes  int64 `json:"bytes"`
	Failed int64 `json:"failed"`
	// TotalFiles and TotalBytes are what there is, -1 while that is not known.
	TotalFiles int64 `json:"total_files"`
	TotalBytes int64 `json:"total_bytes"`
	// Waiting says what the run waits for; "": for nothing.
	Waiting string `json:"waiting,omitempty"`
}

// Look returns the present state.
func (p *Progress) Look() Sight {
	s := Sight{Files: p.files.Load(), Bytes: p.bytes.Load(), Failed: p.failed.Load(), TotalFiles: -1, TotalBytes: -1}
	if p.counted.Load() {
		s.TotalFiles, s.TotalBytes = p.totalFiles.Load(), p.totalBytes.Load()
	}
	if w := p.waiting.Load(); w != nil {
		s.Waiting = *w
	}
	return s
}
