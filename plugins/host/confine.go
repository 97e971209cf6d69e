package host

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Confinement says whether a plugin is kept to what Access names.
type Confinement string

// The confinements.
const (
	// ConfineWhereKnown uses what the kernel knows of Landlock. The default.
	ConfineWhereKnown Confinement = ""
	// ConfineAlways starts no plugin on a kernel without Landlock.
	ConfineAlways Confinement = "required"
	// ConfineNever leaves the plugin every right of the agent's user.
	ConfineNever Confinement = "off"
)

// Access names what a confined plugin may reach beyond the system's programs
// and libraries, name resolution, certificates and its own socket. Paths are
// absolute; one that does not exist gives nothing.
type Access struct {
	// Read and Write are files, or directories with all below. Write is to read,
	// change, make and remove.
	Read, Write []string
	// Sockets are Unix sockets, or directories of them, that the plugin connects
	// to. Kernels before Landlock's ABI 9 do not restrict that.
	Sockets []string
	// ConnectTCP are the ports that it connects to. Kernels before Landlock's
	// ABI 4 do not restrict that.
	ConnectTCP []uint16
	// Network lets it connect to every port.
	Network bool
}

// systemReads are what programs and libraries need of a system. Configuration
// below /etc is named one by one: there are secrets of others beside it.
func systemReads() []string {
	return []string{
		"/usr", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/sys",
		"/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ssl", "/etc/pki", "/etc/ca-certificates",
		"/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/services",
		"/etc/localtime", "/etc/passwd", "/etc/group", "/run/systemd/resolve", "/dev/urandom", "/dev/random",
	}
}

// ReachesBySystem tells whether every confined plugin reads a file, as it does those
// of the system.
func ReachesBySystem(path string) bool {
	return slices.ContainsFunc(systemReads(), func(known string) bool { return path == known || strings.HasPrefix(path, known+"/") })
}

// The rights of Landlock that belong together.
const (
	rightsFile = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_READ_FILE |
		unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV | unix.LANDLOCK_ACCESS_FS_RESOLVE_UNIX
	rightsRead  = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	rightsRun   = rightsRead | unix.LANDLOCK_ACCESS_FS_EXECUTE
	rightsWrite = rightsRead | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE |
		unix.LANDLOCK_ACCESS_FS_REMOVE_DIR | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE | unix.LANDLOCK_ACCESS_FS_MAKE_DIR |
		unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_MAKE_SOCK | unix.LANDLOCK_ACCESS_FS_MAKE_FIFO |
		unix.LANDLOCK_ACCESS_FS_MAKE_SYM | unix.LANDLOCK_ACCESS_FS_REFER
)

// handled returns what a kernel with this ABI version of Landlock restricts.
// See landlock(7) for what came when.
func handled(abi int) unix.LandlockRulesetAttr {
	const abi1 = unix.LANDLOCK_ACCESS_FS_MAKE_SYM<<1 - 1
	attr := unix.LandlockRulesetAttr{Handled_access_fs: abi1}
	for _, step := range []struct {
		abi    int
		fs     uint64
		net    uint64
		scoped uint64
	}{
		{2, unix.LANDLOCK_ACCESS_FS_REFER, 0, 0},
		{3, unix.LANDLOCK_ACCESS_FS_TRUNCATE, 0, 0},
		{4, 0, unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP, 0},
		{5, unix.LANDLOCK_ACCESS_FS_IOCTL_DEV, 0, 0},
		{6, 0, 0, unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL},
		{9, unix.LANDLOCK_ACCESS_FS_RESOLVE_UNIX, 0, 0},
	} {
		if abi >= step.abi {
			attr.Handled_access_fs |= step.fs
			attr.Handled_access_net |= step.net
			attr.Scoped |= step.scoped
		}
	}
	return attr
}

// LandlockABI returns the version of Landlock that the kernel has; 0 without.
func LandlockABI() int {
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0
	}
	return int(abi)
}

// ruleset is a set of rules in the making.
type ruleset struct {
	fd      int
	handled unix.LandlockRulesetAttr
	err     error // the first
}

// newRuleset returns the rules of a plugin whose program and socket directory
// are these; nil where the plugin is not confined.
func newRuleset(cfg Config, executable, socketDir string) (*ruleset, error) {
	abi := LandlockABI()
	switch {
	case cfg.Confine == ConfineNever, abi == 0 && cfg.Confine == ConfineWhereKnown:
		return nil, nil //nolint:nilnil // nothing confines is an answer
	case abi == 0:
		return nil, errors.New("the kernel has no Landlock, which this backend requires: enable it (lsm=landlock,... on the kernel's command line), or set confine: best-effort")
	}
	r := &ruleset{handled: handled(abi)}
	if cfg.Access.Network {
		r.handled.Handled_access_net &^= unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
	}
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&r.handled)), attrSize(abi), 0) //nolint:gosec // as the kernel wants it
	if errno != 0 {
		return nil, fmt.Errorf("create Landlock rules: %w", errno)
	}
	r.fd = int(fd)
	r.rules(cfg.Access, executable, socketDir)
	if r.err != nil {
		return nil, errors.Join(r.err, r.close())
	}
	return r, nil
}

