package renew

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// folder is an open directory. Its methods take the name of one entry, never a
// path, and follow no symbolic link: whoever may write to the directory can make
// them fail, and cannot lead them elsewhere.
type folder struct {
	dir *os.File
	// path is how the user knows it, absolute.
	path string
	// users counts who still needs it; the last one closes it.
	users atomic.Int32
}

func newFolder(fd int, path string) *folder {
	f := &folder{dir: os.NewFile(uintptr(fd), path), path: path}
	f.users.Store(1)
	return f
}

const openFolderFlags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC

// openFolder opens a directory that the user has named, by whatever links.
func openFolder(path string) (*folder, error) {
	fd, err := retried(func() (int, error) { return unix.Open(path, openFolderFlags, 0) })
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return newFolder(fd, path), nil
}

// child opens a directory in f.
func (f *folder) child(name string) (*folder, error) {
	fd, err := f.openat(name, openFolderFlags|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	return newFolder(fd, filepath.Join(f.path, name)), nil
}

func (f *folder) retain() { f.users.Add(1) }

func (f *folder) release() {
	if f.users.Add(-1) == 0 {
		_ = f.dir.Close() // nothing was written to it
	}
}

func (f *folder) fd() int { return int(f.dir.Fd()) }

// names lists the entries, sorted. All are read before any is looked at, so that
// what the run itself makes does not come up.
func (f *folder) names() ([]string, error) {
	names, err := f.dir.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

func (f *folder) openat(name string, flags int, mode uint32) (int, error) {
	fd, err := retried(func() (int, error) { return unix.Openat(f.fd(), name, flags, mode) })
	if err != nil {
		return -1, &fs.PathError{Op: "open", Path: filepath.Join(f.path, name), Err: err}
	}
	return fd, nil
}

// open opens a file for reading. It does not wait for the other end of what has
// become a pipe.
func (f *folder) open(name string) (*os.File, error) {
	fd, err := f.openat(name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), filepath.Join(f.path, name)), nil
}

// stat looks at an entry, which may be a symbolic link itself.
func (f *folder) stat(name string) (snapshot, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(f.fd(), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return snapshot{}, &fs.PathError{Op: "stat", Path: filepath.Join(f.path, name), Err: err}
	}
	return snapshotOf(&st), nil
}

// remove removes an entry if it still is that file.
func (f *folder) remove(name string, file snapshot) error {
	now, err := f.stat(name)
	if err != nil {
		return err
	}
	if !now.sameFile(file) {
		return errChanged
	}
	return unix.Unlinkat(f.fd(), name, 0)
}

func retried(do func() (int, error)) (int, error) {
	for {
		n, err := do()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// snapshot is what a file was when it was looked at.
type snapshot struct {
	dev, ino     uint64
	size         int64
	mode, links  uint32
	uid, gid     uint32
	atime, mtime unix.Timespec
	ctime        unix.Timespec
}

func snapshotOf(st *unix.Stat_t) snapshot {
	return snapshot{
		dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mode: st.Mode, links: uint32(min(uint64(st.Nlink), 1<<30)), //nolint:unconvert // their sizes differ between architectures
		uid: st.Uid, gid: st.Gid, atime: st.Atim, mtime: st.Mtim, ctime: st.Ctim,
	}
}

func snapshotFile(file *os.File) (snapshot, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return snapshot{}, &fs.PathError{Op: "stat", Path: file.Name(), Err: err}
	}
	return snapshotOf(&st), nil
}

func (s snapshot) kind() uint32 { return s.mode & unix.S_IFMT }

func (s snapshot) sameFile(o snapshot) bool { return s.dev == o.dev && s.ino == o.ino }

// sameContent tells whether o is the same file with what it had.
func (s snapshot) sameContent(o snapshot) bool {
	return s.sameFile(o) && s.kind() == o.kind() && s.size == o.size && s.mtime == o.mtime
}

// same tells whether nothing of the file has changed, its attributes neither. A
// file with other names changes also when one of those goes.
func (s snapshot) same(o snapshot) bool {
	return s.sameContent(o) && (s.ctime == o.ctime || s.links > 1 && s.mode == o.mode && s.uid == o.uid && s.gid == o.gid)
}
