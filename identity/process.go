package identity

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// process is one that connected, and what else the kernel says of it, asked for
// when it is first wanted. It is not safe for concurrent use.
type process struct {
	peer      Peer
	pidfd     *os.File // nil where the kernel has none
	transport net.Conn

	groups      []uint32
	groupsKnown bool
	unit        string
}

// memberOf asks for the groups as of connect(2).
func (p *process) memberOf(group uint32) (bool, error) {
	if p.peer.GID == group {
		return true, nil
	}
	if !p.groupsKnown {
		raw, err := rawConn(p.transport)
		if err != nil {
			return false, err
		}
		var failed error
		err = raw.Control(func(fd uintptr) { p.groups, failed = peerGroups(fd) })
		if err := errors.Join(err, failed); err != nil {
			return false, fmt.Errorf("its groups are not known: %w", err)
		}
		p.groupsKnown = true
	}
	return slices.Contains(p.groups, group), nil
}

// systemUnit asks for the unit as of now.
func (p *process) systemUnit() (string, error) {
	if p.unit == "" {
		unit, err := unitOf(p.pidfd)
		if err != nil {
			return "", fmt.Errorf("its unit is not known: %w", err)
		}
		p.unit = unit
	}
	return p.unit, nil
}

// unitText is the unit for an error message, where it was asked for.
func (p *process) unitText() string {
	switch p.unit {
	case "":
		return ""
	case noUnit:
		return ", in no unit"
	default:
		return ", unit " + p.unit
	}
}

// maxGroups is the kernel's own bound of a process's groups (NGROUPS_MAX).
const maxGroups = 65536

// peerGroups returns the supplementary groups of who connected, as of then
// (SO_PEERGROUPS, Linux 4.13). A user has few groups as a rule; the kernel says
// when there is too little room.
func peerGroups(fd uintptr) ([]uint32, error) {
	groups := make([]uint32, 64)
	for {
		room := uint32(len(groups) * 4)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&room)), 0) //nolint:gosec // x/sys has no wrapper
		switch {
		case errno == 0 && int(room) <= len(groups)*4:
			return groups[:room/4], nil
		case errno == unix.ERANGE && int(room) > len(groups)*4 && room <= maxGroups*4:
			groups = make([]uint32, room/4)
		default:
			return nil, os.NewSyscallError("getsockopt SO_PEERGROUPS", errno)
		}
	}
}
