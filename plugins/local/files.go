package local

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// Permission bits that a private file must not have.
const (
	ownerOnly fs.FileMode = 0o077
	// credentialMode leaves the group's read bit out: systemd grants a
	// service its credential by an ACL, whose mask shows up there.
	credentialMode fs.FileMode = 0o037
)

const (
	lockSuffix  = ".lock"
	lockTimeout = 10 * time.Second
	lockPoll    = 10 * time.Millisecond

	// staleTemp is the age from which a temporary file was left by a crash.
	staleTemp = time.Minute
)

// readPrivate reads a regular file of at most limit bytes that belongs to this
// process's user or to root and has none of the forbidden permission bits. All
// checks are on the opened file. The result is the caller's to clear.
func readPrivate(path string, limit int, forbidden fs.FileMode) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0) //nolint:gosec // the operator names the file, here and by $CREDENTIALS_DIRECTORY
	if err != nil {
		return nil, accessError(err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, accessError(err)
	}
	if err := checkPrivate(path, info, forbidden); err != nil {
		return nil, err
	}
	if info.Size() > int64(limit) {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are expected: check the path", ErrForeign, info.Size(), limit)
	}
	b := make([]byte, limit+1)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		clear(b)
		return nil, accessError(err)
	}
	if n > limit {
		clear(b)
		return nil, fmt.Errorf("%w: more than the %d bytes expected: check the path", ErrForeign, limit)
	}
	return b[:n:n], nil
}

func checkPrivate(path string, info fs.FileInfo, forbidden fs.FileMode) error {
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%w: it is not a regular file (%s): check the path", ErrForeign, info.Mode().Type())
	}
	if perm := info.Mode().Perm(); perm&forbidden != 0 {
		return fmt.Errorf("%w: mode %04o gives others access: chmod 600 %s, and replace the secret if others had it",
			ErrInsecure, perm, path)
	}
	owner, self := owner(info), os.Geteuid()
	if owner != self && owner != 0 {
		return fmt.Errorf("%w: it belongs to uid %d, this process runs as uid %d: chown it, or run as its owner", ErrInsecure, owner, self)
	}
	return nil
}

func owner(info fs.FileInfo) int {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return -1
	}
	return int(st.Uid)
}

// accessError names the cure of a failed open, stat or read.
func accessError(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		err = path.Err // the caller names the file
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: create it, or check the path", ErrNotExist)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: %w: it must belong to the user this process runs as (uid %d)", ErrAccess, err, os.Geteuid())
	case errors.Is(err, unix.ELOOP):
		return fmt.Errorf("%w: %w: name the file itself, not a symbolic link", ErrAccess, err)
	default:
		return fmt.Errorf("%w: %w: check the disk and the mount", ErrAccess, err)
	}
}

// checkDirectory refuses a directory in which any user can replace the file.
func checkDirectory(path string) error {
	dir := filepath.Dir(path)
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("directory %s %w", dir, accessError(err))
	}
	if mode := info.Mode(); mode&0o002 != 0 && mode&fs.ModeSticky == 0 {
		return fmt.Errorf("%w: every user can replace files in %s: chmod o-w %s", ErrInsecure, dir, dir)
	}
	return nil
}

// withLock runs f as the only writer of path on this host. The lock file stays:
// removing it would let two writers hold two locks.
func withLock(path string, f func() error) error {
	lock, err := os.OpenFile(path+lockSuffix, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("lock file %s%s %w", path, lockSuffix, accessError(err))
	}
	defer func() { _ = lock.Close() }() // and with it the lock
	for deadline := time.Now().Add(lockTimeout); ; time.Sleep(lockPoll) {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f()
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("%w: lock: %w: use a file system with flock", ErrWrite, err)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w for more than %s: end it (fuser %s%s) and try again", ErrBusy, lockTimeout, path, lockSuffix)
		}
	}
}

// writeFile replaces path by a file of mode 0600, atomically and durably: at
// any moment, and after any crash, path is the old file or the new one. The
// caller holds the lock.
func writeFile(path string, content []byte) error {
	removeStale(filepath.Dir(path), filepath.Base(path))
	return place(path, content, func(f *renameio.PendingFile) error {
		return f.CloseAtomicallyReplace() // with fsync before the rename
	})
}

// writeNew is writeFile where nothing may be replaced, whoever makes it at the
// same time; it needs no lock. Then the error wraps ErrExists.
func writeNew(path string, content []byte) error {
	err := place(path, content, func(f *renameio.PendingFile) error {
		if err := f.Sync(); err != nil {
			return err
		}
		return os.Link(f.Name(), path) // Cleanup takes the temporary name away
	})
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w: choose another path", ErrExists)
	}
	return err
}

// place writes a temporary file beside path and lets commit put it there.
func place(path string, content []byte, commit func(*renameio.PendingFile) error) error {
	dir := filepath.Dir(path)
	f, err := renameio.NewPendingFile(path, renameio.WithTempDir(dir), renameio.WithStaticPermissions(0o600))
	if err != nil {
		return writeError(dir, err)
	}
	_, err = f.Write(content)
	if err == nil {
		err = commit(f)
	}
	_ = f.Cleanup() // nothing is left to clean after a rename
	if err != nil {
		return writeError(dir, err)
	}
	if err := syncDirectory(dir); err != nil {
		return fmt.Errorf("%w: the change was made but may not survive a power failure: sync %s: %w", ErrWrite, dir, err)
	}
	return nil
}

func writeError(dir string, err error) error {
	return fmt.Errorf("%w: nothing was changed: %w: check space and permissions of %s", ErrWrite, err, dir)
}

func syncDirectory(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	return d.Sync()
}

// removeStale deletes the temporary files that a crash left beside base. They
// are sealed and harmless, but may still hold keys that were destroyed since.
func removeStale(dir, base string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		random, ok := strings.CutPrefix(e.Name(), "."+base)
		if !ok || len(random) < 15 || strings.Trim(random, "0123456789") != "" {
			continue
		}
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() && time.Since(info.ModTime()) > staleTemp {
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}
