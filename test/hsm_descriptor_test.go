package test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The PIN in a file that was opened for the agent, as systemd does with OpenFile=: the
// plugin has it, nothing names its path, and a plugin that is started again has it too.
func TestPINThatTheServiceManagerOpened(t *testing.T) {
	dependOnSource(t)
	a := newHSMAgent(t, false)
	config, err := os.ReadFile(a.config)
	if err != nil {
		t.Fatal(err)
	}
	dir := a.soft.Dir()
	second := strings.NewReplacer(
		dir+"/state", dir+"/state2", dir+"/run", dir+"/run2", "kms.sock", "kms2.sock", "admin.sock", "admin2.sock", "audit.log", "audit2.log", "audit-initial", "audit2-initial",
		"pin_file: "+a.soft.PINFile(), "pin_descriptor: hsm-pin", "    access: { read: ["+dir+",", "    descriptors: [hsm-pin]\n    access: { read: ["+a.soft.Path("softhsm2.conf")+",",
	).Replace(string(config))
	a.soft.Write("second.yaml", second)
	for _, d := range []string{"state2", "run2"} {
		if err := os.Mkdir(a.soft.Path(d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command(a.agent, "run", "--config", a.soft.Path("second.yaml")).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "OpenFile=PATH:hsm-pin:read-only") {
		t.Errorf("an agent that was not handed it: %v\n%s", err, out)
	}
	var log bytes.Buffer
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=hsm-pin exec "$0" run --config "$1" 3<"$2"`, a.agent, a.soft.Path("second.yaml"), a.soft.PINFile())
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Errorf("the agent: %v\n%s", err, log.Bytes())
		}
	})
	socket := "--admin-socket=" + a.soft.Path("admin2.sock")
	serving := func() {
		t.Helper()
		within(t, "the agent serves", func() bool {
			out, err := exec.Command(a.agent, "status", socket).Output()
			return err == nil && bytes.Contains(out, []byte("serving"))
		})
	}
	serving()
	a.run("plugin", "restart", "hsm", socket)
	serving()
	out, err = exec.Command("/bin/sh", "-c", fmt.Sprintf("tr '\\0' '\\n' </proc/%d/environ | grep -c LISTEN_FDNAMES=", cmd.Process.Pid)).Output()
	if err != nil || strings.TrimSpace(string(out)) != "1" {
		t.Errorf("the agent was not started as systemd starts it: %s, %v", out, err)
	}
	if status := string(a.run("status", socket)); !strings.Contains(status, "backend hsm    up") {
		t.Error(status)
	}
}

func within(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if is() {
			return
		}
	}
	t.Fatalf("waited in vain: %s", what)
}
