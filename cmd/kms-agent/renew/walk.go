package renew

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// maxDepth bounds how deep a tree is walked: each level holds a descriptor.
const maxDepth = 256

// start is a file or directory that the user has named.
type start struct {
	in   *folder // the directory itself, or the one that the file is in
	name string  // of the file; "" for a directory
}

type starts []start

func (s starts) close() {
	for _, one := range s {
		one.in.release()
	}
}

// ErrSymlink is a link to a file that was named: it would become a file.
var ErrSymlink = errors.New("is a symbolic link")

// resolve opens what the user has named. Links to directories are followed, to
// files not: the link would be replaced by a file.
func resolve(paths []string) (starts, error) {
	var all starts
	for _, named := range paths {
		s, err := resolveOne(named)
		if err != nil {
			all.close()
			return nil, err
		}
		all = append(all, s)
	}
	return all, nil
}

func resolveOne(named string) (start, error) {
	absolute, err := filepath.Abs(named)
	if err != nil {
		return start{}, err
	}
	info, err := os.Stat(absolute)
	if err != nil {
		return start{}, err
	}
	if info.IsDir() {
		in, err := openFolder(absolute)
		return start{in: in}, err
	}
	if info, err = os.Lstat(absolute); err != nil {
		return start{}, err
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		return start{}, fmt.Errorf("%s %w; name the file behind it", named, ErrSymlink)
	}
	in, err := openFolder(filepath.Dir(absolute))
	return start{in, filepath.Base(absolute)}, err
}

// job is one regular file that the filter's names take.
type job struct {
	in   *folder
	name string
	was  snapshot
}

func (j job) path() string { return filepath.Join(j.in.path, j.name) }

// walker goes through trees in the order of names.
type walker struct {
	filter *Filter
	found  func(job)
	skip   func(Outcome, int64)
	fail   func(path string, size int64, err error)
}

// all walks everything that was named. It returns early when ctx ends.
func (w *walker) all(ctx context.Context, starts starts) {
	for _, s := range starts {
		switch {
		case ctx.Err() != nil:
			return
		case s.name != "":
			w.entry(ctx, s.in, s.name, s.name, 0)
		default:
			w.folder(ctx, s.in, "", 0)
		}
	}
}

// folder walks one directory; below is its path under the one that was named.
func (w *walker) folder(ctx context.Context, in *folder, below string, depth int) {
	names, err := in.names()
	if err != nil { // what could be read of it is still walked
		w.fail(in.path, 0, fail(ReasonUnreadable, err))
	}
	for _, name := range names {
		if ctx.Err() != nil {
			return
		}
		w.entry(ctx, in, name, path.Join(below, name), depth)
	}
}

func (w *walker) entry(ctx context.Context, in *folder, name, below string, depth int) {
	st, err := in.stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return // removed since the directory was read
	}
	if err != nil {
		w.fail(filepath.Join(in.path, name), 0, fail(ReasonUnreadable, err))
		return
	}
	switch st.kind() {
	case unix.S_IFDIR:
		w.enter(ctx, in, name, below, depth)
	case unix.S_IFREG:
		w.file(job{in, name, st}, below)
	case unix.S_IFLNK:
		w.skip(Symlink, 0)
	default:
		w.skip(Special, 0)
	}
}

func (w *walker) enter(ctx context.Context, in *folder, name, below string, depth int) {
	if w.filter.Flat || w.filter.excludes(below) {
		w.skip(Excluded, 0)
		return
	}
	at := filepath.Join(in.path, name)
	if depth == maxDepth {
		w.fail(at, 0, fail(ReasonUnreadable, fmt.Errorf("it is more than %d directories deep; name it", maxDepth)))
		return
	}
	child, err := in.child(name)
	switch {
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR): // swapped for a link meanwhile
		w.skip(Symlink, 0)
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		w.fail(at, 0, fail(ReasonUnreadable, err))
	default:
		w.folder(ctx, child, below, depth+1)
		child.release()
	}
}

func (w *walker) file(j job, below string) {
	switch {
	case isDraft(j.name):
		w.skip(Leftover, j.was.size)
	case !w.filter.includes(below):
		w.skip(Excluded, j.was.size)
	default:
		w.found(j)
	}
}

// Survey finds out how much there is for a run over the same paths, for its
// Progress. Where it cannot, or ctx ends, that stays unknown.
func Survey(ctx context.Context, o *Options, paths []string) {
	starts, err := resolve(paths)
	if err != nil {
		return // Run says why
	}
	defer starts.close()
	p := o.Progress
	count := func(size int64) {
		p.totalFiles.Add(1)
		p.totalBytes.Add(size)
	}
	w := walker{
		filter: &o.Filter, found: func(j job) { count(j.was.size) },
		skip: func(_ Outcome, size int64) { count(size) }, fail: func(_ string, size int64, _ error) { count(size) },
	}
	w.all(ctx, starts)
	p.counted.Store(ctx.Err() == nil)
}
