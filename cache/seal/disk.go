package seal

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

const (
	lockSuffix = ".lock"
	// staleTemp is the age from which a temporary file was left by a crash.
	staleTemp = time.Minute
)

// readPrivate reads a regular file of at most limit bytes that belongs to this
// process's user or to root and to which nobody else has access. All checks are
// on the opened file.
func readPrivate(path string, limit int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, accessError(err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, accessError(err)
	}
	if err := checkPrivate(path, info); err != nil {
		return nil, err
	}
	if info.Size() > int64(limit) {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are expected: check the path", ErrNotStore, info.Size(), limit)
	}
	b := make([]byte, info.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		clear(b)
		return nil, accessError(err)
	}
	return b, nil
}

func checkPrivate(path string, info fs.FileInfo) error {
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%w: it is not a regular file (%s): check the path", ErrNotStore, info.Mode().Type())
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return fmt.Errorf("%w: mode %04o gives others access: chmod 600 %s", ErrInsecure, perm, path)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || int(st.Uid) != os.Geteuid() && st.Uid != 0 {
		return fmt.Errorf("%w: it does not belong to uid %d, which this process runs as: chown it, or run as its owner", ErrInsecure, os.Geteuid())
	}
	return nil
}

// accessError names the cure of a failed open, stat or read.
func accessError(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		err = path.Err // the caller names the file
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ErrNotExist
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: %w: it must belong to the user this process runs as (uid %d)", ErrAccess, err, os.Geteuid())
	case errors.Is(err, unix.ELOOP):
		return fmt.Errorf("%w: %w: name the file itself, not a symbolic link", ErrAccess, err)
	default:
		return fmt.Errorf("%w: %w: check the disk and the mount", ErrAccess, err)
	}
}

// checkDirectory refuses a directory in which other users can replace the file.
func checkDirectory(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("directory %s: %w", dir, accessError(err))
	}
	if mode := info.Mode(); mode&0o002 != 0 && mode&fs.ModeSticky == 0 {
		return fmt.Errorf("%w: every user can replace files in %s: chmod o-w %s", ErrInsecure, dir, dir)
	}
	return nil
}

// lock makes this process the only one to use path. The lock file stays:
// removing it would let two processes hold two locks.
func lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path+lockSuffix, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock file %s%s: %w", path, lockSuffix, accessError(err))
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: end it (fuser %s%s)", ErrBusy, path, lockSuffix)
		}
		return nil, fmt.Errorf("%w: lock: %w: use a file system with flock", ErrAccess, err)
	}
	return f, nil
}

// writeFile replaces path by a file of mode 0600, atomically and durably: at
// any moment, and after any crash, path is the old file or the new one.
func writeFile(path string, content []byte) error {
	dir := filepath.Dir(path)
	removeStale(dir, filepath.Base(path))
	f, err := renameio.NewPendingFile(path, renameio.WithTempDir(dir), renameio.WithStaticPermissions(0o600))
	if err == nil {
		if _, err = f.Write(content); err == nil {
			err = f.CloseAtomicallyReplace() // with fsync before the rename
		}
		_ = f.Cleanup() // nothing is left to clean after a rename
	}
	if err == nil {
		err = syncDirectory(dir)
	}
	if err != nil {
		return fmt.Errorf("%w: %w: check space and permissions of %s", ErrWrite, err, dir)
	}
	return nil
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
// are sealed, but may still hold keys that were revoked since.
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
