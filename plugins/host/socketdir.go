package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// dirPattern is short because addresses of sockets are (maxRuntimeDir).
const dirPattern = "plugin-"

// socketDir is the private directory of one plugin's socket. Its lock ends with
// the host, however that ends.
type socketDir struct {
	path string
	lock *os.File
}

// newSocketDir makes a directory below parent, and removes those that hosts
// which were killed have left there.
func newSocketDir(parent string) (*socketDir, error) {
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, fmt.Errorf("runtime directory: %w", err)
	}
	guard, err := os.Open(parent)
	if err != nil {
		return nil, fmt.Errorf("runtime directory: %w", err)
	}
	defer func() { _ = guard.Close() }() // and with it the lock
	if err := unix.Flock(int(guard.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock the runtime directory: %w", err)
	}
	removeStale(parent)
	path, err := os.MkdirTemp(parent, dirPattern)
	if err != nil {
		return nil, fmt.Errorf("directory of the plugin's socket: %w", err)
	}
	lock, err := lockDir(path)
	if err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	return &socketDir{path: path, lock: lock}, nil
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
