package identity

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// rawConn finds the socket below c, through wrappers that have NetConn.
func rawConn(c net.Conn) (syscall.RawConn, error) {
	for c != nil {
		if s, ok := c.(syscall.Conn); ok {
			return s.SyscallConn()
		}
		w, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		c = w.NetConn()
	}
	return nil, fmt.Errorf("%T hides its socket, so the kernel cannot be asked who is at its other end; give it a NetConn method", c)
}

// kernelPeer asks the kernel who connected, and where it can for a pidfd of
// that process. The file is nil where the kernel has none to give (before
// Linux 6.5, or for a process that is gone); else it is the caller's to close.
func kernelPeer(raw syscall.RawConn) (Peer, *os.File, error) {
	var peer Peer
	var pidfd *os.File
	var failed error
	err := raw.Control(func(fd uintptr) {
		peer, failed = peerCredentials(int(fd))
		if failed != nil {
			return
		}
		if n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD); err == nil {
			pidfd = os.NewFile(uintptr(n), "pidfd")
		}
	})
	return peer, pidfd, errors.Join(err, failed)
}

// PeerOf asks the kernel who connected the other end of a Unix socket's
// connection.
func PeerOf(c net.Conn) (Peer, error) {
	raw, err := rawConn(c)
	if err != nil {
		return Peer{}, err
	}
	var peer Peer
	var failed error
	err = raw.Control(func(fd uintptr) { peer, failed = peerCredentials(int(fd)) })
	return peer, errors.Join(err, failed)
}

func peerCredentials(fd int) (Peer, error) {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return Peer{}, os.NewSyscallError("getsockopt SO_DOMAIN", err)
	}
	if domain != unix.AF_UNIX {
		return Peer{}, errors.New("the connection is not one of a Unix socket, the only kind whose peers the kernel vouches for")
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return Peer{}, os.NewSyscallError("getsockopt SO_PEERCRED", err)
	}
	if cred.Uid == math.MaxUint32 || cred.Gid == math.MaxUint32 {
		return Peer{}, errors.New("the kernel does not know who connected")
	}
	return Peer{UID: cred.Uid, GID: cred.Gid, PID: max(cred.Pid, 0)}, nil
}

// peekByte returns the connection's first byte and leaves it to be read. It
// waits until the read deadline.
func peekByte(raw syscall.RawConn) (byte, error) {
	var b [1]byte
	var n int
	var failed error
	err := raw.Read(func(fd uintptr) bool {
		for {
			n, _, failed = unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK)
			if !errors.Is(failed, unix.EINTR) {
				return !errors.Is(failed, unix.EAGAIN)
			}
		}
	})
	switch {
	case err != nil:
		return 0, err
	case failed != nil:
		return 0, os.NewSyscallError("recvfrom", failed)
	case n == 0:
		return 0, io.EOF
	}
	return b[0], nil
}

// exited reports whether the process behind a pidfd has ended.
func exited(pidfd *os.File) (bool, error) {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return false, err
	}
	var ended bool
	var failed error
	err = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		var n int
		n, failed = unix.Poll(fds, 0)
		ended = n == 1 && fds[0].Revents&(unix.POLLIN|unix.POLLHUP) != 0
	})
	return ended, errors.Join(err, failed)
}
