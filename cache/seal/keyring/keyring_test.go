package keyring_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/cache/seal"
	"github.com/kms-agent/kms-agent/cache/seal/keyring"
)

const childVariable = "KMS_AGENT_KEYRING_TEST_CHILD"

// children run in a process of their own, with a name and a directory.
var children = map[string]func(name, dir string) error{
	"save":            save,
	"private-session": privateSession,
	"no-keyrings":     func(name, _ string) error { return filtered(name, unix.ENOSYS) },
	"no-permission":   func(name, _ string) error { return filtered(name, unix.EPERM) },
	"no-quota":        noQuota,
	"other-user":      otherUser,
}

func TestMain(m *testing.M) {
	child, ok := children[os.Getenv(childVariable)]
	if !ok {
		os.Exit(m.Run())
	}
	if err := child(os.Args[1], os.Args[2]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

// runChild returns what the child says. uid 0 stays this user.
func runChild(t *testing.T, kind, name, dir string, uid uint32) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", name, dir)
	cmd.Env, cmd.Dir = []string{childVariable + "=" + kind, "GORACE=atexit_sleep_ms=0"}, "/"
	if uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("child %s: %v: %s", kind, err, out)
	}
	return string(out)
}

// newName returns a name that no other run has; its key ends with the test.
func newName(t *testing.T) string {
	t.Helper()
	name := "test/" + filepath.Base(t.TempDir()) + "-" + strconv.Itoa(os.Getpid()) + "-" + strings.ReplaceAll(t.Name(), "/", "-")
	t.Cleanup(func() { remove(name) })
	return name
}

func remove(name string) {
	if id, err := unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, "user", "kms-agent:"+name, 0); err == nil {
		_, _ = unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_USER_KEYRING, 0, 0)
	}
}

// save writes a store as a process would that ends right after.
func save(name, dir string) error {
	sealer, err := keyring.Open(name)
	if err != nil {
		return err
	}
	store, err := seal.OpenStore(filepath.Join(dir, "store"), sealer)
	if err != nil {
		return err
	}
	return store.Save([]seal.Record{{Type: seal.DataKey, Value: []byte("a data key")}})
}

func privateSession(name, dir string) error {
	runtime.LockOSThread() // a session keyring of this thread alone
	if _, err := unix.KeyctlInt(unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0); err != nil {
		return err
	}
	return save(name, dir)
}

func load(name, path string) (string, error) {
	sealer, err := keyring.Open(name)
	if err != nil {
		return "", err
	}
	defer sealer.Close()
	store, err := seal.OpenStore(path, sealer)
	if err != nil {
		return "", err
	}
	defer store.Close()
	l, err := store.Load()
	if err != nil {
		return "", err
	}
	defer l.Free()
	return string(l.Records[0].Value), nil
}

// The secret and the counter survive the process that made them, also where its
// session keyring did not lead to the user's.
func TestSurvivesTheProcess(t *testing.T) {
	for _, kind := range []string{"save", "private-session"} {
		t.Run(kind, func(t *testing.T) {
			name, dir := newName(t), t.TempDir()
			path := filepath.Join(dir, "store")
			runChild(t, kind, name, dir, 0)
			old, err := os.ReadFile(path)
			must(t, err)
			for range 2 {
				if got, err := load(name, path); err != nil || got != "a data key" {
					t.Errorf("got %q, %v, want the data key", got, err)
				}
			}
			runChild(t, kind, name, dir, 0)
			must(t, os.WriteFile(path, old, 0o600))
			if _, err := load(name, path); !errors.Is(err, seal.ErrRolledBack) {
				t.Errorf("rolled back: got %v, want ErrRolledBack", err)
			}
		})
	}
}

// After a boot the secret is another one.
func TestAnotherSecret(t *testing.T) {
	name, dir := newName(t), t.TempDir()
	runChild(t, "save", name, dir, 0)
	remove(name)
	if _, err := load(name, filepath.Join(dir, "store")); !errors.Is(err, seal.ErrForeign) {
		t.Errorf("got %v, want ErrForeign", err)
	}
}

func TestRemovedWhileInUse(t *testing.T) {
	name := newName(t)
	sealer, err := keyring.Open(name)
	must(t, err)
	defer sealer.Close()
	id, err := unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, "user", "kms-agent:"+name, 0)
	must(t, err)
	_, err = unix.KeyctlInt(unix.KEYCTL_REVOKE, id, 0, 0, 0)
	must(t, err)
	if _, err := sealer.Advance(); !errors.Is(err, seal.ErrUnavailable) {
		t.Errorf("Advance: got %v, want ErrUnavailable", err)
	}
	if _, err := sealer.Counter(); !errors.Is(err, seal.ErrUnavailable) || !strings.Contains(err.Error(), "restart the agent") {
		t.Errorf("Counter: got %v, want ErrUnavailable with the cure", err)
	}
}

