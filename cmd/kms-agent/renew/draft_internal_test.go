package renew

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// place is a directory with one file that was read, and a draft to replace it.
type place struct {
	in     *folder
	source *os.File
	was    snapshot
	d      *draft
}

func newPlace(t *testing.T) *place {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("old"), 0o640); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 { // others can give nothing away
		if err := os.Chown(filepath.Join(dir, "file"), 12345, 23456); err != nil {
			t.Fatal(err)
		}
	}
	in, err := openFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(in.release)
	was, err := in.stat("file")
	if err != nil {
		t.Fatal(err)
	}
	source, was, err := job{in, "file", was}.open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = source.Close() })
	d, err := in.draft()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Write([]byte("new")); err != nil {
		t.Fatal(err)
	}
	return &place{in, source, was, d}
}

// holds fails unless the file has this content and the directory nothing else.
func (p *place) holds(t *testing.T, want string) {
	t.Helper()
	p.d.discard()
	if got, err := os.ReadFile(filepath.Join(p.in.path, "file")); err != nil || string(got) != want {
		t.Errorf("the file holds %q, %v, want %q", got, err, want)
	}
	if names, err := os.ReadDir(p.in.path); err != nil || len(names) != 1 {
		t.Errorf("the directory has %v, %v, want the file alone", names, err)
	}
}

func TestReplace(t *testing.T) {
	p := newPlace(t)
	if err := p.d.dress(p.was, p.source, true); err != nil {
		t.Fatal(err)
	}
	is, err := p.d.replace("file", p.was, p.source)
	if err != nil {
		t.Fatal(err)
	}
	if is.sameFile(p.was) || is.mode != p.was.mode || is.uid != p.was.uid || is.gid != p.was.gid || is.mtime != p.was.mtime {
		t.Errorf("new file %+v of old %+v", is, p.was)
	}
	p.holds(t, "new")
}

func TestDiscardedDraftLeavesNothing(t *testing.T) {
	newPlace(t).holds(t, "old")
}

// TestChangeInTheLastMoment: what takes the name between the last look and the
// exchange is put back.
func TestChangeInTheLastMoment(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"replaced": func(path string) error {
			return errors.Join(os.WriteFile(path+".new", []byte("newer"), 0o600), os.Rename(path+".new", path))
		},
		"written to": func(path string) error { return os.WriteFile(path, []byte("newer"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			if err := errors.Join(p.d.link(), change(filepath.Join(p.in.path, "file"))); err != nil {
				t.Fatal(err)
			}
			if err := p.d.exchange("file", p.was, p.source); !errors.Is(err, errChanged) {
				t.Errorf("error %v, want %v", err, errChanged)
			}
			p.holds(t, "newer")
		})
	}
	t.Run("removed", func(t *testing.T) {
		p := newPlace(t)
		if err := errors.Join(p.d.link(), os.Remove(filepath.Join(p.in.path, "file"))); err != nil {
			t.Fatal(err)
		}
		if err := p.d.exchange("file", p.was, p.source); !errors.Is(err, errChanged) {
			t.Errorf("error %v, want %v", err, errChanged)
		}
		p.d.discard()
		if names, err := os.ReadDir(p.in.path); err != nil || len(names) != 0 {
			t.Errorf("the directory has %v, %v, want nothing", names, err)
		}
	})
}

// TestNamedDraft is what file systems without files without names get.
func TestNamedDraft(t *testing.T) {
	p := newPlace(t)
	p.d.discard()
	d, err := p.in.namedDraft()
	if err != nil {
		t.Fatal(err)
	}
	p.d = d
	if !isDraft(d.name) {
		t.Errorf("the draft is called %q, which a later run would take for a file", d.name)
	}
	if _, err := d.Write([]byte("new")); err != nil {
		t.Fatal(err)
	}
	if _, err := d.replace("file", p.was, p.source); err != nil {
		t.Fatal(err)
	}
	p.holds(t, "new")
}

// TestAttributes: the owner's stay, and the directory adds none.
func TestAttributes(t *testing.T) {
	p := newPlace(t)
	want := "kept"
	if err := unix.Fsetxattr(int(p.source.Fd()), "user.note", []byte(want), 0); errors.Is(err, unix.ENOTSUP) {
		want = "" // a file system without attributes has none to keep
	} else if err != nil {
		t.Fatal(err)
	}
	p.was, _ = snapshotFile(p.source)
	if err := p.d.dress(p.was, p.source, false); err != nil {
		t.Fatal(err)
	}
	value := make([]byte, 10)
	n, err := unix.Fgetxattr(int(p.d.file.Fd()), "user.note", value)
	if got := string(value[:max(n, 0)]); got != want || want != "" && err != nil {
		t.Errorf("attribute %q, %v, want %q", got, err, want)
	}
	p.holds(t, "old")
}
