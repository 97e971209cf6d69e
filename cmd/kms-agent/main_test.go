package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/agent/audit"
)

// TestMain makes the test binary the command itself: for scripts, which find it
// by name, and for agents, which start their built-in plugin by running
// themselves.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && slices.Equal(os.Args[1:3], []string{"plugin", "serve"}) {
		main()
	}
	testscript.Main(m, map[string]func(){"kms-agent": main, "hardened": hardened, "mortal": mortal})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("KMS_AGENT_SOCKET", filepath.Join(e.WorkDir, "kms.sock"))
			e.Setenv("KMS_AGENT_ADMIN_SOCKET", filepath.Join(e.WorkDir, "admin.sock"))
			return nil
		},
		Condition: func(name string) (bool, error) {
			if name != "root" {
				return false, fmt.Errorf("unknown condition %q", name)
			}
			return os.Geteuid() == 0, nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"auditlog": writeAuditLog, "await": await, "await-lines": awaitLines, "exit": exitStatus,
			"subst": substitute, "retry": retry, "retry-until": retryUntil, "signal": signalBackground,
			"notify": notify, "notified": notified,
		},
	})
}

// writeAuditLog makes an audit log of some records, in audit.log, and its
// initial key, in audit.key.
func writeAuditLog(ts *testscript.TestScript, _ bool, _ []string) {
	state := ts.MkAbs("state")
	ts.Check(os.Mkdir(state, 0o700))
	log, err := audit.Open(audit.Config{Path: ts.MkAbs("audit.log"), StateDir: state, InitialKeyPath: ts.MkAbs("audit.key")})
	ts.Check(err)
	for i := range 5 {
		ts.Check(log.Write(context.Background(), &audit.Record{
			Kind: audit.KindOperation, Operation: "encrypt", Key: fmt.Sprintf("key-%d", i), Outcome: audit.Success,
		}))
	}
	ts.Check(log.Close())
}

// await waits until a file is there, for half a minute at most.
func await(ts *testscript.TestScript, neg bool, args []string) {
	repeat(ts, func() bool {
		_, err := os.Stat(ts.MkAbs(args[0]))
		return (err == nil) != neg
	})
}

// awaitLines waits until a file has so many lines.
func awaitLines(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	repeat(ts, func() bool {
		text, err := os.ReadFile(ts.MkAbs(args[1]))
		return err == nil && strings.Count(string(text), "\n") >= want
	})
}

// substitute puts the user's number for $UID in a file.
func substitute(ts *testscript.TestScript, _ bool, args []string) {
	text := strings.ReplaceAll(ts.ReadFile(args[0]), "$UID", strconv.Itoa(os.Getuid()))
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(text), 0o600))
}

// hardened is a command that hardens itself and prints what the kernel says.
func hardened() {
	if err := harden(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	var core unix.Rlimit
	err = errors.Join(err, unix.Getrlimit(unix.RLIMIT_CORE, &core))
	fmt.Printf("dumpable=%d core=%d,%d umask=%04o %v\n", dumpable, core.Cur, core.Max, unix.Umask(0), err)
}

// mortal is kms-agent without root's power to pass over the modes of files.
func mortal() {
	runtime.LockOSThread() // capabilities are the thread's, and go on from this one
	if os.Geteuid() == 0 {
		for _, capability := range []uintptr{unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH} {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0); err != nil {
				fmt.Println(err)
				os.Exit(99)
			}
		}
	}
	path, err := exec.LookPath("kms-agent")
	if err == nil {
		err = unix.Exec(path, append([]string{"kms-agent"}, os.Args[1:]...), os.Environ())
	}
	fmt.Println(err)
	os.Exit(99)
}

// notify gives the commands that follow a service manager to tell their state.
func notify(ts *testscript.TestScript, _ bool, _ []string) {
	path := ts.MkAbs("notify.sock")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	ts.Check(err)
	ts.Defer(func() { _ = conn.Close() })
	ts.Setenv("NOTIFY_SOCKET", path)
	notifications.Store(ts.Getenv("WORK"), conn)
}

// notifications has the connection of each script's service manager.
var notifications sync.Map

// notified demands the next message to the service manager.
func notified(ts *testscript.TestScript, _ bool, args []string) {
	found, ok := notifications.Load(ts.Getenv("WORK"))
	if !ok {
		ts.Fatalf("notify comes first")
	}
	conn := found.(*net.UnixConn)
	ts.Check(conn.SetReadDeadline(time.Now().Add(30 * time.Second)))
	message := make([]byte, 1024)
	n, err := conn.Read(message)
	ts.Check(err)
	if got := string(message[:n]); !regexp.MustCompile("^" + args[0] + "$").MatchString(got) {
		ts.Fatalf("the service manager was told %q, want %q", got, args[0])
	}
}

// signalBackground sends a signal to what runs in the background: signal HUP.
func signalBackground(ts *testscript.TestScript, _ bool, args []string) {
	for _, c := range ts.BackgroundCmds() {
		ts.Check(c.Process.Signal(unix.SignalNum("SIG" + args[0])))
	}
}

// retry runs a command until it succeeds; meanwhile it may fail with one exit
// code and no other: retry 4 kms-agent ...
func retry(ts *testscript.TestScript, _ bool, args []string) {
	repeat(ts, func() bool {
		err := ts.Exec(args[1], args[2:]...)
		if code := codeIn(err); err != nil && code != args[0] {
			ts.Fatalf("exit code %s (%v), want 0, or %s for a while", code, err, args[0])
		}
		return err == nil
	})
}

// retryUntil runs a command until its output holds a text.
func retryUntil(ts *testscript.TestScript, _ bool, args []string) {
	repeat(ts, func() bool {
		ts.Check(ts.Exec(args[1], args[2:]...))
		return strings.Contains(ts.ReadFile("stdout"), args[0])
	})
}

// repeat asks done again and again, for half a minute at most.
func repeat(ts *testscript.TestScript, done func() bool) {
	for range 600 {
		if done() {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	ts.Fatalf("waited in vain")
}

// codeIn is the exit code in an error of TestScript.Exec.
func codeIn(err error) string {
	if err == nil {
		return "0"
	}
	return regexp.MustCompile(`[0-9]+$`).FindString(err.Error())
}

// exitStatus runs a command and demands an exit code: exit 5 kms-agent ...
func exitStatus(ts *testscript.TestScript, _ bool, args []string) {
	err := ts.Exec(args[1], args[2:]...)
	if got := codeIn(err); got != args[0] {
		ts.Fatalf("exit code %s (%v), want %s", got, err, args[0])
	}
}
