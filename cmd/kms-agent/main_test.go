package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kms-agent/kms-agent/agent/audit"
)

// TestMain makes the test binary the command itself: for scripts, which find it
// by name, and for agents, which start their built-in plugin by running
// themselves.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && slices.Equal(os.Args[1:3], []string{"plugin", "serve"}) {
		main()
	}
	testscript.Main(m, map[string]func(){"kms-agent": main})
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
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"auditlog": writeAuditLog, "await": await, "exit": exitStatus,
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
	for range 600 {
		_, err := os.Stat(ts.MkAbs(args[0]))
		if (err == nil) != neg {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	ts.Fatalf("%s: waited in vain", args[0])
}

// exitStatus runs a command and demands an exit code: exit 5 kms-agent ...
func exitStatus(ts *testscript.TestScript, _ bool, args []string) {
	err := ts.Exec(args[1], args[2:]...)
	got := "0"
	if err != nil {
		got = regexp.MustCompile(`[0-9]+$`).FindString(err.Error())
	}
	if got != args[0] {
		ts.Fatalf("exit code %s (%v), want %s", got, err, args[0])
	}
}
