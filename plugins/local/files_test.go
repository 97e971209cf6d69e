package local

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// owned is a private regular file of the given user.
type owned struct {
	fs.FileInfo
	uid uint32
}

func (owned) Mode() fs.FileMode { return 0o600 }
func (o owned) Sys() any        { return &syscall.Stat_t{Uid: o.uid} }

func TestOwner(t *testing.T) {
	self := uint32(os.Geteuid())
	for uid, want := range map[uint32]bool{0: true, self: true, self + 1: false, 65534: self == 65534} {
		err := checkPrivate("/x", owned{uid: uid}, ownerOnly)
		if want && err != nil || !want && (!errors.Is(err, ErrInsecure) || !strings.Contains(err.Error(), "run as its owner")) {
			t.Errorf("file of uid %d, process of uid %d: got %v, want ok=%v", uid, self, err, want)
		}
	}
}

func TestAccessErrors(t *testing.T) {
	for _, c := range []struct {
		errno unix.Errno
		want  error
		cure  string
	}{
		{unix.ENOENT, ErrNotExist, "check the path"},
		{unix.EACCES, ErrAccess, "must belong to the user"},
		{unix.ELOOP, ErrAccess, "not a symbolic link"},
		{unix.EIO, ErrAccess, "check the disk"},
	} {
		err := accessError(&fs.PathError{Op: "open", Path: "/secret/path", Err: c.errno})
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.cure) || strings.Contains(err.Error(), "/secret/path") {
			t.Errorf("%v: got %v, want %v and %q", c.errno, err, c.want, c.cure)
		}
	}
}
