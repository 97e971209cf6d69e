package hsmtest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// What opencryptoki has in fixed places.
const (
	openCryptokiModule = "pkcs11/libopencryptoki.so"
	openCryptokiDaemon = "/usr/sbin/pkcsslotd"
	openCryptokiConfig = "/etc/opencryptoki/opencryptoki.conf"
	openCryptokiSocket = "/var/run/pkcsslotd.socket"
	openCryptokiData   = "/var/lib/opencryptoki"
	openCryptokiLocks  = "/var/lock/opencryptoki"
	sharedMemory       = "/dev/shm"
	// openCryptokiName is the directory of the token below Data and Locks.
	openCryptokiName = "kms-agent-test"
	// openCryptokiFirstPIN is the officer's for a token that is not initialised.
	openCryptokiFirstPIN = "87654321"
)

// OpenCryptoki makes a token of opencryptoki's software token. Three wrong PINs lock
// it, and its PINs have 4 to 8 bytes.
//
// The slot daemon takes its configuration from one file and its socket has one place,
// so the test must be root, no other pkcsslotd may run, and tests that have such a
// token wait for each other. The token has a directory of its own beside the system's,
// whose tokens and configuration stay as they are. No environment is needed.
func OpenCryptoki(t testing.TB) *Token {
	t.Helper()
	k := newToken(t, openCryptokiModule, "a user's", "officer1", openCryptokiDaemon)
	if os.Geteuid() != 0 {
		t.Fatal("opencryptoki's pkcsslotd can be started by root only")
	}
	lock(t, openCryptokiConfig)
	if listens(t, "unix", openCryptokiSocket) {
		t.Fatal("a pkcsslotd is running, and there can be one at a time: stop it (systemctl stop pkcsslotd)")
	}
	data, locks := filepath.Join(openCryptokiData, openCryptokiName), filepath.Join(openCryptokiLocks, openCryptokiName)
	k.DataObjects = true
	k.Write, k.Sockets = []string{data, openCryptokiLocks, sharedMemory}, []string{openCryptokiSocket}
	leftovers := []string{data, locks, filepath.Join(sharedMemory, "var.lib.opencryptoki."+openCryptokiName)}
	remove(t, leftovers...)
	t.Cleanup(func() { remove(t, leftovers...) })
	k.startSlotDaemon(t)
	k.initOpenCryptoki(t)
	return k
}

// startSlotDaemon starts pkcsslotd where its configuration is another file.
func (k *Token) startSlotDaemon(t testing.TB) {
	t.Helper()
	k.write(t, "opencryptoki.conf", fmt.Sprintf("version opencryptoki-3.1\nslot 0\n{\nstdll = libpkcs11_sw.so\ntokname = %s\n}\n", openCryptokiName))
	script := fmt.Sprintf("mount --bind '%s' '%s' && exec '%s' -f", k.Path("opencryptoki.conf"), openCryptokiConfig, openCryptokiDaemon)
	cmd := exec.Command("/bin/sh", "-c", script) //nolint:gosec,noctx // paths of the test, whose end ends it
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	daemon(t, cmd, func() error { return k.answers(t) }) // its socket is there before the shared memory
}

// initOpenCryptoki makes all PINs ours: such as somebody else gave must be changed
// before anything else can be done.
func (k *Token) initOpenCryptoki(t testing.TB) {
	t.Helper()
	const handed = "handed-1"
	k.tool(t, "--slot", "0", "--init-token", "--label", k.Label, "--so-pin", openCryptokiFirstPIN)
	k.tool(t, "--slot", "0", "--login", "--login-type", "so", "--so-pin", openCryptokiFirstPIN, "--change-pin", "--new-pin", k.OfficerPIN)
	k.tool(t, "--slot", "0", "--login", "--login-type", "so", "--so-pin", k.OfficerPIN, "--init-pin", "--pin", handed)
	k.tool(t, "--slot", "0", "--login", "--pin", handed, "--change-pin", "--new-pin", k.PIN)
}

// listens tells whether somebody listens at an address.
func listens(t testing.TB, network, address string) bool {
	c, err := new(net.Dialer).DialContext(t.Context(), network, address)
	if err == nil {
		_ = c.Close()
	}
	return err == nil
}