// attrSize is how much of the attributes a kernel knows.
func attrSize(abi int) uintptr {
	switch {
	case abi < 4:
		return 8
	case abi < 6:
		return 16
	default:
		return 24
	}
}

func (r *ruleset) rules(a Access, executable, socketDir string) {
	for _, path := range systemReads() {
		r.path(path, rightsRun)
	}
	for _, path := range []string{"/dev/null", "/dev/zero"} {
		r.path(path, rightsRead|unix.LANDLOCK_ACCESS_FS_WRITE_FILE)
	}
	r.path(executable, rightsRun)
	if errors.Is(r.err, unix.EBADFD) {
		r.err = nil // in memory, which Landlock does not restrict
	}
	r.path(socketDir, rightsWrite|unix.LANDLOCK_ACCESS_FS_RESOLVE_UNIX)
	for _, path := range a.Read {
		r.path(path, rightsRead)
	}
	for _, path := range a.Write {
		r.path(path, rightsWrite|unix.LANDLOCK_ACCESS_FS_IOCTL_DEV) // HSMs on the bus are spoken to so
	}
	for _, path := range a.Sockets {
		r.path(path, unix.LANDLOCK_ACCESS_FS_RESOLVE_UNIX)
	}
	for _, port := range a.ConnectTCP {
		r.port(port)
	}
}

// path gives rights on a file, or on a directory and all below.
func (r *ruleset) path(path string, rights uint64) {
	if r.err != nil {
		return
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return
	}
	if err != nil {
		r.err = fmt.Errorf("Landlock rule for %s: %w", path, err) //nolint:staticcheck // a name
		return
	}
	defer func() { _ = unix.Close(fd) }()
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err == nil && stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		rights &= rightsFile
	}
	rule := unix.LandlockPathBeneathAttr{Allowed_access: rights & r.handled.Handled_access_fs, Parent_fd: int32(fd)}
	if rule.Allowed_access == 0 {
		return
	}
	r.add(unix.LANDLOCK_RULE_PATH_BENEATH, unsafe.Pointer(&rule), path) //nolint:gosec // as the kernel wants it
}

// netPort is struct landlock_net_port_attr.
type netPort struct{ allowed, port uint64 }

const ruleNetPort = 2 // LANDLOCK_RULE_NET_PORT

func (r *ruleset) port(port uint16) {
	if r.err != nil || r.handled.Handled_access_net&unix.LANDLOCK_ACCESS_NET_CONNECT_TCP == 0 {
		return
	}
	rule := netPort{unix.LANDLOCK_ACCESS_NET_CONNECT_TCP, uint64(port)}
	r.add(ruleNetPort, unsafe.Pointer(&rule), fmt.Sprintf("TCP port %d", port)) //nolint:gosec // as the kernel wants it
}

func (r *ruleset) add(kind uintptr, rule unsafe.Pointer, what string) {
	if _, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(r.fd), kind, uintptr(rule), 0, 0, 0); errno != 0 {
		r.err = fmt.Errorf("Landlock rule for %s: %w", what, errno) //nolint:staticcheck // a name
	}
}

func (r *ruleset) close() error {
	if r == nil {
		return nil
	}
	return unix.Close(r.fd)
}

// confineThread takes rights from the calling thread, and from every process
// that it forks, for ever: no program gives more rights than its caller has, and
// nothing is reached but what the rules name. The thread must belong to the
// goroutine (runtime.LockOSThread) and end with it.
func (r *ruleset) confineThread() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no new privileges: %w", err)
	}
	if r == nil {
		return nil
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(r.fd), 0, 0); errno != 0 {
		return fmt.Errorf("apply Landlock rules: %w", errno)
	}
	return nil
}

// onOwnThread runs start on a thread that is confined, and keeps that thread
// until ended is closed: the kernel kills a plugin with the thread that forked
// it. It returns what start does.
func (r *ruleset) onOwnThread(start func() error, ended <-chan struct{}) error {
	started := make(chan error, 1)
	onThread(func() {
		err := r.confineThread()
		if err == nil {
			err = start()
		}
		if started <- err; err == nil {
			<-ended
		}
	})
	return <-started
}

// onThread runs act on a thread that ends with it. That is never the first one
// of the process: it cannot end, and is what the process is judged by.
func onThread(act func()) {
	locked := make(chan struct{})
	go func() {
		runtime.LockOSThread() // for ever: the runtime ends the thread with the goroutine
		if unix.Gettid() != unix.Getpid() {
			close(locked)
			act()
			return
		}
		onThread(act) // on another one, since this one is taken until it returns
		runtime.UnlockOSThread()
		close(locked)
	}()
	<-locked
}

// closeOnExec keeps every descriptor that the agent was started with out of the
// plugins. Those that Go opens are so anyway.
func closeOnExec() error {
	const firstAfterStandard = 3
	err := unix.CloseRange(firstAfterStandard, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // before Linux 5.11
		return closeOnExecOneByOne()
	}
	if err != nil {
		return fmt.Errorf("close inherited descriptors on exec: %w", err)
	}
	return nil
}

func closeOnExecOneByOne() error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("close inherited descriptors on exec: %w", err)
	}
	for _, e := range entries {
		var fd int
		if _, err := fmt.Sscan(e.Name(), &fd); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}
