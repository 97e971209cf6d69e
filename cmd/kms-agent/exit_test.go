package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kms-agent/kms-agent/agent/kms"
)

func agentError(code codes.Code, reason kms.Reason) error {
	st, err := status.New(code, "what happened").WithDetails(&errdetails.ErrorInfo{
		Domain: "kms-agent", Reason: string(reason), Metadata: map[string]string{"request_id": "r1"},
	})
	if err != nil {
		panic(err)
	}
	return st.Err()
}

func TestExitCodeOfEachReason(t *testing.T) {
	for _, c := range []struct {
		code    codes.Code
		reasons []kms.Reason
		want    exitCode
	}{
		{codes.Unauthenticated, []kms.Reason{kms.ReasonUnidentified}, exitDenied},
		{codes.PermissionDenied, []kms.Reason{kms.ReasonAccessDenied}, exitDenied},
		{codes.InvalidArgument, []kms.Reason{kms.ReasonInvalidRequest, kms.ReasonInvalidMessage, kms.ReasonDecryptFailed, kms.ReasonTooLarge, kms.ReasonTruncated}, exitInvalid},
		{codes.FailedPrecondition, []kms.Reason{kms.ReasonKeyUnusable}, exitInvalid},
		{codes.Unavailable, []kms.Reason{kms.ReasonKeySuspended, kms.ReasonBackendDown, kms.ReasonBackendBroken, kms.ReasonQuotaUnavailable, kms.ReasonAuditUnavailable, kms.ReasonShuttingDown}, exitUnavailable},
		{codes.ResourceExhausted, []kms.Reason{kms.ReasonTooManyRequests, kms.ReasonQuotaExceeded}, exitUnavailable},
		{codes.DeadlineExceeded, []kms.Reason{kms.ReasonDeadlineExceeded}, exitUnavailable},
		{codes.Internal, []kms.Reason{kms.ReasonInternal}, exitFailure},
	} {
		for _, reason := range c.reasons {
			t.Run(string(reason), func(t *testing.T) {
				serveFake(t, &fakeAgent{failure: agentError(c.code, reason)})
				command(t, "", "whoami").want(t, c.want,
					fmt.Sprintf("kms-agent: whoami: what happened, request r1 (reason %s)\nhint: %s\n", reason, hintFor(reason)))
			})
		}
	}
}

// What an agent refused is not told as if there were no agent.
func TestHintsOfTheAdminSocket(t *testing.T) {
	const nobody = "is the agent running"
	answered := classify(adminHint(agentError(codes.Unavailable, kms.ReasonBackendDown), "admin.sock"))
	if answered.hint == "" || strings.Contains(answered.hint, nobody) {
		t.Errorf("of an answer: %q", answered.hint)
	}
	if silent := classify(adminHint(status.Error(codes.Unavailable, "connection refused"), "admin.sock")); !strings.Contains(silent.hint, nobody) {
		t.Errorf("of none: %q", silent.hint)
	}
}

func TestEveryReasonHasAHint(t *testing.T) {
	for _, reason := range kms.Reasons() {
		if hintFor(reason) == "" && reason != kms.ReasonCancelled {
			t.Errorf("no hint for %s", reason)
		}
	}
}

// Who is refused is not sent to what refuses as well, or does not know: whoami answers
// nobody whom the agent cannot identify, and a denial by default names no rule.
func TestHintsLeadOn(t *testing.T) {
	if got := hintFor(kms.ReasonUnidentified); strings.Contains(got, "whoami") || !strings.Contains(got, "identity.static_peers") {
		t.Errorf("of a caller without an identity: %q", got)
	}
	if got := hintFor(kms.ReasonAccessDenied); strings.Contains(got, "audit log") {
		t.Errorf("of a denial: %q", got)
	}
	_, explain, ok := strings.Cut(hintFor(kms.ReasonAccessDenied), "kms-agent policy explain ")
	if !ok {
		t.Fatalf("of a denial: %q, want kms-agent policy explain", hintFor(kms.ReasonAccessDenied))
	}
	explained, _, err := newRoot(newApp(os.Stdin, os.Stdout, os.Stderr, os.Getenv)).Find([]string{"policy", "explain"})
	if err != nil {
		t.Fatal(err)
	}
	for word := range strings.FieldsSeq(explain) {
		if name, ok := strings.CutPrefix(word, "--"); ok && explained.Flags().Lookup(name) == nil {
			t.Errorf("kms-agent policy explain has no --%s", name)
		}
	}
}

