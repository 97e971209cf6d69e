package audit

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Rotation says when a log file is set aside, and how long it is kept then. The
// zero value leaves both to others.
type Rotation struct {
	// MaxSize is reached, in bytes, by the last write to a file at the latest;
	// 0 is without bound.
	MaxSize int64
	// MaxAge is how old the first record of a file becomes; 0 is without bound.
	MaxAge time.Duration
	// Retention is how long a file is kept after its rotation; 0 is for ever.
	Retention time.Duration
}

const (
	// rotatedLayout is what a rotated file's name has behind the log's: a dot and
	// the time of its rotation, UTC. Nothing but that is ever deleted.
	rotatedLayout = ".20060102T150405.000000000Z"
	// unfinishedSuffix is that of the next file before it takes its place.
	unfinishedSuffix = ".new"
	// maintainEvery is how often the age of files is looked at, and how soon a
	// failed rotation is tried again.
	maintainEvery = time.Minute
	// maxExpired bounds how many files are deleted at a time.
	maxExpired = 16
)

// due reports whether the file is to be set aside before the next write.
func (l *file) due(now time.Time) bool {
	if l.size == 0 {
		return false
	}
	return l.rotation.MaxSize > 0 && l.size >= l.rotation.MaxSize ||
		l.rotation.MaxAge > 0 && !l.born.IsZero() && now.Sub(l.born) >= l.rotation.MaxAge
}

// rotate sets the file aside and goes on in a new one. The file is durable
// already. Whenever the process is killed, the path names the old file, the new
// one or, for a moment, none; each of them is an ordinary start. On an error
// the file that was open stays so.
func (l *file) rotate(now time.Time) error {
	unfinished := l.path + unfinishedSuffix
	if err := os.Remove(unfinished); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("rotate audit log: %w", err)
	}
	next, err := os.OpenFile(unfinished, os.O_RDWR|os.O_APPEND|os.O_CREATE|os.O_EXCL, l.mode)
	if err != nil {
		return fmt.Errorf("rotate audit log: %w", err)
	}
	err = lock(next)
	if err == nil {
		err = l.swapNames(unfinished, now)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("rotate audit log: %w", err), next.Close())
	}
	return l.take(next, true)
}

// swapNames gives the open file its name as a rotated one, and its own to the
// next.
func (l *file) swapNames(unfinished string, now time.Time) error {
	for {
		rotated := l.path + now.UTC().Format(rotatedLayout)
		err := unix.Renameat2(unix.AT_FDCWD, l.path, unix.AT_FDCWD, rotated, unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
			err = renameUnlessThere(l.path, rotated) // a file system that cannot do it in one step
		}
		if errors.Is(err, fs.ErrExist) {
			now = now.Add(1)
			continue
		}
		if err != nil {
			return err
		}
		return os.Rename(unfinished, l.path)
	}
}

func renameUnlessThere(old, name string) error {
	if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(fs.ErrExist, err)
	}
	return os.Rename(old, name)
}

// rotatedFile is a file that rotate set aside.
type rotatedFile struct {
	name string // with its directory
	at   time.Time
}

// rotatedFiles lists what rotate has made of path, oldest first.
func rotatedFiles(path string) ([]rotatedFile, error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("look for rotated audit logs: %w", err)
	}
	var found []rotatedFile
	for _, e := range entries {
		suffix, ok := strings.CutPrefix(e.Name(), filepath.Base(path))
		at, err := time.Parse(rotatedLayout, suffix)
		if ok && err == nil && e.Type().IsRegular() && at.Format(rotatedLayout) == suffix {
			found = append(found, rotatedFile{filepath.Join(filepath.Dir(path), e.Name()), at})
		}
	}
	slices.SortFunc(found, func(a, b rotatedFile) int { return a.at.Compare(b.at) })
	return found, nil
}

