package main

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
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
	t.Cleanup(func() { goleak.VerifyNone(t) })
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
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Errorf("fake agent: %v", err)
		}
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
	o, err := a.openOutput(t.Context(), path, modeSecret, false)
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

// TestInterrupted: a signal ends what waits, with its code and without a file.
func TestInterrupted(t *testing.T) {
	f := &fakeAgent{}
	serveFake(t, f)
	dir := t.TempDir()
	stderr := create(t, filepath.Join(t.TempDir(), "err"))
	for _, args := range [][]string{
		{"encrypt", "--key", "orders", "--out", filepath.Join(dir, "out")}, {"wrap", "--key", "orders"}, {"check", "-"},
	} {
		// Of its own: a command closes what it was given to read.
		silent, keepOpen, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		a := newApp(silent, os.Stdout, stderr, os.Getenv)
		root := newRoot(a)
		root.SetArgs(args)
		ended := make(chan int)
		go func() {
			c, err := root.ExecuteContextC(ctx)
			ended <- a.fail(ctx, c, err)
		}()
		if args[0] == "encrypt" {
			<-f.starts // under way
		}
		cancel()
		if code := <-ended; code != int(exitInterrupted) {
			t.Errorf("%v: exit code %d, want %d: %s", args, code, exitInterrupted, read(t, stderr.Name()))
		}
		// The reads that were left behind end with their pipe.
		if err := errors.Join(keepOpen.Close(), silent.Close()); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("directory holds %v, %v, want nothing", entries, err)
	}
}
