package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kms-agent/kms-agent/agent/kms"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

// fakeAgent "encrypts" by a mark before the plaintext, and fails when told to.
type fakeAgent struct {
	kmsagentv1.UnimplementedKMSServer
	// breakAfter ends a stream with failure after so many bytes; 0: never.
	breakAfter int
	failure    error
	starts     chan *kmsagentv1.EncryptStreamStart
}

const mark = "ciphertext:"

func (f *fakeAgent) EncryptStream(s grpc.BidiStreamingServer[kmsagentv1.EncryptStreamRequest, kmsagentv1.EncryptStreamResponse]) error {
	first, err := s.Recv()
	if err != nil {
		return err
	}
	f.starts <- first.GetStart()
	if f.failure != nil && f.breakAfter == 0 {
		return f.failure
	}
	use := &kmsagentv1.KeyUse{Key: "orders", KeyVersion: "3", Freshness: &kmsagentv1.Freshness{
		Source: kmsagentv1.Freshness_SOURCE_CACHED, Age: durationpb.New(3 * time.Second),
	}}
	if err := s.Send(&kmsagentv1.EncryptStreamResponse{Part: &kmsagentv1.EncryptStreamResponse_KeyUse{KeyUse: use}}); err != nil {
		return err
	}
	chunk := []byte(mark)
	for sent := 0; ; {
		if err := s.Send(&kmsagentv1.EncryptStreamResponse{Part: &kmsagentv1.EncryptStreamResponse_Chunk{Chunk: chunk}}); err != nil {
			return err
		}
		if sent += len(chunk); f.breakAfter > 0 && sent >= f.breakAfter {
			return f.failure
		}
		next, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		chunk = next.GetChunk()
	}
}

func (f *fakeAgent) WhoAmI(context.Context, *kmsagentv1.WhoAmIRequest) (*kmsagentv1.WhoAmIResponse, error) {
	return nil, f.failure
}

// Decrypting is removing the mark; the error path is what matters here.
func (f *fakeAgent) DecryptStream(s grpc.BidiStreamingServer[kmsagentv1.DecryptStreamRequest, kmsagentv1.DecryptStreamResponse]) error {
	if _, err := s.Recv(); err != nil {
		return err
	}
	header := &kmsagentv1.DecryptStreamHeader{KeyUse: &kmsagentv1.KeyUse{Key: "orders", KeyVersion: "3"}, Context: map[string]string{"tenant": "acme"}}
	if err := s.Send(&kmsagentv1.DecryptStreamResponse{Part: &kmsagentv1.DecryptStreamResponse_Header{Header: header}}); err != nil {
		return err
	}
	skip := len(mark)
	for sent := 0; ; {
		next, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		chunk := next.GetChunk()[skip:]
		skip = 0
		if err := s.Send(&kmsagentv1.DecryptStreamResponse{Part: &kmsagentv1.DecryptStreamResponse_Chunk{Chunk: chunk}}); err != nil {
			return err
		}
		if sent += len(chunk); f.breakAfter > 0 && sent >= f.breakAfter {
			return f.failure
		}
	}
}

// serveFake starts the fake and points the commands at it.
func serveFake(t *testing.T, f *fakeAgent) {
	t.Helper()
	f.starts = make(chan *kmsagentv1.EncryptStreamStart, 10)
	socket := filepath.Join(t.TempDir(), "kms.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	kmsagentv1.RegisterKMSServer(server, f)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		<-served
	})
	t.Setenv("KMS_AGENT_SOCKET", socket)
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
}

// result is what one command did.
type result struct {
	code     int
	out, err string
}

// command runs a command in this process, with in as its standard input.
func command(t *testing.T, in string, args ...string) result {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "in"), []byte(in), 0o600); err != nil {
		t.Fatal(err)
	}
	stdin, err := os.Open(filepath.Join(dir, "in"))
	if err != nil {
		t.Fatal(err)
	}
	stdout, stderr := create(t, filepath.Join(dir, "out")), create(t, filepath.Join(dir, "err"))
	code := run(args, stdin, stdout, stderr)
	return result{code, read(t, stdout.Name()), read(t, stderr.Name())}
}

