package hsmtest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"
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

// SoftTPM is a token of tpm2-pkcs11 on a TPM in software. Its keys are of RSA, always
// on the token and able to sign.
type SoftTPM struct {
	*Token

	t     testing.TB
	state string
	port  int
	tpm   *exec.Cmd
}

// TPM2 makes a token of tpm2-pkcs11 on a TPM in software, which a broker shares on a
// message bus of the test's own. objects is how many of them the broker lets a process
// have in the TPM, 0 for as many as it does by itself: 27. A key has two, and the
// module lets go of none before C_Finalize. Three wrong PINs lock the token. Env must
// be set before C_Initialize; for the test it is.
//
// The token takes private data objects, but a process sees only those that were there
// at its C_Initialize.
func TPM2(t testing.TB, objects int) *SoftTPM {
	t.Helper()
	k := &SoftTPM{Token: newToken(t, "pkcs11/libtpm2_pkcs11.so", PIN, OfficerPIN, busDaemon, busSend, softTPM, tpmBroker, tpmTool), t: t}
	k.state = k.Path("tpm")
	store, bus := k.Path("store"), k.Path("bus")
	for _, dir := range []string{k.state, store} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	k.startBus(t, bus)
	k.port = twoPorts(t)
	k.Start()
	for name, value := range map[string]string{
		"DBUS_SESSION_BUS_ADDRESS": "unix:path=" + bus,
		"TPM2_PKCS11_STORE":        store,
		"TPM2_PKCS11_TCTI":         "tabrmd:bus_type=session",
		"TPM2TOOLS_TCTI":           "tabrmd:bus_type=session",
	} {
		t.Setenv(name, value)
		k.Env = append(k.Env, name+"="+value)
	}
	k.startBroker(objects)
	run(t, tpmTool, "init", "--path", store)
	run(t, tpmTool, "addtoken", "--pid", "1", "--label", k.Label, "--sopin", k.OfficerPIN, "--userpin", k.PIN, "--path", store)
	k.Write, k.Sockets = []string{store}, []string{bus}
	return k
}

func (k *SoftTPM) startBroker(objects int) {
	k.t.Helper()
	args := []string{"--session", "--allow-root", "--tcti", fmt.Sprintf("swtpm:host=127.0.0.1,port=%d", k.port)}
	if objects > 0 {
		args = append(args, fmt.Sprintf("--max-transients=%d", objects))
	}
	daemon(k.t, exec.Command(tpmBroker, args...), func() error { //nolint:gosec,noctx // the test's end ends it
		return exec.CommandContext(k.t.Context(), busSend, "--session", "--print-reply", "--dest=org.freedesktop.DBus", "/", "org.freedesktop.DBus.GetNameOwner", "string:"+brokerName).Run()
	})
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

// Start starts the TPM, at first or after Kill. It is the one that it was.
func (k *SoftTPM) Start() {
	k.t.Helper()
	channel := func(port int) string { return fmt.Sprintf("type=tcp,port=%d,bindaddr=127.0.0.1", port) }
	k.tpm = exec.Command(softTPM, "socket", "--tpm2", "--tpmstate", "dir="+k.state, "--server", channel(k.port), "--ctrl", channel(k.port+1), //nolint:gosec,noctx // the test's end ends it
		"--flags", "not-need-init,startup-clear")
	daemon(k.t, k.tpm, func() error {
		if address := k.control(); !listens(k.t, "tcp", address) {
			return errors.New("nobody listens at " + address)
		}
		return nil
	})
}

// Kill ends the TPM as SIGKILL does. The broker stays.
func (k *SoftTPM) Kill() {
	k.t.Helper()
	if err := k.tpm.Process.Kill(); err != nil {
		k.t.Fatal(err)
	}
	for deadline := time.Now().Add(daemonPatience); listens(k.t, "tcp", k.control()); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			k.t.Fatal("the TPM does not end")
		}
	}
}

// control is the address of the TPM's control. Its port follows that of the TPM.
func (k *SoftTPM) control() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(k.port+1)) }

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