// expired lists the rotated files that need not be kept, oldest first, maxExpired
// at most. Both the time in its name and that of its last write count.
func (l *file) expired(now time.Time) ([]rotatedFile, error) {
	if l.rotation.Retention <= 0 {
		return nil, nil
	}
	files, err := rotatedFiles(l.path)
	if err != nil {
		return nil, err
	}
	var old []rotatedFile
	for _, f := range files {
		info, err := os.Lstat(f.name)
		if err != nil {
			return nil, fmt.Errorf("look at a rotated audit log: %w", err)
		}
		if now.Sub(f.at) > l.rotation.Retention && now.Sub(info.ModTime()) > l.rotation.Retention && len(old) < maxExpired {
			old = append(old, f)
		}
	}
	return old, nil
}

// maintain sets the log aside when it is due and finds what need not be kept.
// What fails here stops no record: it is told, and tried again later.
func (w *writer) maintain() {
	now := w.now()
	lately := now.Sub(w.maintained).Abs() < maintainEvery
	if lately && (w.rotationFailed || !w.file.due(now)) {
		return
	}
	err := w.rotate(now)
	w.maintained, w.rotationFailed = now, err != nil
	w.rotationFault(errors.Join(err, w.expire(now)))
}

func (w *writer) rotate(now time.Time) error {
	if !w.file.due(now) {
		return nil
	}
	if err := w.settle(); err != nil {
		return err
	}
	if err := w.file.rotate(now); err != nil {
		return err
	}
	w.tail.unsealed = false
	return nil
}

// settle makes the open file durable and stores the state: after a crash the
// next file alone is then enough to find the end of the chain.
func (w *writer) settle() error {
	if err := w.file.Sync(); err != nil {
		return err
	}
	return w.saver.flush()
}

// expire puts on record which files are going to be deleted.
func (w *writer) expire(now time.Time) error {
	if len(w.doomed) > 0 {
		return nil
	}
	files, err := w.file.expired(now)
	for _, f := range files {
		first, last, surveyErr := records(f.name)
		if surveyErr != nil || first == 0 {
			// It has the name of a rotated log, but is none.
			err = errors.Join(err, surveyErr)
			continue
		}
		w.tail.events = append(w.tail.events, &Record{Kind: KindEvent, Operation: EventExpired,
			Detail: fmt.Sprintf("the file was rotated %s and is deleted after %v", f.at.Format(time.RFC3339), w.file.rotation.Retention),
			Log:    &LogEvent{File: filepath.Base(f.name), ExpiredFrom: first, ExpiredTo: last}})
		w.doomed = append(w.doomed, f.name)
	}
	return err
}

// bury deletes the files whose records of it are written, once those are durable
// and no start needs the files to find the end of the chain.
func (w *writer) bury() {
	if len(w.doomed) == 0 || len(w.tail.events) > 0 {
		return
	}
	err := w.settle()
	if err == nil {
		for _, name := range w.doomed {
			err = errors.Join(err, os.Remove(name))
		}
	}
	w.doomed = nil
	if err != nil {
		w.rotationFault(fmt.Errorf("delete an expired audit log: %w", err))
	}
}

// records returns the first and the last sequence number that a file claims to
// have; 0 when it holds no record.
func records(name string) (first, last uint64, err error) {
	f, err := os.Open(name)
	if err != nil {
		return 0, 0, err
	}
	first, err = firstSequence(f)
	if err == nil && first > 0 {
		last, err = lastSequence(f)
	}
	return first, max(first, last), errors.Join(err, f.Close())
}

// maxUnclaimed is how many lines at the beginning of a file may be no records.
const maxUnclaimed = 64

func firstSequence(f io.ReaderAt) (uint64, error) {
	lines := newLineReader(io.NewSectionReader(f, 0, 1<<62))
	for range maxUnclaimed {
		line, _, whole, err := lines.next()
		if errors.Is(err, io.EOF) {
			return 0, nil
		}
		if err != nil {
			return 0, err
		}
		if s, ok := parseLine(line); ok && whole {
			return s.sequence, nil
		}
	}
	return 0, nil
}
