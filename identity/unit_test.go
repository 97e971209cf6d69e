package identity_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/kms-agent/kms-agent/identity"
)

// other is another process with a plaintext connection to us.
type other struct {
	info credentials.AuthInfo
	pid  int
	// hangUp has it end; end waits for that, too.
	hangUp, end func()
}

// connected starts a process as change wants it.
func connected(t testing.TB, creds *identity.Credentials, change func(*exec.Cmd)) other {
	t.Helper()
	path := filepath.Join(tempDir(t), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if err := os.Chmod(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	cmd := helper(t, "connect", path)
	if change != nil {
		change(cmd)
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end := sync.OnceFunc(func() {
		_ = stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("helper: %v", err)
		}
	})
	t.Cleanup(end)
	raw, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	conn, info, err := creds.ServerHandshake(raw)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return other{info: info, pid: cmd.Process.Pid, hangUp: func() { _ = stdin.Close() }, end: end}
}

func newCredentials(t testing.TB, peers ...identity.StaticPeer) *identity.Credentials {
	t.Helper()
	creds, err := identity.NewCredentials(identity.Config{TrustDomain: domain, StaticPeers: peers})
	if err != nil {
		t.Fatal(err)
	}
	return creds
}

func wantPeer(t testing.TB, info credentials.AuthInfo, served bool, text string) {
	t.Helper()
	caller, err := identity.CallerFromContext(contextOf(info))
	switch {
	case served && (err != nil || caller.ID != orders || caller.Proof != identity.ProofStaticPeer):
		t.Errorf("got %+v, %v, want %s", caller, err, orders)
	case !served && err == nil:
		t.Errorf("taken for %+v", caller)
	case !served && !strings.Contains(err.Error(), text):
		t.Errorf("refused with %q, want it to say %q", err, text)
	}
}

// The groups that a process had when it connected, however many.
func TestStaticPeersByGroup(t *testing.T) {
	many := make([]uint32, 300)
	for i := range many {
		many[i] = uint32(70_000 + i)
	}
	type group struct {
		groups []uint32 // nil: those of this process
		group  uint32
		member bool
	}
	cases := map[string]group{"primary": {group: gid(), member: true}, "none": {group: 4_000_000}}
	own, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range own {
		cases["supplementary of this process "+strconv.Itoa(g)] = group{group: uint32(g), member: true}
	}
	if os.Geteuid() == 0 { // who else may choose groups
		cases["supplementary"] = group{groups: []uint32{7000, 7001}, group: 7001, member: true}
		cases["not among the supplementary"] = group{groups: []uint32{7000, 7001}, group: 7002}
		cases["last of many"] = group{groups: many, group: many[len(many)-1], member: true}
		cases["not among many"] = group{groups: many, group: 69_999}
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			creds := newCredentials(t, identity.StaticPeer{Group: &c.group, ID: orders})
			peer := connected(t, creds, func(cmd *exec.Cmd) {
				if c.groups != nil {
					cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid(), Gid: gid(), Groups: c.groups}}
				}
			})
			wantPeer(t, peer.info, c.member, "no static peer is configured")
		})
	}
}

// cgroups is where the unified hierarchy is mounted; empty: nowhere.
func cgroups(t testing.TB) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1]
		}
	}
	return ""
}

// place moves a process into a cgroup, which it makes, and reports whether this
// process may do so, which takes root and cgroup v2.
func place(t testing.TB, pid int, path string) bool {
	t.Helper()
	root := cgroups(t)
	if root == "" {
		return false
	}
	dir := root
	for part := range strings.SplitSeq(strings.TrimPrefix(path, "/"), "/") {
		dir = filepath.Join(dir, part)
		if err := os.Mkdir(dir, 0o755); err != nil && !os.IsExist(err) {
			return false
		}
		made := dir
		t.Cleanup(func() { _ = os.Remove(made) })
	}
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o600) == nil
}

// A unit is told by where the process is; what a unit makes below itself changes
// nothing, whatever it is called. Where this process may not make cgroups, the
// peer stays in one that is not the unit's, and is refused.
func TestStaticPeersByUnit(t *testing.T) {
	const unit = "kmstest.service"
	slice := fmt.Sprintf("/kmstest%d.slice", os.Getpid())
	for name, c := range map[string]struct {
		path, unit string
		served     bool
	}{
		"in it":                          {slice + "/" + unit, unit, true},
		"below it":                       {slice + "/" + unit + "/worker", unit, true},
		"below it, as another":           {slice + "/" + unit + "/another.service", unit, true},
		"in it, slices deep":             {slice + "/kmstest-a.slice/" + unit, unit, true},
		"escaped":                        {slice + "/_cpu.service", "cpu.service", true},
		"in a scope":                     {slice + "/kmstest.scope", "kmstest.scope", true},
		"in another":                     {slice + "/another.service", unit, false},
		"in another, below its name":     {slice + "/another.service/" + unit, unit, false},
		"in a user's unit of the name":   {slice + "/user@1000.service/app.slice/" + unit, unit, false},
		"in a container of no unit":      {slice + "/docker/" + unit, unit, false},
		"in the slice alone":             {slice, unit, false},
		"in a longer name":               {slice + "/x" + unit, unit, false},
		"in a name that is longer ahead": {slice + "/" + unit + ".service", unit, false},
	} {
		t.Run(name, func(t *testing.T) {
			// A weaker rule behind it must not catch who the first does not match.
			creds := newCredentials(t, identity.StaticPeer{UID: number(uid()), Unit: c.unit, ID: orders})
			peer := connected(t, creds, nil)
			moved := place(t, peer.pid, c.path)
			wantPeer(t, peer.info, c.served && moved, "static peer")
			// A finding holds for the connection; a new table has it found anew.
			peer.end()
			wantPeer(t, peer.info, c.served && moved, "static peer")
			if err := creds.SetStaticPeers([]identity.StaticPeer{{Unit: c.unit, ID: orders}, {UID: number(uid()), ID: billing}}); err != nil {
				t.Fatal(err)
			}
			wantPeer(t, peer.info, false, "cannot be judged: its unit is not known: the process that connected has ended")
		})
	}
}

