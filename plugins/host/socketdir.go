package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// dirPattern is short because addresses of sockets are (maxRuntimeDir).
const dirPattern = "plugin-"

// dirAttempts is how many directories may be taken away while they are made.
const dirAttempts = 16

var errTaken = errors.New("taken away by another agent with the same runtime directory")

// socketDir is the private directory of one plugin's socket. Its lock ends with
// the host, however that ends.
type socketDir struct {
	path string
	lock *os.File
}

// newSocketDir makes a directory below parent, and removes those that hosts
// which were killed have left there. It waits for nobody: other users, who may
// be able to open parent, could hold a lock on it for ever.
func newSocketDir(parent string) (*socketDir, error) {
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, fmt.Errorf("runtime directory: %w", err)
	}
	removeStale(parent)
	var err error
	for range dirAttempts {
		var dir *socketDir
		if dir, err = makeLocked(parent); err == nil {
			return dir, nil
		}
		if !errors.Is(err, errTaken) {
			break
		}
	}
	return nil, fmt.Errorf("directory of the plugin's socket: %w", err)
}

// makeLocked makes a directory and locks it. Another host that starts at this
// very time may take it for a stale one in between: then the error is errTaken.
func makeLocked(parent string) (*socketDir, error) {
	path, err := os.MkdirTemp(parent, dirPattern)
	if err != nil {
		return nil, err
	}
	lock, err := lockDir(path)
	switch {
	case errors.Is(err, unix.EWOULDBLOCK), errors.Is(err, fs.ErrNotExist):
		return nil, errTaken
	case err != nil:
		return nil, errors.Join(err, os.Remove(path))
	case !names(path, lock):
		return nil, errors.Join(errTaken, lock.Close())
	}
	return &socketDir{path: path, lock: lock}, nil
}

// names tells whether path is still the opened directory.
func names(path string, dir *os.File) bool {
	opened, err := dir.Stat()
	if err != nil {
		return false
	}
	there, err := os.Lstat(path)
	return err == nil && os.SameFile(there, opened)
}

// removeStale removes what it can: what stays behind harms nobody.
func removeStale(parent string) {
	dirs, err := filepath.Glob(filepath.Join(parent, dirPattern+"[0-9]*"))
	if err != nil {
		return
	}
	for _, path := range dirs {
		if lock, err := lockDir(path); err == nil {
			_ = os.RemoveAll(path)
			_ = lock.Close()
		}
	}
}

func lockDir(path string) (*os.File, error) {
	dir, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), dir.Close())
	}
	return dir, nil
}

func (d *socketDir) remove() error {
	if err := errors.Join(os.RemoveAll(d.path), d.lock.Close()); err != nil {
		return fmt.Errorf("remove the directory of the plugin's socket: %w", err)
	}
	return nil
}
