package renew

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// errChanged is a file that is not the one that was read any more.
var errChanged = errors.New("it changed while it was being renewed")

// draftPrefix begins the names of drafts, and of old messages in the moment
// before they are removed.
const draftPrefix = ".kms-agent-renew-"

func isDraft(name string) bool { return strings.HasPrefix(name, draftPrefix) }

// draft is a new file that has no name yet, where the file system has such: what
// was not finished is then gone with the process.
type draft struct {
	in   *folder
	file *os.File
	name string // "" while it has none
}

// draft makes an empty file in the directory, which nobody else can open. The
// caller discards it.
func (f *folder) draft() (*draft, error) {
	fd, err := f.openat(".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		d := &draft{in: f, file: os.NewFile(uintptr(fd), f.path)}
		if _, err := os.Stat(d.handle()); err == nil {
			return d, nil
		}
		_ = d.file.Close() // without /proc it could get no name
	}
	return f.namedDraft()
}

// namedDraft makes a draft with a name, of which a process that is killed leaves
// something behind.
func (f *folder) namedDraft() (*draft, error) {
	name := draftPrefix + rand.Text()
	fd, err := f.openat(name, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fail(ReasonUnwritable, fmt.Errorf("no file can be made in %s: %w", f.path, withoutPath(err)))
	}
	return &draft{f, os.NewFile(uintptr(fd), filepath.Join(f.path, name)), name}, nil
}

// handle is the draft's name in /proc.
func (d *draft) handle() string { return fmt.Sprintf("/proc/self/fd/%d", d.file.Fd()) }

// discard closes the draft, and removes it unless it is in use by now.
func (d *draft) discard() {
	if d.name != "" {
		if st, err := snapshotFile(d.file); err == nil {
			_ = d.in.remove(d.name, st) // what led here is the failure to tell
		}
	}
	_ = d.file.Close()
}

// restart forgets what was written.
func (d *draft) restart() error {
	if err := d.file.Truncate(0); err != nil {
		return fail(ReasonUnwritable, err)
	}
	_, err := d.file.Seek(0, 0)
	return err
}

// Write writes to the file.
func (d *draft) Write(p []byte) (int, error) {
	n, err := d.file.Write(p)
	if err != nil {
		err = fail(ReasonUnwritable, withoutPath(err))
	}
	return n, err
}

// replace puts the draft in the place of the file that was read, or leaves that
// alone: with errChanged where it is not the one that was read any more. It
// returns what the new file is.
func (d *draft) replace(name string, was snapshot, source *os.File) (snapshot, error) {
	if err := d.file.Sync(); err != nil {
		return snapshot{}, fail(ReasonUnwritable, withoutPath(err))
	}
	if err := d.link(); err != nil {
		return snapshot{}, fail(ReasonUnwritable, err)
	}
	if now, err := d.in.stat(name); err != nil || !was.same(now) {
		return snapshot{}, fail(ReasonChanged, errors.Join(errChanged, err))
	}
	if err := d.exchange(name, was, source); err != nil {
		return snapshot{}, err
	}
	made, err := snapshotFile(d.file)
	if err != nil {
		return snapshot{}, err
	}
	if now, err := d.in.stat(name); err != nil || !now.sameFile(made) {
		return snapshot{}, fail(ReasonChanged, errors.Join(errChanged, err))
	}
	if err := d.in.dir.Sync(); err != nil {
		return snapshot{}, fail(ReasonUnwritable, err)
	}
	return made, nil
}

// link gives the draft a name.
func (d *draft) link() error {
	if d.name != "" {
		return nil
	}
	name := draftPrefix + rand.Text()
	if err := unix.Linkat(unix.AT_FDCWD, d.handle(), d.in.fd(), name, unix.AT_SYMLINK_FOLLOW); err != nil {
		return err
	}
	d.name = name
	return nil
}

