package identity

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// MaxSocketPath is the longest path of a Unix socket in bytes (sun_path of
// unix(7), less its terminating zero).
const MaxSocketPath = 107

// probeTimeout bounds the look for a live server behind an existing socket.
const probeTimeout = time.Second

// Listen listens on a Unix socket at path, an absolute path of at most
// MaxSocketPath bytes whose directory exists. A gid that is not negative becomes
// the socket's group.
//
// The socket is never more open than mode, whatever the umask, and appears at
// path in one step, with its final mode and group: it is made in a private
// directory beside it and moved.
//
// One process listens at a path at a time: the lock is flock(2) on path+".lock",
// which the kernel gives up with the process. A socket left by a dead process of
// the same user is replaced. A live socket, somebody else's, or anything that is
// no socket is left alone, and refused.
//
// Close removes the socket, unless another has taken its place, and the lock.
// The listener is safe for concurrent use; ctx bounds Listen alone.
func Listen(ctx context.Context, path string, mode fs.FileMode, gid int) (net.Listener, error) {
	if err := checkSocketPath(path, mode); err != nil {
		return nil, fmt.Errorf("listen on %q: %w", path, err)
	}
	l, err := listen(ctx, path, mode, gid)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}

func checkSocketPath(path string, mode fs.FileMode) error {
	switch {
	case !filepath.IsAbs(path) || strings.ContainsRune(path, 0):
		// This refuses abstract sockets ("@name") too: they have no permissions.
		return errors.New("the path of a socket must be absolute")
	case len(path) > MaxSocketPath:
		return fmt.Errorf("the path is %d bytes long and the kernel allows %d; choose a shorter one", len(path), MaxSocketPath)
	case mode&^fs.ModePerm != 0 || mode == 0:
		return fmt.Errorf("%v is no mode for a socket; use one such as 0600 or 0660", mode)
	}
	dir, err := os.Stat(filepath.Dir(path))
	if err != nil {
		return err
	}
	if dir.Mode().Perm()&0o002 != 0 && dir.Mode()&fs.ModeSticky == 0 {
		return fmt.Errorf("everybody may replace files in its directory (mode %v); take that right away, as with chmod o-w", dir.Mode())
	}
	return nil
}

func listen(ctx context.Context, path string, mode fs.FileMode, gid int) (_ net.Listener, err error) {
	lock, err := lockFile(path + ".lock")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = lock.release()
		}
	}()
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	inner, made, err := bind(ctx, path, mode, gid)
	if err != nil {
		return nil, err
	}
	return &listener{UnixListener: inner, path: path, made: made, lock: lock}, nil
}

// removeStale removes a socket that nobody listens on any more.
func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return errors.New("there is something that is no socket; it is not ours to remove")
	}
	var stat unix.Stat_t
	if err := unix.Lstat(path, &stat); err != nil {
		return os.NewSyscallError("lstat", err)
	}
	if int(stat.Uid) != os.Geteuid() {
		return fmt.Errorf("there is a socket of uid %d; it is not ours to remove", stat.Uid)
	}
	dialer := net.Dialer{Timeout: probeTimeout}
	conn, err := dialer.DialContext(ctx, "unix", path)
	if err == nil {
		_ = conn.Close()
		return errors.New("another process is listening there")
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("another process may be listening there: %w", err)
	}
	return os.Remove(path)
}

// bind makes the socket in a private directory and moves it to path.
func bind(ctx context.Context, path string, mode fs.FileMode, gid int) (_ *net.UnixListener, made unix.Stat_t, err error) {
	private, err := os.MkdirTemp(filepath.Dir(path), ".kms-")
	if err != nil {
		return nil, made, err
	}
	defer func() { _ = os.RemoveAll(private) }()
	dir, err := os.Open(private)
	if err != nil {
		return nil, made, err
	}
	defer func() { _ = dir.Close() }()

	// By way of /proc, the private directory does not count to MaxSocketPath.
	config := net.ListenConfig{}
	l, err := config.Listen(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/s", dir.Fd()))
	if err != nil {
		return nil, made, err
	}
	inner := l.(*net.UnixListener)
	inner.SetUnlinkOnClose(false)
	defer func() {
		if err != nil {
			_ = inner.Close()
		}
	}()
	socket := filepath.Join(private, "s")
	if gid >= 0 {
		if err := os.Lchown(socket, -1, gid); err != nil {
			return nil, made, fmt.Errorf("give it to group %d (the agent must be a member, or root): %w", gid, err)
		}
	}
	if err := os.Chmod(socket, mode); err != nil {
		return nil, made, err
	}
	if err := unix.Lstat(socket, &made); err != nil {
		return nil, made, os.NewSyscallError("lstat", err)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, socket, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE); err != nil {
		return nil, made, os.NewSyscallError("renameat2", err)
	}
	return inner, made, nil
}

type listener struct {
	*net.UnixListener
	path string
	made unix.Stat_t
	lock *pathLock

	once sync.Once
	err  error
}

// Addr returns the address that clients use.
func (l *listener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Close stops listening and removes the socket. Later calls return what the
// first returned.
func (l *listener) Close() error {
	l.once.Do(func() {
		// The socket goes first: no client finds one that refuses it.
		l.err = errors.Join(l.unlink(), l.UnixListener.Close(), l.lock.release())
	})
	return l.err
}

func (l *listener) unlink() error {
	var there unix.Stat_t
	err := unix.Lstat(l.path, &there)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case err != nil:
		return os.NewSyscallError("lstat", err)
	case there.Dev != l.made.Dev || there.Ino != l.made.Ino:
		return nil // somebody else's by now
	}
	return os.Remove(l.path)
}

// pathLock is an exclusive lock that lives and dies with the process.
type pathLock struct {
	file *os.File
	path string
}

// lockAttempts bounds the tries against others who remove the lock just then.
const lockAttempts = 100

func lockFile(path string) (*pathLock, error) {
	for range lockAttempts {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		if err := flock(f); err != nil {
			_ = f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("another process listens there (it holds %s)", path)
			}
			return nil, os.NewSyscallError("flock", err)
		}
		if sameFile(f, path) {
			return &pathLock{file: f, path: path}, nil
		}
		// Its holder removed it between our open and our lock: it guards nothing.
		_ = f.Close()
	}
	return nil, fmt.Errorf("%s is being made and removed all the time", path)
}

func flock(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB) })
	return errors.Join(err, failed)
}

func sameFile(f *os.File, path string) bool {
	held, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Lstat(path)
	return err == nil && os.SameFile(held, there)
}

// release removes the file while it is still locked, so that who waits for it
// sees that it is gone.
func (l *pathLock) release() error {
	return errors.Join(os.Remove(l.path), l.file.Close())
}
