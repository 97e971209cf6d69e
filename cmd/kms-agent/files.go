package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// input is where a command reads from.
type input struct {
	*os.File
	// size is how many bytes there are, -1 where that is not known.
	size int64
}

// interruptible does what may block for ever, as opening a named pipe or reading
// a terminal does, and returns early when ctx ends. What then still blocks is
// left behind: the process ends.
func interruptible[T any](ctx context.Context, do func() (T, error)) (T, error) {
	type outcome struct {
		value T
		err   error
	}
	done := make(chan outcome, 1)
	go func() {
		value, err := do()
		done <- outcome{value, err}
	}()
	select {
	case o := <-done:
		return o.value, o.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// openInput opens path, or standard input where path is "" or "-".
func (a *app) openInput(ctx context.Context, path string) (*input, error) {
	file := a.in
	if path != "" && path != "-" {
		var err error
		if file, err = interruptible(ctx, func() (*os.File, error) { return os.Open(path) }); err != nil {
			return nil, err
		}
	}
	in := &input{file, -1}
	info, err := file.Stat()
	switch {
	case err != nil:
		return nil, errors.Join(err, file.Close())
	case info.IsDir():
		return nil, errors.Join(usagef("%s is a directory; name a file", path), file.Close())
	case info.Mode().IsRegular():
		in.size = info.Size()
		if offset, err := file.Seek(0, io.SeekCurrent); err == nil {
			in.size -= min(offset, in.size)
		}
	}
	return in, nil
}

// readInput reads a whole input of at most limit bytes; more is an error that
// names what.
func (a *app) readInput(ctx context.Context, path string, limit int64, what string) ([]byte, error) {
	in, err := a.openInput(ctx, path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = in.Close() }()
	return interruptible(ctx, func() ([]byte, error) { return readAll(in, limit, what) })
}

// readAll reads at most limit bytes.
func readAll(r io.Reader, limit int64, what string) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", what, err)
	}
	if int64(len(data)) > limit {
		clear(data)
		return nil, &codedError{
			code: exitInvalid, err: fmt.Errorf("%s is longer than %d bytes", what, limit),
			hint: "kms-agent encrypt and decrypt take data of any length",
		}
	}
	return data, nil
}

// output is where a command writes to. A file appears whole, at commit, or not
// at all; what goes to a pipe cannot be taken back.
type output struct {
	io.Writer
	pending *renameio.PendingFile // nil: written directly
	path    string
	force   bool
	direct  *os.File // to close, when it is not standard output
	written int64
}

// The modes of files that commands make, before the umask.
const (
	modeSecret fs.FileMode = 0o600
	modePublic fs.FileMode = 0o644
)

// openOutput prepares to write path, or standard output where path is "" or
// "-". Without force an existing file is refused, before anything is read.
func (a *app) openOutput(ctx context.Context, path string, mode fs.FileMode, force bool) (*output, error) {
	if path == "" || path == "-" {
		return &output{Writer: a.out}, nil
	}
	info, err := os.Stat(path)
	switch {
	case err == nil && info.IsDir():
		return nil, usagef("%s is a directory; name a file", path)
	case err == nil && !info.Mode().IsRegular(): // a device or a named pipe
		file, err := interruptible(ctx, func() (*os.File, error) { return os.OpenFile(path, os.O_WRONLY, 0) })
		if err != nil {
			return nil, err
		}
		return &output{Writer: file, direct: file}, nil
	case err == nil && !force:
		return nil, existsError(path)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	pending, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithPermissions(mode))
	if err != nil {
		return nil, cannotMake(path, err)
	}
	return &output{Writer: pending, pending: pending, path: path, force: force}, nil
}

// cannotMake says why there can be no new file at path. The error is that of a
// temporary file, whose name tells nobody anything.
func cannotMake(path string, err error) error {
	dir := filepath.Dir(path)
	err = unnamed(err)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("write %s: the directory %s: %w", path, dir, err)
	}
	return fmt.Errorf("write %s: no file can be made in %s: %w", path, dir, err)
}

// unnamed is what is behind an error of a path.
func unnamed(err error) error {
	var inPath *fs.PathError
	if errors.As(err, &inPath) {
		return inPath.Err
	}
	return err
}

func existsError(path string) error {
	return &codedError{
		code: exitInvalid, hint: "--force replaces it",
		err: fmt.Errorf("%s exists already", path),
	}
}

// Write counts what has gone out.
func (o *output) Write(p []byte) (int, error) {
	n, err := o.Writer.Write(p)
	o.written += int64(n)
	if err != nil && o.pending != nil {
		err = fmt.Errorf("%s: %w", o.path, unnamed(err))
	}
	return n, err
}

// commit makes the output whole and durable.
func (o *output) commit() error {
	switch {
	case o.direct != nil:
		return o.direct.Close()
	case o.pending == nil:
		return nil
	case o.force:
		return o.pending.CloseAtomicallyReplace()
	}
	// A hard link, unlike a rename, never replaces what appeared meanwhile.
	if err := o.pending.Sync(); err != nil {
		return fmt.Errorf("write %s: %w", o.path, err)
	}
	err := os.Link(o.pending.Name(), o.path)
	if errors.Is(err, fs.ErrExist) {
		return existsError(o.path)
	}
	if err != nil {
		return &codedError{code: exitFailure, hint: "where the file system has no hard links, use --force", err: err}
	}
	return errors.Join(o.pending.Cleanup(), syncDir(filepath.Dir(o.path)))
}

// discard removes an output that was not committed. It does nothing after
// commit.
func (o *output) discard() {
	if o.pending != nil {
		_ = o.pending.Cleanup() // the failure that led here is the one to tell
	}
}

// leaked says whether bytes went out that cannot be taken back.
func (o *output) leaked() bool { return o.pending == nil && o.written > 0 }

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// writeOutput writes data as one whole output.
func (a *app) writeOutput(ctx context.Context, path string, mode fs.FileMode, force bool, data []byte) error {
	o, err := a.openOutput(ctx, path, mode, force)
	if err != nil {
		return err
	}
	defer o.discard()
	if _, err := o.Write(data); err != nil {
		return err
	}
	return o.commit()
}