// exchange swaps the draft with the file and then looks at what it got: so
// nothing is lost that took the name in the last moment. File systems without
// that get a rename.
func (d *draft) exchange(name string, was snapshot, source *os.File) error {
	err := d.swap(name)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) {
		if err = unix.Renameat(d.in.fd(), d.name, d.in.fd(), name); err == nil {
			d.name = ""
		}
	} else if err == nil {
		return d.settle(name, was, source)
	}
	if errors.Is(err, unix.ENOENT) {
		return fail(ReasonChanged, errChanged)
	}
	if err != nil {
		return fail(ReasonUnwritable, err)
	}
	return nil
}

func (d *draft) swap(name string) error {
	return unix.Renameat2(d.in.fd(), d.name, d.in.fd(), name, unix.RENAME_EXCHANGE)
}

// settle removes the old message, which has the draft's name now, or swaps back
// where it is not the one that was read.
func (d *draft) settle(name string, was snapshot, source *os.File) error {
	old, err := d.in.stat(d.name)
	read, readErr := snapshotFile(source)
	if err == nil && readErr == nil && old.sameContent(was) && read.sameContent(was) {
		err = d.in.remove(d.name, was)
		d.name = ""
		if err != nil {
			return fail(ReasonUnwritable, fmt.Errorf("it is renewed, and the old message cannot be removed: %w", err))
		}
		return nil
	}
	if err := d.swap(name); err != nil {
		left := d.name
		d.name = "" // it may be the only copy of what somebody wrote
		return fail(ReasonChanged, fmt.Errorf("%w, and what it is now is left as %s: %w", errChanged, left, err))
	}
	return fail(ReasonChanged, errors.Join(errChanged, err, readErr))
}

// dress gives the draft the owner, mode and attributes of the file that was
// read, and its times where they are to be kept.
func (d *draft) dress(was snapshot, source *os.File, times bool) error {
	fd := int(d.file.Fd())
	now, err := snapshotFile(d.file)
	if err != nil {
		return err
	}
	if now.uid != was.uid || now.gid != was.gid {
		if err := unix.Fchown(fd, chosen(now.uid, was.uid), chosen(now.gid, was.gid)); err != nil {
			return fail(ReasonAttributes, fmt.Errorf("its owner %d:%d cannot be kept: %w", was.uid, was.gid, err))
		}
	}
	// What the directory gives to new files is not the old file's.
	if err := unix.Fremovexattr(fd, accessList); err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP) {
		return fail(ReasonAttributes, fmt.Errorf("its access list cannot be kept: %w", err))
	}
	if err := unix.Fchmod(fd, was.mode&0o777); err != nil {
		return fail(ReasonAttributes, fmt.Errorf("its mode cannot be kept: %w", err))
	}
	if err := copyAttributes(int(source.Fd()), fd); err != nil {
		return fail(ReasonAttributes, err)
	}
	if !times {
		return nil
	}
	when := []unix.Timespec{was.atime, was.mtime}
	if err := unix.UtimesNanoAt(fd, "", when, unix.AT_EMPTY_PATH); err != nil {
		// Kernels before 5.8 know no empty path here.
		if err = unix.UtimesNanoAt(unix.AT_FDCWD, d.handle(), when, 0); err != nil {
			return fail(ReasonAttributes, fmt.Errorf("its times cannot be kept: %w", err))
		}
	}
	return nil
}

const accessList = "system.posix_acl_access"

// chosen is -1, which changes nothing, where an ID is right already.
func chosen(now, want uint32) int {
	if now == want {
		return -1
	}
	return int(want)
}

// copyAttributes copies what the owner and access lists have added to a file.
func copyAttributes(from, to int) error {
	list := make([]byte, 64<<10)
	n, err := unix.Flistxattr(from, list)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("its attributes cannot be read: %w", err)
	}
	value := make([]byte, 64<<10)
	for _, raw := range bytes.Split(list[:n], []byte{0}) {
		name := string(raw)
		if !strings.HasPrefix(name, "user.") && name != accessList && name != "security.selinux" {
			continue
		}
		size, err := unix.Fgetxattr(from, name, value)
		if err == nil {
			err = unix.Fsetxattr(to, name, value[:size], 0)
		}
		if err != nil {
			return fmt.Errorf("its attribute %s cannot be kept: %w", name, err)
		}
	}
	return nil
}
