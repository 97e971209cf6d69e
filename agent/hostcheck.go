package agent

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/plugins/host"
)

// HostFinding is one thing that the host has or lacks.
type HostFinding struct {
	Name string `json:"name"`
	// OK: nothing is lacking.
	OK bool `json:"ok"`
	// Found is what there is.
	Found string `json:"found"`
	// Means is what it changes that something is lacking, and Cure what gives it;
	// both are empty when OK.
	Means string `json:"means"`
	Cure  string `json:"cure"`
}

// CheckHost looks at what the agent uses of its host where it is there. It
// changes nothing.
func CheckHost() []HostFinding {
	return []HostFinding{
		memorySecrets(), lockedMemory(), processHandles(), peerHandles(), cgroups(), landlock(), executableMemory(), swap(),
	}
}

// finding is OK, or says what lacking it means.
func finding(name string, ok bool, found, means, cure string) HostFinding {
	f := HostFinding{Name: name, OK: ok, Found: found}
	if !ok {
		f.Means, f.Cure = means, cure
	}
	return f
}

func memorySecrets() HostFinding {
	fd, err := unix.MemfdSecret(0)
	found := "there"
	if err == nil {
		_ = unix.Close(fd)
	} else {
		found = err.Error()
	}
	return finding("memfd_secret", err == nil, found,
		"data keys lie in locked memory instead, which root can read through /proc",
		"Linux 5.14 or later; before 6.5 also secretmem.enable=1 on the kernel's command line")
}

func lockedMemory() HostFinding {
	const enough = 1 << 20 // for cache.max_entries: 10000 with room to spare
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return finding("RLIMIT_MEMLOCK", false, err.Error(), "the limit is not known", "see getrlimit(2)")
	}
	found := fmt.Sprintf("%d bytes", limit.Cur)
	if limit.Cur == unix.RLIM_INFINITY {
		found = "unlimited"
	}
	return finding("RLIMIT_MEMLOCK", limit.Cur >= enough, found,
		"protected memory for fewer than 10000 data keys; the agent does not start with more in cache.max_entries",
		"LimitMEMLOCK=8M in the systemd unit, ulimit -l in a shell, or a smaller cache.max_entries")
}

func processHandles() HostFinding {
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	found := "there"
	if err == nil {
		_ = unix.Close(fd)
	} else {
		found = err.Error()
	}
	return finding("pidfd", err == nil, found,
		"a process cannot be held while the agent looks at it: static peers by systemd unit are refused",
		"Linux 5.3 or later")
}

func peerHandles() HostFinding {
	const soPeerPidfd = 77 // SO_PEERPIDFD
	found, err := "there", error(nil)
	pair, pairErr := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if pairErr != nil {
		err = pairErr
	} else {
		var fd int
		if fd, err = unix.GetsockoptInt(pair[0], unix.SOL_SOCKET, soPeerPidfd); err == nil {
			_ = unix.Close(fd)
		}
		_ = unix.Close(pair[0])
		_ = unix.Close(pair[1])
	}
	if err != nil {
		found = err.Error()
	}
	return finding("SO_PEERPIDFD", err == nil, found,
		"between a connection and a look at its process the process ID may be another's: static peers by systemd unit are refused",
		"Linux 6.5 or later")
}

func cgroups() HostFinding {
	var s unix.Statfs_t
	err := unix.Statfs("/sys/fs/cgroup", &s)
	ok := err == nil && s.Type == unix.CGROUP2_SUPER_MAGIC
	found := "there"
	if !ok {
		found = "/sys/fs/cgroup is not cgroup2"
	}
	return finding("cgroup2", ok, found, "the systemd unit of a process is not known: static peers by unit are refused",
		"a host with the unified cgroup hierarchy (systemd.unified_cgroup_hierarchy=1)")
}

func landlock() HostFinding {
	const whole = 6
	abi := host.LandlockABI()
	means := "plugins have every right of the agent's user; backends with confine: required do not start"
	if abi > 0 {
		means = "plugins are confined, but before ABI 4 not in TCP, before ABI 6 not in signals and abstract sockets"
	}
	return finding("Landlock", abi >= whole, fmt.Sprintf("ABI %d", abi), means,
		"Linux 6.12 or later with landlock among the security modules (lsm=landlock,... on the kernel's command line)")
}

func executableMemory() HostFinding {
	value := sysctl("vm/memfd_noexec")
	return finding("vm.memfd_noexec", value != "2", orUnset(value),
		"plugins with a path cannot be executed from the memory in which they were checked", "sysctl vm.memfd_noexec=1")
}

func swap() HostFinding {
	b, err := os.ReadFile("/proc/swaps")
	lines := strings.Count(strings.TrimSpace(string(b)), "\n") // beside the header
	ok := err == nil && lines == 0
	return finding("swap", ok, fmt.Sprintf("%d areas", lines),
		"data keys are never swapped, but requests and answers in the agent's memory may be", "encrypt swap, or MemorySwapMax=0 in the systemd unit")
}

func sysctl(name string) string {
	b, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func orUnset(value string) string {
	if value == "" {
		return "not set"
	}
	return value
}
