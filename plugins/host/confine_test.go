package host_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/plugins/host"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

// listen opens a socket that accepts nobody, and returns its address.
func listen(t *testing.T, network, address string) string {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l.Addr().String()
}

func portOf(t *testing.T, address string) uint16 {
	t.Helper()
	var port uint16
	if _, err := fmt.Sscan(address[strings.LastIndexByte(address, ':')+1:], &port); err != nil {
		t.Fatal(err)
	}
	return port
}

// file makes a file of a test in a directory of its own.
func file(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// A confined plugin reaches what its configuration names, and nothing else that
// its user could.
func TestConfinedPlugin(t *testing.T) {
	if abi := host.LandlockABI(); abi < 6 {
		t.Fatalf("the kernel's Landlock has ABI %d: what it restricts cannot be tested below 6 (Linux 6.12)", abi)
	}
	secret, readable, writable := file(t, "secret"), file(t, "readable"), t.TempDir()
	open, closed := listen(t, "tcp", "127.0.0.1:0"), listen(t, "tcp", "127.0.0.1:0")
	abstract := fmt.Sprintf("@kms-agent-test-%d", os.Getpid())
	listen(t, "unix", abstract)
	cfg := config(t, puppetSettings{})
	cfg.Access = host.Access{
		Read: []string{readable, "/not/there"}, Write: []string{writable, "/dev/null"}, ConnectTCP: []uint16{portOf(t, open)},
	}
	s := plugintest.Start(t, cfg)
	for what, allowed := range map[string]bool{
		"read " + readable:                            true,
		"write " + readable:                           false,
		"read " + secret:                              false,
		"write " + secret:                             false,
		"write " + filepath.Join(writable, "new"):     true,
		"read " + filepath.Join(writable, "new"):      true,
		"read /etc/shadow":                            false,
		"control /dev/null":                           true,
		"control /dev/zero":                           false,
		"read /proc/self/status":                      true,
		fmt.Sprintf("read /proc/%d/mem", os.Getpid()): false,
		"write /tmp/kms-agent-confined":               false,
		"dial tcp " + open:                            true,
		"dial tcp " + closed:                          false,
		"dial unix " + abstract:                       false,
		fmt.Sprintf("signal %d", os.Getpid()):         false,
	} {
		if what == "read "+filepath.Join(writable, "new") {
			if err := os.WriteFile(filepath.Join(writable, "new"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		_, err := order(t, s, what)
		if (err == nil) != allowed {
			t.Errorf("%s: %v, want allowed %v", what, err, allowed)
		}
	}
	if got, err := order(t, s, "proc status NoNewPrivs"); err != nil || got != "found: NoNewPrivs: 1" {
		t.Errorf("new privileges: %q, %v", got, err)
	}
}

// A checked program is confined too, though it is executed from memory.
func TestConfinedProgram(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.Self, cfg.Confine = false, host.ConfineAlways
	cfg.Command, cfg.SHA256 = program(t)
	s := plugintest.Start(t, cfg)
	if _, err := order(t, s, "read "+file(t, "secret")); err == nil || !strings.Contains(err.Error(), unix.EACCES.Error()) {
		t.Errorf("read: %v, want a refusal", err)
	}
}

func TestPluginThatIsNotConfined(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.Confine = host.ConfineNever
	s := plugintest.Start(t, cfg)
	if _, err := order(t, s, "read "+file(t, "x")); err != nil {
		t.Errorf("read: %v", err)
	}
	if got, err := order(t, s, "proc status NoNewPrivs"); err != nil || got != "found: NoNewPrivs: 1" {
		t.Errorf("new privileges: %q, %v; want none even so", got, err)
	}
}

// The host itself keeps every right: only the thread that forked is confined.
func TestHostIsNotConfined(t *testing.T) {
	plugintest.Start(t, config(t, puppetSettings{}))
	secret := file(t, "secret")
	for range 200 { // on whatever thread
		if _, err := os.ReadFile(secret); err != nil {
			t.Fatal(err)
		}
	}
	threads, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil {
		t.Fatal(err)
	}
	confined := 0
	for _, path := range threads {
		if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), "NoNewPrivs:\t1") {
			confined++
		}
	}
	if confined != 1 {
		t.Errorf("%d threads of the host are confined, want that of the plugin alone", confined)
	}
}

// Where a plugin does not open for want of access, the error says what to do.
func TestConfinementIsExplained(t *testing.T) {
	s, _ := start(t, config(t, puppetSettings{Open: "read " + file(t, "x")}))
	eventually(t, "the explanation", func() bool {
		return strings.Contains(s.Status().LastError, "access names in the configuration")
	})
}

// What the host was started with is not handed to plugins.
func TestInheritedDescriptorsAreClosed(t *testing.T) {
	path := file(t, "secret")
	fd, err := unix.Open(path, unix.O_RDONLY, 0) // without O_CLOEXEC, as those are
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	s := plugintest.Start(t, config(t, puppetSettings{}))
	if got, err := order(t, s, fmt.Sprintf("proc fd/%d", fd)); err == nil && got == path {
		t.Errorf("the plugin has descriptor %d: %s", fd, got)
	}
}