// The number of a process that has ended may be another's by now.
func TestStaticPeerUnitOfAnEndedProcess(t *testing.T) {
	creds := newCredentials(t,
		identity.StaticPeer{UID: number(uid()), Unit: "kmstest.service", ID: orders},
		identity.StaticPeer{UID: number(uid()), ID: orders})
	peer := connected(t, creds, nil)
	peer.end()
	wantPeer(t, peer.info, false, "the process that connected has ended")
	// Nor is one believed that ends while it is being asked for: nobody has waited
	// for this one yet, so that /proc still tells of it.
	peer = connected(t, creds, nil)
	peer.hangUp()
	for began := time.Now(); ; {
		if ended, known := peer.info.(*identity.Conn).PeerExited(); ended && known {
			break
		}
		if time.Since(began) > patience {
			t.Fatal("it does not end")
		}
	}
	wantPeer(t, peer.info, false, "the process that connected has ended")
	// A rule that does not match otherwise has no need of the unit.
	creds = newCredentials(t,
		identity.StaticPeer{UID: number(uid() + 1), Unit: "kmstest.service", ID: billing},
		identity.StaticPeer{UID: number(uid()), ID: orders})
	peer = connected(t, creds, nil)
	peer.end()
	wantPeer(t, peer.info, true, "")
}

// helperUnits is an agent that asks for its own unit, and says how it went.
func helperUnits() {
	l, err := net.Listen("unix", os.Getenv(helperPath))
	if err != nil {
		panic(err)
	}
	client, err := net.Dial("unix", os.Getenv(helperPath))
	if err != nil {
		panic(err)
	}
	if _, err := client.Write([]byte("P")); err != nil {
		panic(err)
	}
	creds, err := identity.NewCredentials(identity.Config{StaticPeers: []identity.StaticPeer{{Unit: "kmstest.service", ID: orders}}})
	if err != nil {
		panic(err)
	}
	raw, err := l.Accept()
	if err != nil {
		panic(err)
	}
	_, info, err := creds.ServerHandshake(raw)
	if err != nil {
		panic(err)
	}
	_, err = identity.CallerFromContext(contextOf(info))
	fmt.Print(err)
}

// Paths of cgroups that do not begin at the host's root tell no units: who may
// make cgroups below another could give them any name.
func TestStaticPeerUnitInACgroupNamespace(t *testing.T) {
	cmd := helper(t, "units", filepath.Join(tempDir(t), "s"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWCGROUP}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
	}
	said, err := cmd.Output()
	if errors.Is(err, syscall.EPERM) {
		t.Log("this host lets nobody but root make namespaces, so that there is none to be tested")
		return
	}
	if err != nil || !strings.Contains(string(said), "in a cgroup namespace of its own") {
		t.Errorf("the agent says %q, %v", said, err)
	}
}

func TestCheckUnit(t *testing.T) {
	for name, good := range map[string]bool{
		"orders.service": true, "orders-1.2_a.service": true, "worker@1.service": true, `mnt-my\x2ddisk@a:b.service`: true,
		"session-3.scope": true, "user@1000.service": true,
		"": false, "orders": false, ".service": false, "service": false, "orders.socket": false, "orders.slice": false,
		"orders.service ": false, "a/b.service": false, "../orders.service": false, "orders.service.": false,
		"worker@.service": false, "@1.service": false, "ördérs.service": false, "orders.Service": false, "or ders.service": false,
		"orders\n.service": false, strings.Repeat("a", 247) + ".service": true, strings.Repeat("a", 248) + ".service": false,
	} {
		if err := identity.CheckUnit(name); (err == nil) != good {
			t.Errorf("%q: %v", name, err)
		}
	}
	_, err := identity.NewCredentials(identity.Config{StaticPeers: []identity.StaticPeer{{Unit: "orders", ID: orders}}})
	if err == nil || !strings.Contains(err.Error(), "no name of a service or scope") {
		t.Errorf("a rule with a faulty unit: %v", err)
	}
}