// TestExitCodesAreDocumented holds docs/cli.md to the table in the code.
func TestExitCodesAreDocumented(t *testing.T) {
	page := read(t, "../../docs/cli.md")
	for _, row := range exitCodes() {
		if line := fmt.Sprintf("| %d | %s |", row.code, row.meaning); !strings.Contains(page, line) {
			t.Errorf("docs/cli.md lacks the row %q", line)
		}
	}
}

// TestCommandsAreDocumented: docs/cli.md names every command and variable.
func TestCommandsAreDocumented(t *testing.T) {
	page := read(t, "../../docs/cli.md")
	root := newRoot(newApp(os.Stdin, os.Stdout, os.Stderr, os.Getenv))
	for _, path := range commandPaths(root) {
		if !strings.Contains(page, "`"+path) {
			t.Errorf("docs/cli.md does not mention %q", path)
		}
	}
	for _, name := range []string{"KMS_AGENT_SOCKET", "KMS_AGENT_ADMIN_SOCKET", "KMS_AGENT_KEYSTORE", "SPIFFE_ENDPOINT_SOCKET", "NO_COLOR"} {
		if !strings.Contains(page, "`"+name+"`") {
			t.Errorf("docs/cli.md does not mention %s", name)
		}
	}
}

func commandPaths(c *cobra.Command) []string {
	var paths []string
	for _, child := range c.Commands() {
		if child.HasSubCommands() {
			paths = append(paths, commandPaths(child)...)
		} else if child.IsAvailableCommand() {
			paths = append(paths, child.CommandPath())
		}
	}
	return paths
}

// TestNobodyOrSomebodyElseAnswers: what gRPC says of a connection becomes what a
// user can do about it.
func TestNobodyOrSomebodyElseAnswers(t *testing.T) {
	dialing := `connection error: desc = "transport: Error while dialing: dial unix /run/kms.sock: connect: `
	for _, c := range []struct {
		code          codes.Code
		message       string
		want          exitCode
		wanted, wants string
	}{
		{codes.Unavailable, dialing + `connection refused"`, exitUnavailable, "cannot reach the agent: dial unix /run/kms.sock: connect: connection refused", hintUnreachable},
		{codes.Unavailable, dialing + `permission denied"`, exitDenied, "cannot reach the agent: dial unix /run/kms.sock: connect: permission denied", hintForbidden},
		{codes.Unavailable, `connection error: desc = "transport: authentication handshake failed: unexpected ID \"x\""`, exitDenied, `the connection was refused: unexpected ID "x"`, hintHandshake},
		{codes.Unimplemented, "unknown service kmsagent.v1.KMS", exitInvalid, "the socket does not know this command: unknown service kmsagent.v1.KMS", hintOtherDoor},
	} {
		got := classify(status.Error(c.code, c.message))
		if got.code != c.want || got.message != c.wanted || got.hint != c.wants {
			t.Errorf("%v %q: code %d, %q, hint %q; want %d, %q, hint %q", c.code, c.message, got.code, got.message, got.hint, c.want, c.wanted, c.wants)
		}
	}
	if got := classify(status.Error(codes.DeadlineExceeded, "context deadline exceeded")); got.message != "no answer in time" || got.code != exitUnavailable {
		t.Errorf("a deadline is %d, %q", got.code, got.message)
	}
}

// TestTemporaryFilesAreNotNamed: errors of an output speak of its own name.
func TestTemporaryFilesAreNotNamed(t *testing.T) {
	a := newApp(os.Stdin, os.Stdout, os.Stderr, os.Getenv)
	path := filepath.Join(t.TempDir(), "out")
	o, err := a.openOutput(t.Context(), path, modeSecret, false)
	if err != nil {
		t.Fatal(err)
	}
	defer o.discard()
	_ = o.pending.File.Close()
	if _, err = o.Write([]byte("x")); err == nil || err.Error() != path+": file already closed" {
		t.Errorf("got %v, want it to name %s alone", err, path)
	}
}
