package hsm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ownerOnly are the permissions that a secret file must not give.
const ownerOnly fs.FileMode = 0o077

// lockPatience is how long another process may hold a lock.
const lockPatience = 5 * time.Second

// readPrivate reads a regular file that belongs to this process's user or to root
// and gives none of the forbidden permissions. What it says of the file holds for
// what was read.
func readPrivate(path string, forbidden fs.FileMode, into []byte, what string) (int, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.Mode().IsRegular():
		return 0, fmt.Errorf("%s: %s is not a regular file", what, path)
	case info.Mode().Perm()&forbidden != 0:
		return 0, fmt.Errorf("%s: mode %04o gives others access to %s: chmod 600 it, and make a new one if others had it", what, info.Mode().Perm(), path)
	case !ok || owner.Uid != 0 && int(owner.Uid) != os.Geteuid():
		return 0, fmt.Errorf("%s: %s belongs to another user: chown it to the user of the agent or to root", what, path)
	}
	n, err := io.ReadFull(f, into)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	return n, nil
}

// lockFile keeps other processes away until unlock. It waits for them with patience.
func lockFile(path string, patience time.Duration) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(deadline) {
			if errors.Is(err, unix.EWOULDBLOCK) {
				err = ErrHeld
			}
			return nil, errors.Join(err, f.Close())
		}
	}
}

// ErrHeld says that another process holds a lock.
var ErrHeld = errors.New("another process holds it")

// Exclusive keeps other processes of this host away that ask for the same path, until
// unlock; it waits for them until ctx ends, and then fails with ErrHeld. waits is called
// where it has to.
func Exclusive(ctx context.Context, path string, waits func()) (unlock func(), err error) {
	const often = 100 * time.Millisecond
	for first := true; ; first = false {
		if unlock, err = lockFile(path, often); err == nil || !errors.Is(err, ErrHeld) {
			return unlock, err
		}
		if first {
			waits()
		}
		if ctx.Err() != nil {
			return nil, errors.Join(context.Cause(ctx), err)
		}
	}
}

// syncDirectory makes a renamed file last.
func syncDirectory(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// stamp is what changes when a file does, its content, mode or owner.
func stamp(path string) string {
	info, err := os.Stat(path) // through the links of Kubernetes and systemd
	return stampOf(info, err)
}

// stampOf is the stamp of a file that is known already, or of its absence.
func stampOf(info fs.FileInfo, err error) string {
	if err != nil {
		return err.Error()
	}
	var inode uint64
	var changed syscall.Timespec
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		inode, changed = st.Ino, st.Ctim
	}
	return fmt.Sprint(inode, info.Size(), info.ModTime().UnixNano(), changed.Nano())
}
