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

// PINDescriptor is a PIN in an open file, which somebody opened for this process. A
// regular file, or one in memory, is read from its beginning for each login. A pipe
// gives the PIN once; it stays in locked memory until the process ends.
type PINDescriptor struct {
	name string
	file *os.File // nil where it was a pipe
	said slab     // what the pipe said
}

// OpenPINDescriptor takes file, which it closes where it was a pipe. It waits for the
// pipe's end until ctx ends.
func OpenPINDescriptor(ctx context.Context, file *os.File) (*PINDescriptor, error) {
	d := &PINDescriptor{name: file.Name(), file: file}
	info, err := file.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("the PIN's descriptor %s: %w", d.name, err)
	case info.Mode().IsRegular():
		return d, d.private(info)
	case info.Mode().Type() != fs.ModeNamedPipe:
		return nil, fmt.Errorf("the PIN's descriptor %s is neither a file nor a pipe", d.name)
	}
	d.file = nil
	memory, err := newSlab(maxPIN + 2)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	n, err := readPipe(ctx, int(file.Fd()), memory)
	if err == nil && n == 0 {
		err = errors.New("nothing came through the pipe: did the command that writes it fail? A pipe gives the PIN once: what starts more than once needs a file")
	}
	if err = errors.Join(err, file.Close()); err != nil {
		memory.free()
		return nil, fmt.Errorf("the PIN's descriptor %s: %w", d.name, err)
	}
	d.said = memory[:n]
	return d, nil
}

// private refuses a file that others read by its name. One without a name, in memory
// or removed, has a mode that says nothing.
func (d *PINDescriptor) private(info fs.FileInfo) error {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Nlink == 0 {
		return nil
	}
	if info.Mode().Perm()&ownerOnly != 0 {
		return fmt.Errorf("the PIN's descriptor %s: mode %04o gives others access to its file: chmod 600 it, and make a new PIN if others had it", d.name, info.Mode().Perm())
	}
	return nil
}

// readPipe reads what is written to a pipe until all its writers have closed it, or
// memory is full.
func readPipe(ctx context.Context, fd int, memory slab) (int, error) {
	const slice = 100 * time.Millisecond
	n := 0
	for n < len(memory) {
		if err := ctx.Err(); err != nil {
			return n, fmt.Errorf("nobody has ended the pipe: %w", err)
		}
		ready, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(slice.Milliseconds()))
		if errors.Is(err, unix.EINTR) || err == nil && ready == 0 {
			continue
		}
		if err != nil {
			return n, err
		}
		got, err := unix.Read(fd, memory[n:])
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
		case err != nil:
			return n, err
		case got == 0:
			return n, nil
		default:
			n += got
		}
	}
	return n, nil
}

// copyTo reads the PIN.
func (d *PINDescriptor) copyTo(memory slab) (int, error) {
	if d.file == nil {
		return copy(memory, d.said), nil
	}
	info, err := d.file.Stat()
	if err == nil {
		err = d.private(info)
	}
	if err != nil {
		return 0, err
	}
	// The offset is shared with the agent and with other processes of the plugin.
	n, err := d.file.ReadAt(memory, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("the PIN's descriptor %s: %w", d.name, err)
	}
	return n, nil
}

// stamp is what changes when the PIN does. That of a pipe never does.
func (d *PINDescriptor) stamp() string {
	if d.file == nil {
		return ""
	}
	return stampOf(d.file.Stat())
}