func create(t *testing.T, path string) *os.File {
	t.Helper()
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	return file
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func (r result) want(t *testing.T, code exitCode, stderr ...string) {
	t.Helper()
	if r.code != int(code) {
		t.Errorf("exit code %d, want %d; standard error: %s", r.code, code, r.err)
	}
	for _, text := range stderr {
		if !strings.Contains(r.err, text) {
			t.Errorf("standard error lacks %q: %s", text, r.err)
		}
	}
}

func TestEncryptAndDecryptFiles(t *testing.T) {
	f := &fakeAgent{}
	serveFake(t, f)
	dir := t.TempDir()
	plain, sealed, opened := filepath.Join(dir, "plain"), filepath.Join(dir, "sealed"), filepath.Join(dir, "opened")
	content := strings.Repeat("0123456789", 30_000)
	if err := os.WriteFile(plain, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	command(t, "", "encrypt", "-v", "--key", "orders", "--context", "tenant=acme", "--max-stale", "0s", "--in", plain, "--out", sealed).
		want(t, exitOK, "orders version 3, cached, confirmed 3s ago")
	start := <-f.starts
	if start.GetKey() != "orders" || start.GetContext()["tenant"] != "acme" || start.GetLengthLimit() != uint64(len(content)) {
		t.Errorf("start = %v, want key, context and the file's length", start)
	}
	if start.MaxStale == nil || start.GetMaxStale().AsDuration() != 0 {
		t.Errorf("max_stale = %v, want a present zero", start.MaxStale)
	}
	if got := read(t, sealed); got != mark+content {
		t.Errorf("%d bytes of ciphertext, want %d", len(got), len(mark+content))
	}
	command(t, "", "decrypt", "-v", "--in", sealed, "--out", opened).want(t, exitOK, "tenant=acme")
	if got := read(t, opened); got != content {
		t.Errorf("%d bytes of plaintext, want %d", len(got), len(content))
	}
	info, err := os.Stat(opened)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode of plaintext = %v, %v, want 0600", info.Mode(), err)
	}
	command(t, "", "decrypt", "--in", sealed, "--out", opened).want(t, exitInvalid, "exists already", "--force")
	command(t, "", "decrypt", "--in", sealed, "--out", opened, "--force").want(t, exitOK)
	r := command(t, mark+"piped", "decrypt")
	if r.want(t, exitOK); r.out != "piped" || r.err != "" {
		t.Errorf("output %q, error %q, want the plaintext alone", r.out, r.err)
	}
}

func TestAbsentMaxStaleIsAbsent(t *testing.T) {
	f := &fakeAgent{}
	serveFake(t, f)
	command(t, "x", "encrypt", "--key", "orders").want(t, exitOK)
	if start := <-f.starts; start.MaxStale != nil {
		t.Errorf("max_stale = %v, want none", start.MaxStale)
	}
}

// TestBrokenStreamLeavesNoFile: when the agent fails midway, a file does not
// appear, an old one stays, and nothing is left behind; a pipe is told about.
func TestBrokenStreamLeavesNoFile(t *testing.T) {
	f := &fakeAgent{breakAfter: 70_000, failure: agentError(codes.Unavailable, kms.ReasonBackendDown)}
	serveFake(t, f)
	content := strings.Repeat("x", 300_000)
	for _, verb := range [][]string{{"encrypt", "--key", "orders"}, {"decrypt"}} {
		dir := t.TempDir()
		out := filepath.Join(dir, "out")
		command(t, mark+content, append(verb, "--out", out)...).want(t, exitUnavailable, "(reason BACKEND_UNAVAILABLE)", "hint: ")
		if err := os.WriteFile(out, []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		command(t, mark+content, append(verb, "--out", out, "--force")...).want(t, exitUnavailable)
		if got := read(t, out); got != "old" {
			t.Errorf("%s: the old file holds %d bytes, want what it had", verb[0], len(got))
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 {
			t.Errorf("%s: directory holds %v, %v, want the old file alone", verb[0], entries, err)
		}
		r := command(t, mark+content, verb...)
		r.want(t, exitIncomplete, "the output is incomplete, throw its "+strconv.Itoa(len(r.out))+" bytes away")
	}
}

func TestNothingWrittenIsNotIncomplete(t *testing.T) {
	serveFake(t, &fakeAgent{failure: agentError(codes.PermissionDenied, kms.ReasonAccessDenied)})
	r := command(t, "x", "encrypt", "--key", "orders")
	if r.want(t, exitDenied, "kms-agent: encrypt: ", "(reason ACCESS_DENIED)", "kms-agent whoami"); r.out != "" {
		t.Errorf("output = %q", r.out)
	}
}

// TestLateCompetitor: what appears under the output's name while the stream runs
// is not overwritten without --force.
func TestLateCompetitor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out")
	a := newApp(os.Stdin, os.Stdout, os.Stderr, os.Getenv)
	o, err := a.openOutput(path, modeSecret, false)
	if err != nil {
		t.Fatal(err)
	}
	defer o.discard()
	if err := os.WriteFile(path, []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := o.commit(); classify(err).code != exitInvalid {
		t.Errorf("commit = %v, want a refusal", err)
	}
	if got := read(t, path); got != "other" {
		t.Errorf("file = %q, want the competitor's", got)
	}
}

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
		{codes.Unavailable, []kms.Reason{kms.ReasonKeySuspended, kms.ReasonBackendDown, kms.ReasonBackendBroken, kms.ReasonAuditUnavailable, kms.ReasonShuttingDown}, exitUnavailable},
		{codes.ResourceExhausted, []kms.Reason{kms.ReasonTooManyRequests}, exitUnavailable},
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

func TestEveryReasonHasAHint(t *testing.T) {
	for _, reason := range kms.Reasons() {
		if hintFor(reason) == "" && reason != kms.ReasonCancelled {
			t.Errorf("no hint for %s", reason)
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

// terminal opens a pseudo-terminal: what a command writes to the second file
// comes out of the first.
func terminal(t *testing.T) (outer, inner *os.File) {
	t.Helper()
	outer, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = outer.Close() })
	if err := unix.IoctlSetPointerInt(int(outer.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(outer.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	inner, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = inner.Close() })
	return outer, inner
}

func TestCiphertextStaysOffTheTerminal(t *testing.T) {
	serveFake(t, &fakeAgent{})
	_, inner := terminal(t)
	stderr := create(t, filepath.Join(t.TempDir(), "err"))
	for _, args := range [][]string{
		{"encrypt", "--key", "orders"}, {"reencrypt"}, {"unwrap"}, {"random", "8", "--encoding", "raw"},
	} {
		if code := run(args, os.Stdin, inner, stderr); code != int(exitUsage) {
			t.Errorf("%v: exit code %d, want %d", args, code, exitUsage)
		}
	}
	if got := read(t, stderr.Name()); strings.Count(got, "standard output a terminal") != 4 {
		t.Errorf("standard error = %s", got)
	}
}

func TestColoursOnlyOnTerminals(t *testing.T) {
	_, inner := terminal(t)
	file := create(t, filepath.Join(t.TempDir(), "file"))
	environment := map[string]string{"TERM": "xterm"}
	a := newApp(os.Stdin, inner, file, func(name string) string { return environment[name] })
	if !a.colours(inner) || a.colours(file) {
		t.Errorf("colours: terminal %v, file %v, want true, false", a.colours(inner), a.colours(file))
	}
	environment["NO_COLOR"] = "1"
	if a.colours(inner) {
		t.Error("colours although NO_COLOR is set")
	}
}

func TestTable(t *testing.T) {
	table := &table{}
	table.header("KEY", "STATE")
	table.row("schlüssel", "up")
	table.row("evil\x1b[2J", "down")
	want := "KEY            STATE\nschlüssel      up\n\"evil\\x1b[2J\"  down\n"
	if got := table.render(false); got != want {
		t.Errorf("table:\n%q, want\n%q", got, want)
	}
	coloured := table.render(true)
	for _, code := range []string{"\x1b[32mup\x1b[0m", "\x1b[31mdown\x1b[0m", "\x1b[1mKEY"} {
		if !strings.Contains(coloured, code) {
			t.Errorf("coloured table lacks %q: %q", code, coloured)
		}
	}
}

func TestProgress(t *testing.T) {
	for _, c := range []struct {
		done, total int64
		want        string
	}{
		{5 << 20, -1, "5.0 MiB, 2.5 MiB/s"},
		{5 << 20, 10 << 20, " 50%  5.0 MiB of 10.0 MiB, 2.5 MiB/s, 2s left"},
		{10, 10, "100%  10 B of 10 B, 5 B/s"},
	} {
		if got := progressLine(c.done, c.total, 2*time.Second); got != c.want {
			t.Errorf("progress = %q, want %q", got, c.want)
		}
	}
	var shown bytes.Buffer
	p := startProgress(strings.NewReader("short"), 5, &shown, true)
	if _, err := io.Copy(io.Discard, p); err != nil {
		t.Fatal(err)
	}
	p.stop()
	p.stop()
	if shown.Len() != 0 || p.done.Load() != 5 {
		t.Errorf("a short transfer showed %q and counted %d", shown.String(), p.done.Load())
	}
}

func TestProgressOfALongTransfer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var shown bytes.Buffer
		p := startProgress(strings.NewReader(strings.Repeat("x", 2048)), 4096, &shown, true)
		if _, err := io.Copy(io.Discard, p); err != nil {
			t.Fatal(err)
		}
		time.Sleep(999 * time.Millisecond)
		synctest.Wait()
		if shown.Len() != 0 {
			t.Errorf("%q is shown before a second is over", shown.String())
		}
		time.Sleep(time.Second)
		synctest.Wait()
		p.stop()
		if got := shown.String(); !strings.Contains(got, " 50%  2.0 KiB of 4.0 KiB") || !strings.HasSuffix(got, "\r\x1b[K") {
			t.Errorf("shown: %q, want a line that is removed at the end", got)
		}
	})
}

func TestParseWrapped(t *testing.T) {
	const edk = `{"provider_id":"kms-agent","provider_info":"AQ==","ciphertext":"AgM="}`
	for _, document := range []string{edk, `{"encrypted_data_key":` + edk + `,"plaintext":"","key_use":null}`, `{"wrapped":` + edk + `}`} {
		got, err := parseWrapped([]byte(document))
		if err != nil || got.GetProviderId() != "kms-agent" || !bytes.Equal(got.GetCiphertext(), []byte{2, 3}) {
			t.Errorf("%s = %v, %v", document, got, err)
		}
	}
	for _, document := range []string{"", "{}", "[]", `{"wrapped":{}}`, "text", `{"wrapped":5}`} {
		if got, err := parseWrapped([]byte(document)); err == nil {
			t.Errorf("%q = %v, want an error", document, got)
		}
	}
}

func TestVersionIsJSON(t *testing.T) {
	r := command(t, "", "version", "--output", "json")
	var v versionInfo
	if err := json.Unmarshal([]byte(r.out), &v); err != nil || v.Go == "" || v.FIPS140 == "" {
		t.Errorf("version = %s, %v", r.out, err)
	}
}
