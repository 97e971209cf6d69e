package plugins

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// Harden takes from the process what a holder of keys has no use for: core dumps,
// being read by other processes of its user, new privileges, files that others read,
// and handing on the descriptors that it was handed. It may execute the program again,
// so it comes first in main. Serve does it by itself. The kernel
// resets PR_SET_DUMPABLE at execve, so each process does it by itself.
func Harden() error {
	if err := noNewPrivileges(); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("make the process undumpable: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	unix.Umask(0o077)
	keepDescriptors() // not before: the program that is executed again needs them
	return nil
}

// noNewPrivileges sets the flag on every thread. Programs with cgo cannot do
// that from Go; they set it on one thread, which then executes the program
// again: the kernel keeps the flag, the process ID and the parent.
func noNewPrivileges() error {
	if set, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); err == nil && set == 1 {
		return nil
	}
	_, _, errno := syscall.AllThreadsSyscall6(syscall.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	if errno == 0 {
		return nil
	}
	if !errors.Is(errno, syscall.ENOTSUP) {
		return fmt.Errorf("forbid new privileges: %w", errno)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid new privileges: %w", err)
	}
	return fmt.Errorf("execute again without new privileges: %w", unix.Exec("/proc/self/exe", os.Args, os.Environ()))
}
