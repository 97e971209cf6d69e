package hsmtest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"testing"
)

// The programs of a TPM in software, and of tpm2-pkcs11.
const (
	busDaemon  = "/usr/bin/dbus-daemon"
	busSend    = "/usr/bin/dbus-send"
	softTPM    = "/usr/bin/swtpm"
	tpmBroker  = "/usr/sbin/tpm2-abrmd"
	tpmTool    = "/usr/bin/tpm2_ptool"
	brokerName = "com.intel.tss2.Tabrmd"
)

// TPM2 makes a token of tpm2-pkcs11 on a TPM in software, which a broker shares on a
// message bus of the test's own: without one the TPM soon has no room for objects.
// Three wrong PINs lock it. Env must be set before C_Initialize; for the test it is. The
// token is for keys of RSA, always on the token and able to sign, and data objects.
func TPM2(t testing.TB) *Token {
	t.Helper()
	k := newToken(t, "pkcs11/libtpm2_pkcs11.so", PIN, OfficerPIN, busDaemon, busSend, softTPM, tpmBroker, tpmTool)
	state, store, bus := k.Path("state"), k.Path("store"), k.Path("bus")
	for _, dir := range []string{state, store} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	k.startBus(t, bus)
	port := startTPM(t, state)
	for name, value := range map[string]string{
		"DBUS_SESSION_BUS_ADDRESS": "unix:path=" + bus,
		"TPM2_PKCS11_STORE":        store,
		"TPM2_PKCS11_TCTI":         "tabrmd:bus_type=session",
		"TPM2TOOLS_TCTI":           "tabrmd:bus_type=session",
	} {
		t.Setenv(name, value)
		k.Env = append(k.Env, name+"="+value)
	}
	broker := exec.Command(tpmBroker, "--session", "--allow-root", "--tcti", fmt.Sprintf("swtpm:host=127.0.0.1,port=%d", port)) //nolint:gosec,noctx // the test's end ends it
	daemon(t, broker, func() error {
		return exec.CommandContext(t.Context(), busSend, "--session", "--print-reply", "--dest=org.freedesktop.DBus", "/", "org.freedesktop.DBus.GetNameOwner", "string:"+brokerName).Run()
	})
	run(t, tpmTool, "init", "--path", store)
	run(t, tpmTool, "addtoken", "--pid", "1", "--label", k.Label, "--sopin", k.OfficerPIN, "--userpin", k.PIN, "--path", store)
	k.DataObjects = true
	k.Write, k.Sockets = []string{store}, []string{bus}
	return k
}

// startBus starts a message bus at a socket.
func (k *Token) startBus(t testing.TB, socket string) {
	t.Helper()
	k.write(t, "bus.conf", `<busconfig><type>session</type><listen>unix:path=`+socket+`</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>
`)
	bus := exec.Command(busDaemon, "--config-file="+k.Path("bus.conf"), "--nofork", "--nopidfile", "--nosyslog") //nolint:gosec,noctx // the test's end ends it
	daemon(t, bus, func() error {
		if !listens(t, "unix", socket) {
			return errors.New("nobody listens at " + socket)
		}
		return nil
	})
}

// startTPM starts a TPM and returns its port. That of its control is the next.
func startTPM(t testing.TB, state string) int {
	t.Helper()
	port := twoPorts(t)
	channel := func(port int) string { return fmt.Sprintf("type=tcp,port=%d,bindaddr=127.0.0.1", port) }
	tpm := exec.Command(softTPM, "socket", "--tpm2", "--tpmstate", "dir="+state, "--server", channel(port), "--ctrl", channel(port+1), //nolint:gosec,noctx // the test's end ends it
		"--flags", "not-need-init,startup-clear")
	daemon(t, tpm, func() error {
		if address := net.JoinHostPort("127.0.0.1", strconv.Itoa(port+1)); !listens(t, "tcp", address) {
			return errors.New("nobody listens at " + address)
		}
		return nil
	})
	return port
}

// twoPorts returns the first of two ports of the loopback that follow each other and
// were free.
func twoPorts(t testing.TB) int {
	t.Helper()
	listen := func(port int) (net.Listener, error) {
		return new(net.ListenConfig).Listen(t.Context(), "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	}
	for range 100 {
		first, err := listen(0)
		if err != nil {
			t.Fatal(err)
		}
		port := first.Addr().(*net.TCPAddr).Port
		second, err := listen(port + 1)
		_ = first.Close()
		if err == nil {
			_ = second.Close()
			return port
		}
	}
	t.Fatal("no two free ports follow each other")
	return 0
}
