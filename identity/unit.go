package identity

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// noUnit stands for a process that is in no unit. No unit has this name.
const noUnit = "-"

// maxUnitName is systemd's bound of a unit's name in bytes (UNIT_NAME_MAX less
// its terminating zero).
const maxUnitName = 255

// CheckUnit says what is wrong with the name of a unit that a StaticPeer gives:
// it must be that of a service or scope, as systemctl writes it.
func CheckUnit(name string) error {
	switch {
	case !isUnitName(name) || (!strings.HasSuffix(name, ".service") && !strings.HasSuffix(name, ".scope")):
		return fmt.Errorf("%q is no name of a service or scope; write it as systemctl does, such as orders.service or worker@1.service", name)
	case strings.HasSuffix(strings.TrimSuffix(name, ".service"), "@"):
		return fmt.Errorf("%q is a template, in which no process is; write an instance, such as %s", name, strings.Replace(name, "@", "@1", 1))
	}
	return nil
}

// isUnitName says whether name can be that of a unit: what unit_name_is_valid of
// systemd takes.
func isUnitName(name string) bool {
	dot := strings.LastIndexByte(name, '.')
	if dot <= 0 || len(name) > maxUnitName || name[0] == '@' {
		return false
	}
	switch name[dot+1:] {
	case "service", "scope", "slice", "socket", "mount", "swap", "automount", "device", "path", "target", "timer":
	default:
		return false
	}
	return !strings.ContainsFunc(name, func(r rune) bool {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		return !letter && !strings.ContainsRune(`:-_.\@`, r)
	})
}

// unitOf returns the system manager's unit of the process behind pidfd; noUnit
// when it is in none.
//
// The process may end at any moment, and its number be given to another. The
// number is therefore taken from the pidfd, as this /proc counts, and what is read
// by it is believed only when the process lives on after that.
func unitOf(pidfd *os.File) (string, error) {
	if pidfd == nil {
		return "", errors.New("the kernel gives no handle of the process that connected, because it has ended or because Linux is older than 6.5")
	}
	if err := hostCgroups(); err != nil {
		return "", err
	}
	pid, err := pidOf(pidfd)
	if err != nil {
		return "", err
	}
	path, err := cgroupOf(pid)
	if err != nil {
		return "", err
	}
	if ended, err := exited(pidfd); err != nil || ended {
		return "", errors.Join(errors.New("the process that connected has ended"), err)
	}
	return unitFromCgroup(path), nil
}

// hostCgroupNamespace is the name of the first cgroup namespace
// (PROC_CGROUP_INIT_INO of the kernel).
const hostCgroupNamespace = "cgroup:[4026531835]"

// hostCgroups fails where paths of cgroups do not begin at the host's root: who
// can make cgroups below another root can give them any name.
func hostCgroups() error {
	namespace, err := os.Readlink("/proc/self/ns/cgroup")
	if err == nil && namespace != hostCgroupNamespace {
		err = errors.New("the agent is in a cgroup namespace of its own, where units cannot be told; run it in that of the host")
	}
	return err
}

// pidOf returns the number of the process behind a pidfd in the PID namespace of
// /proc, which may be another than the agent's own.
func pidOf(pidfd *os.File) (int, error) {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return 0, err
	}
	var info []byte
	var failed error
	err = raw.Control(func(fd uintptr) { info, failed = readProc(fmt.Sprintf("/proc/self/fdinfo/%d", fd)) })
	if err := errors.Join(err, failed); err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(info)) {
		if text, ok := strings.CutPrefix(line, "Pid:"); ok {
			pid, err := strconv.Atoi(strings.TrimSpace(text))
			if err == nil && pid <= 0 {
				err = errors.New("the process that connected has ended, or is outside of the agent's PID namespace")
			}
			return pid, err
		}
	}
	return 0, errors.New("the kernel does not say which process connected")
}

// cgroupOf returns the path of a process's cgroup in the unified hierarchy.
func cgroupOf(pid int) (string, error) {
	all, err := readProc(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", err
	}
	return unifiedCgroup(all)
}

// unifiedCgroup finds the path in what /proc/PID/cgroup says (cgroups(7)).
func unifiedCgroup(all []byte) (string, error) {
	lines := bufio.NewScanner(bytes.NewReader(all))
	lines.Buffer(nil, len(all)+1)
	for lines.Scan() {
		if path, ok := strings.CutPrefix(lines.Text(), "0::"); ok {
			return path, nil
		}
	}
	return "", errors.New("the host has no unified cgroup hierarchy (cgroup v2), by which units are told")
}

// maxProc bounds what is read of one file of /proc. A path of a cgroup has 4096
// bytes at most, and there are a dozen hierarchies.
const maxProc = 128 << 10

func readProc(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxProc+1))
	if err == nil && len(b) > maxProc {
		err = fmt.Errorf("%s is longer than %d bytes", path, maxProc)
	}
	return b, err
}

// unitFromCgroup returns the unit of the system's service manager that a cgroup
// belongs to: the first component of its path that is no slice. What comes below
// was made by the unit itself, to which it was delegated, under any names that it
// liked. Only root, and the manager, make cgroups above.
func unitFromCgroup(path string) string {
	rest, ok := strings.CutPrefix(path, "/")
	if !ok {
		return noUnit
	}
	for part := range strings.SplitSeq(rest, "/") {
		// systemd escapes names that the kernel could mean by one underscore.
		name := strings.TrimPrefix(part, "_")
		switch {
		case !isUnitName(name):
			return noUnit
		case !strings.HasSuffix(name, ".slice"):
			return name
		}
	}
	return noUnit
}