func TestClosed(t *testing.T) {
	sealer, err := keyring.Open(newName(t))
	must(t, err)
	sealer.Close()
	if _, err := sealer.Advance(); !errors.Is(err, seal.ErrUnavailable) {
		t.Errorf("Advance after Close: got %v, want ErrUnavailable", err)
	}
}

func TestNames(t *testing.T) {
	for _, name := range []string{"", strings.Repeat("a", 129), "a b", "ä", "a;b", "a\x00"} {
		if _, err := keyring.Open(name); !errors.Is(err, seal.ErrUnavailable) {
			t.Errorf("%q: got %v, want ErrUnavailable", name, err)
		}
	}
}

// What another program put under the name is left alone.
func TestForeignKey(t *testing.T) {
	name := newName(t)
	_, err := unix.AddKey("user", "kms-agent:"+name, []byte("short"), unix.KEY_SPEC_USER_KEYRING)
	must(t, err)
	if _, err := keyring.Open(name); !errors.Is(err, seal.ErrUnavailable) || !strings.Contains(err.Error(), "keyctl purge") {
		t.Errorf("got %v, want ErrUnavailable with the cure", err)
	}
}

func TestPermissions(t *testing.T) {
	name := newName(t)
	sealer, err := keyring.Open(name)
	must(t, err)
	sealer.Close()
	id, err := unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, "user", "kms-agent:"+name, 0)
	must(t, err)
	described, err := unix.KeyctlString(unix.KEYCTL_DESCRIBE, id)
	must(t, err)
	if want := fmt.Sprintf("user;%d;%d;3f1f0000;kms-agent:%s", os.Geteuid(), os.Getegid(), name); described != want {
		t.Errorf("got %s, want %s", described, want)
	}
	if !isRoot(t) {
		return
	}
	if got := runChild(t, "other-user", strconv.Itoa(id), "-", 54321); got != "permission denied" {
		t.Errorf("another user reads the key: got %q, want permission denied", got)
	}
}

func otherUser(id, _ string) error {
	serial, err := strconv.Atoi(id)
	if err != nil {
		return err
	}
	_, err = unix.KeyctlBuffer(unix.KEYCTL_READ, serial, make([]byte, 40), 0)
	fmt.Print(err)
	return nil
}

// Each reason why there is no keyring is told with its cure.
func TestCures(t *testing.T) {
	for kind, want := range map[string]string{
		"no-keyrings":   "use a kernel that has",
		"no-permission": "allow add_key and keyctl in the container's seccomp profile",
	} {
		if got := runChild(t, kind, newName(t), "-", 0); !strings.Contains(got, want) || !strings.Contains(got, seal.ErrUnavailable.Error()) {
			t.Errorf("%s: got %q, want it to say %q", kind, got, want)
		}
	}
	if !isRoot(t) {
		return
	}
	if got, want := runChild(t, "no-quota", newName(t), "-", 54322), "raise sysctl kernel.keys.maxkeys"; !strings.Contains(got, want) {
		t.Errorf("no quota: got %q, want it to say %q", got, want)
	}
}

// filtered opens under a seccomp filter that answers add_key and keyctl by errno.
func filtered(name string, errno unix.Errno) error {
	refuse := unix.SECCOMP_RET_ERRNO | uint32(errno)
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_ADD_KEY, Jt: 2},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_KEYCTL, Jt: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		{Code: unix.BPF_RET | unix.BPF_K, K: refuse},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	if _, _, err := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program))); err != 0 {
		return err
	}
	return refusal(name)
}

// noQuota opens as a user whose keys are used up.
func noQuota(name, _ string) error {
	for i := range 1000 {
		if _, err := unix.AddKey("user", "test:"+strconv.Itoa(i), []byte("x"), unix.KEY_SPEC_PROCESS_KEYRING); errors.Is(err, unix.EDQUOT) {
			return refusal(name)
		} else if err != nil {
			return err
		}
	}
	return errors.New("1000 keys are within the quota")
}

// refusal prints why Open fails.
func refusal(name string) error {
	_, err := keyring.Open(name)
	if err == nil {
		return errors.New("Open succeeded")
	}
	_, _ = io.WriteString(os.Stdout, err.Error())
	return nil
}

// isRoot reports whether tests can become another user.
func isRoot(t *testing.T) bool {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Log("only root can become another user: that part is not tested")
		return false
	}
	return true
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
