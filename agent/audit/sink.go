package audit

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Sink takes the lines of a log.
type Sink interface {
	// Write hands lines to the kernel and says how many bytes it took, which
	// counts with an error too. Calls do not overlap.
	Write(p []byte) (int, error)
	// Sync makes durable what was written. It may overlap with Write.
	Sync() error
	Close() error
	// String names the sink for people.
	String() string
}

// Stdout is the path that stands for standard output.
const Stdout = "-"

// Stream is a sink that cannot be read back, such as standard output.
type Stream struct {
	f   *os.File
	own bool // Close closes f
}

// NewStream returns a sink that writes to f, which Close leaves open.
func NewStream(f *os.File) *Stream { return &Stream{f: f} }

// openStdout returns a sink for standard output. It writes to a duplicate: a
// process that writes to its descriptor 1 when the reader is gone is killed by
// SIGPIPE, by any other it gets an error.
func openStdout() (*Stream, error) {
	fd, err := unix.FcntlInt(os.Stdout.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("duplicate standard output: %w", err)
	}
	return &Stream{f: os.NewFile(uintptr(fd), "standard output"), own: true}, nil
}

// Write writes to the file.
func (s *Stream) Write(p []byte) (int, error) { return s.f.Write(p) }

// Sync makes what was written durable, where the file can do that.
func (s *Stream) Sync() error {
	err := datasync(s.f)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EROFS) {
		return nil // a pipe, a terminal or a device: nothing to make durable
	}
	return err
}

// Close leaves the file open that NewStream was given.
func (s *Stream) Close() error {
	if s.own {
		return s.f.Close()
	}
	return nil
}

func (s *Stream) String() string { return s.f.Name() }

// file is the sink that can be read back: a regular file, opened anew when it
// was moved away.
type file struct {
	path     string
	mode     os.FileMode
	rotation Rotation
	now      func() time.Time
	open     atomic.Pointer[os.File]

	// For the writer alone.
	device, inode uint64
	size          int64     // where the file ends when nobody else touches it
	born          time.Time // of the first record; zero when there is none
}

// openFile opens and locks the log at path, and creates it empty.
func openFile(path string, mode os.FileMode, r Rotation, now func() time.Time) (*file, error) {
	l := &file{path: path, mode: mode, rotation: r, now: now}
	return l, l.reopen()
}

// reopen turns to the file that stands at the path now.
func (l *file) reopen() error {
	_, err := os.Lstat(l.path)
	created := errors.Is(err, fs.ErrNotExist)
	f, err := os.OpenFile(l.path, os.O_RDWR|os.O_APPEND|os.O_CREATE, l.mode)
	if err != nil {
		return fmt.Errorf("open audit log: %w", err)
	}
	if err := l.take(f, created); err != nil {
		return errors.Join(err, f.Close())
	}
	return nil
}

func (l *file) take(f *os.File, created bool) error {
	if err := lock(f); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("stat audit log %s: %w", l.path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("audit log %s is not a regular file; name a file, or \"-\" for standard output", l.path)
	}
	if created {
		if err := syncDir(filepath.Dir(l.path)); err != nil {
			return fmt.Errorf("store the name of audit log %s: %w", l.path, err)
		}
	}
	if old := l.open.Swap(f); old != nil {
		_ = old.Close() // it was synced before, so that nothing can be lost
	}
	l.device, l.inode, l.size, l.born = st.Dev, st.Ino, st.Size, time.Time{}
	if st.Size > 0 {
		l.born = bornOf(f, time.Unix(st.Mtim.Unix()))
	}
	return nil
}

// bornOf is the time that the first line of f tells, in text or in milliseconds;
// otherwise where it tells none.
func bornOf(f *os.File, otherwise time.Time) time.Time {
	line, _, whole, err := newLineReader(io.NewSectionReader(f, 0, 1<<62)).next()
	var told struct {
		Time json.RawMessage `json:"time"`
	}
	if err != nil || !whole || json.Unmarshal(line, &told) != nil {
		return otherwise
	}
	var at time.Time
	var millis int64
	switch {
	case json.Unmarshal(told.Time, &at) == nil:
		return at
	case json.Unmarshal(told.Time, &millis) == nil:
		return time.UnixMilli(millis)
	}
	return otherwise
}

// look reports whether another file, or none, stands at the path now, and how
// many bytes the open file has lost.
func (l *file) look() (moved bool, lost int64, err error) {
	var st unix.Stat_t
	err = unix.Stat(l.path, &st)
	if errors.Is(err, unix.ENOENT) {
		return true, 0, nil
	}
	if err != nil {
		return false, 0, fmt.Errorf("stat audit log %s: %w", l.path, err)
	}
	if st.Dev != l.device || st.Ino != l.inode {
		return true, 0, nil
	}
	lost = max(l.size-st.Size, 0)
	l.size = st.Size
	return false, lost, nil
}

// Write appends to the file.
func (l *file) Write(p []byte) (int, error) {
	n, err := l.open.Load().Write(p)
	if l.size == 0 && n > 0 {
		l.born = l.now()
	}
	l.size += int64(n)
	return n, err
}

// Sync makes the open file durable. A file that was moved away was synced
// before it was closed, so the next one is tried.
func (l *file) Sync() error {
	for {
		f := l.open.Load()
		err := datasync(f)
		if err != nil && l.open.Load() != f {
			continue
		}
		return err
	}
}

func (l *file) Close() error { return l.open.Load().Close() }

func (l *file) String() string { return l.path }
