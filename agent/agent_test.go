package agent_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kms-agent/kms-agent/agent"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
)

func TestEveryOperationOverTheSocket(t *testing.T) {
	r := newRig(t, configText("PEERS", staticPeer()))
	r.start()
	for _, workload := range []string{"orders", "peer"} {
		t.Run(workload, func(t *testing.T) { everyOperation(t, r.as(workload)) })
	}
	t.Run("random", func(t *testing.T) {
		got, err := r.as("orders").GenerateRandom(t.Context(), &kmsagentv1.GenerateRandomRequest{Length: 24})
		if err != nil || len(got.GetRandom()) != 24 {
			t.Errorf("random = %d bytes, %v", len(got.GetRandom()), err)
		}
		_, err = r.as("peer").GenerateRandom(t.Context(), &kmsagentv1.GenerateRandomRequest{Length: 24})
		wantReason(t, err, "ACCESS_DENIED")
	})
}

func everyOperation(t *testing.T, c *client.Client) {
	ctx := t.Context()
	tenant := map[string]string{"tenant": "acme"}
	plaintext := []byte("hello")
	message, err := c.Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: plaintext, Context: tenant})
	if err != nil {
		t.Fatalf("encrypt: %v", err)
	}
	if u := message.GetKeyUse(); u.GetKey() != "orders" || u.GetKeyVersion() != "1" || u.GetFreshness().GetSource() == 0 {
		t.Errorf("key use = %v", u)
	}
	moved, err := c.ReEncrypt(ctx, &kmsagentv1.ReEncryptRequest{Message: message.GetMessage(), ExpectedContext: tenant})
	if err != nil || bytes.Equal(moved.GetMessage(), message.GetMessage()) {
		t.Fatalf("re-encrypt: %v", err)
	}
	opened, err := c.Decrypt(ctx, &kmsagentv1.DecryptRequest{Message: moved.GetMessage(), ExpectedContext: tenant})
	if err != nil || !bytes.Equal(opened.GetPlaintext(), plaintext) || opened.GetContext()["tenant"] != "acme" {
		t.Errorf("decrypt = %v, %v", opened, err)
	}
	key, err := c.GenerateDataKey(ctx, &kmsagentv1.GenerateDataKeyRequest{Key: "orders", Context: tenant})
	if err != nil || len(key.GetPlaintext()) != 32 || !key.GetUseUntil().AsTime().After(time.Now()) {
		t.Fatalf("data key = %v, %v", key, err)
	}
	again, err := c.DecryptDataKey(ctx, &kmsagentv1.DecryptDataKeyRequest{EncryptedDataKey: key.GetEncryptedDataKey(), Context: tenant})
	if err != nil || !bytes.Equal(again.GetPlaintext(), key.GetPlaintext()) {
		t.Errorf("decrypt data key: %v", err)
	}
	blind, err := c.GenerateDataKeyWithoutPlaintext(ctx, &kmsagentv1.GenerateDataKeyWithoutPlaintextRequest{Key: "orders"})
	if err != nil || len(blind.GetEncryptedDataKey().GetCiphertext()) == 0 {
		t.Errorf("data key without plaintext: %v", err)
	}
	wrapped, err := c.Wrap(ctx, &kmsagentv1.WrapRequest{Key: "orders", Plaintext: []byte("material")})
	if err != nil {
		t.Fatalf("wrap: %v", err)
	}
	unwrapped, err := c.Unwrap(ctx, &kmsagentv1.UnwrapRequest{Wrapped: wrapped.GetWrapped()})
	if err != nil || string(unwrapped.GetPlaintext()) != "material" {
		t.Errorf("unwrap = %q, %v", unwrapped.GetPlaintext(), err)
	}
	described, err := c.DescribeKey(ctx, &kmsagentv1.DescribeKeyRequest{Key: "orders"})
	if err != nil || described.GetKey().GetCurrentVersion() != "1" || len(described.GetKey().GetVersions()) != 1 {
		t.Errorf("describe = %v, %v", described, err)
	}
	listed, err := c.ListKeys(ctx, &kmsagentv1.ListKeysRequest{})
	if err != nil || len(listed.GetKeys()) != 1 {
		t.Errorf("list = %v, %v; want the one key that may be described", listed, err)
	}
	streamRoundTrip(t, c)
}

func streamRoundTrip(t *testing.T, c *client.Client) {
	t.Helper()
	plaintext := bytes.Repeat([]byte("0123456789abcdef"), 20_000)
	var message, opened bytes.Buffer
	if _, err := c.EncryptStream(t.Context(), &kmsagentv1.EncryptStreamStart{Key: "orders"}, bytes.NewReader(plaintext), &message); err != nil {
		t.Fatalf("encrypt stream: %v", err)
	}
	if _, err := c.DecryptStream(t.Context(), &kmsagentv1.DecryptStreamStart{}, bytes.NewReader(message.Bytes()), &opened); err != nil {
		t.Fatalf("decrypt stream: %v", err)
	}
	if !bytes.Equal(opened.Bytes(), plaintext) {
		t.Error("the stream came back different")
	}
	_, err := c.DecryptStream(t.Context(), &kmsagentv1.DecryptStreamStart{}, bytes.NewReader(message.Bytes()[:message.Len()-1]), io.Discard)
	wantReason(t, err, "STREAM_TRUNCATED")
}

func TestWhoIsRefused(t *testing.T) {
	r := newRig(t, configText())
	r.start()
	t.Run("another workload", func(t *testing.T) {
		_, err := r.as("stranger").Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
		e := wantReason(t, err, "ACCESS_DENIED")
		if e.Code != codes.PermissionDenied || e.RequestID == "" || e.Key != "orders" {
			t.Errorf("error = %+v", e)
		}
	})
	t.Run("a peer that nothing is known of", func(t *testing.T) {
		_, err := r.as("peer").WhoAmI(t.Context())
		if e := wantReason(t, err, "CALLER_UNIDENTIFIED"); e.Code != codes.Unauthenticated {
			t.Errorf("code = %v", e.Code)
		}
		if log := r.auditText(); !strings.Contains(log, `"reason":"CALLER_UNIDENTIFIED"`) {
			t.Error("the refusal is not on record")
		}
	})
	t.Run("anybody may ask for the health", func(t *testing.T) {
		conn := r.plain()
		wantHealth(t, conn, grpc_health_v1.HealthCheckResponse_SERVING)
	})
}

// wantHealth waits until the native door's health is as wanted.
func wantHealth(t *testing.T, conn *grpc.ClientConn, want grpc_health_v1.HealthCheckResponse_ServingStatus) {
	t.Helper()
	stream, err := grpc_health_v1.NewHealthClient(conn).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: "kmsagent.v1.KMS"})
	if err != nil {
		t.Fatal(err)
	}
	for {
		got, err := stream.Recv()
		if err != nil {
			t.Fatalf("health never became %v: %v", want, err)
		}
		if got.GetStatus() == want {
			return
		}
	}
}

func (r *rig) auditText() string {
	r.t.Helper()
	text, err := os.ReadFile(r.path("audit.log"))
	if err != nil {
		r.t.Fatal(err)
	}
	return string(text)
}

func (r *rig) plain() *grpc.ClientConn {
	r.t.Helper()
	conn, err := grpc.NewClient("unix:"+r.path("kms.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func TestBadRequests(t *testing.T) {
	r := newRig(t, configText())
	r.start()
	c := r.as("orders")
	ctx := t.Context()
	t.Run("too large", func(t *testing.T) {
		_, err := c.Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: make([]byte, 64<<10+1)})
		wantReason(t, err, "TOO_LARGE")
		_, err = c.Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: make([]byte, 1<<20)})
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("far too large: %v", err)
		}
	})
	t.Run("negative max_stale", func(t *testing.T) {
		_, err := c.Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", MaxStale: durationpb.New(-time.Second)})
		wantReason(t, err, "INVALID_REQUEST")
	})
	t.Run("expired deadline", func(t *testing.T) {
		expired, cancel := context.WithTimeout(ctx, time.Nanosecond)
		defer cancel()
		_, err := c.WhoAmI(expired)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error = %v", err)
		}
	})
	t.Run("stream too long", func(t *testing.T) {
		_, err := c.EncryptStream(ctx, &kmsagentv1.EncryptStreamStart{Key: "orders"}, bytes.NewReader(make([]byte, 4<<20+1)), io.Discard)
		wantReason(t, err, "TOO_LARGE")
	})
	t.Run("stream without a start", func(t *testing.T) {
		stream, err := kmsagentv1.NewKMSClient(r.tls("orders")).EncryptStream(ctx)
		if err != nil {
			t.Fatal(err)
		}
		_ = stream.Send(&kmsagentv1.EncryptStreamRequest{Part: &kmsagentv1.EncryptStreamRequest_Chunk{Chunk: []byte("x")}})
		_, err = stream.Recv()
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("error = %v", err)
		}
		empty, err := kmsagentv1.NewKMSClient(r.tls("orders")).DecryptStream(ctx)
		if err != nil {
			t.Fatal(err)
		}
		_ = empty.CloseSend()
		if _, err = empty.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("a stream of nothing: %v", err)
		}
	})
	t.Run("page token", func(t *testing.T) {
		_, err := c.ListKeys(ctx, &kmsagentv1.ListKeysRequest{PageToken: strings.Repeat("x", 200)})
		wantReason(t, err, "INVALID_REQUEST")
	})
	t.Run("each refusal is on record", func(t *testing.T) {
		if n := strings.Count(r.auditText(), `"reason":"INVALID_REQUEST"`); n != 4 {
			t.Errorf("%d records of invalid requests, want 4", n)
		}
	})
	t.Run("no key and no context", func(t *testing.T) {
		_, err := c.Encrypt(ctx, &kmsagentv1.EncryptRequest{})
		wantReason(t, err, "ACCESS_DENIED")
		_, err = c.Decrypt(ctx, &kmsagentv1.DecryptRequest{})
		wantReason(t, err, "INVALID_MESSAGE")
		_, err = c.Unwrap(ctx, &kmsagentv1.UnwrapRequest{})
		wantReason(t, err, "INVALID_MESSAGE")
		_, err = c.DecryptDataKey(ctx, &kmsagentv1.DecryptDataKeyRequest{EncryptedDataKey: &kmsagentv1.EncryptedDataKey{ProviderId: "kms-agent"}})
		wantReason(t, err, "INVALID_MESSAGE")
	})
}

func TestAStreamThatStandsStillEnds(t *testing.T) {
	r := newRig(t, configText("max_deadline: 5s, default_deadline: 5s", "max_deadline: 300ms, default_deadline: 300ms"))
	r.start()
	stuck, feed := io.Pipe()
	defer func() { _ = feed.Close() }()
	_, err := r.as("orders").EncryptStream(t.Context(), &kmsagentv1.EncryptStreamStart{Key: "orders"}, stuck, io.Discard)
	wantReason(t, err, "DEADLINE_EXCEEDED")
}

func TestTooManyAtOnce(t *testing.T) {
	r := newRig(t, configText("max_deadline: 5s", "max_concurrent_per_caller: 1, max_deadline: 5s"))
	r.start()
	stuck, feed := io.Pipe()
	var first sync.WaitGroup
	c := r.as("orders")
	first.Go(func() {
		_, _ = c.EncryptStream(t.Context(), &kmsagentv1.EncryptStreamStart{Key: "orders"}, stuck, io.Discard)
	})
	if _, err := feed.Write(make([]byte, 200<<10)); err != nil {
		t.Fatal(err)
	}
	_, err := r.as("orders").Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
	if e := wantReason(t, err, "TOO_MANY_REQUESTS"); e.RetryAfter == 0 {
		t.Error("the refusal does not say when to retry")
	}
	_ = feed.Close()
	first.Wait()
}

func TestReload(t *testing.T) {
	r := newRig(t, configText())
	r.start()
	c := r.as("stranger")
	try := func() error {
		_, err := c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
		return err
	}
	wantReason(t, try(), "ACCESS_DENIED")
	generation := r.await("status", func(*adminv1.StatusResponse) bool { return true }).GetConfiguration().GetGeneration()

	t.Run("a policy that changes", func(t *testing.T) {
		r.write(configText("spiffe://example.org/peer", "spiffe://example.org/stranger"))
		r.await("the new configuration", func(s *adminv1.StatusResponse) bool { return s.GetConfiguration().GetGeneration() > generation })
		if err := try(); err != nil {
			t.Errorf("after the reload: %v", err)
		}
	})
	t.Run("a file with faults", func(t *testing.T) {
		r.write(configText("operations: [encrypt", "operations: [encypt"))
		s := r.await("the refusal", func(s *adminv1.StatusResponse) bool {
			return strings.Contains(s.GetConfiguration().GetRejected(), "encypt")
		})
		if s.GetState() != "degraded" {
			t.Errorf("status = %s, %q", s.GetState(), s.GetConfiguration().GetRejected())
		}
		if err := try(); err != nil {
			t.Errorf("a bad file changed something: %v", err)
		}
	})
	t.Run("a change that takes a restart", func(t *testing.T) {
		r.write(configText("file: audit.log", "file: other.log"))
		r.await("the refusal", func(s *adminv1.StatusResponse) bool {
			return strings.Contains(s.GetConfiguration().GetRejected(), "restart")
		})
	})
	t.Run("the first file again", func(t *testing.T) {
		r.write(configText())
		r.await("its use", func(s *adminv1.StatusResponse) bool { return s.GetConfiguration().GetRejected() == "" })
		wantReason(t, try(), "ACCESS_DENIED")
	})
}

// Kubernetes swaps a symbolic link to the directory that the files are in.
func TestReloadBySymbolicLink(t *testing.T) {
	r := newRig(t, configText())
	for name, text := range map[string]string{"one": configText(), "two": configText("spiffe://example.org/peer", "spiffe://example.org/stranger")} {
		// Relative paths in the file are relative to where it is named.
		if err := os.MkdirAll(r.path(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(r.path(name), "kms-agent.yaml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	link := func(target string) {
		if err := errors.Join(os.Symlink(target, r.path("..new")), os.Rename(r.path("..new"), r.path("..data"))); err != nil {
			t.Fatal(err)
		}
	}
	link("one")
	if err := errors.Join(os.Remove(r.config), os.Symlink("..data/kms-agent.yaml", r.config)); err != nil {
		t.Fatal(err)
	}
	r.start()
	_, err := r.as("stranger").Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"})
	wantReason(t, err, "ACCESS_DENIED")
	link("two")
	r.await("the reload", func(s *adminv1.StatusResponse) bool { return s.GetConfiguration().GetGeneration() > 1 })
	if _, err := r.as("stranger").Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"}); err != nil {
		t.Errorf("after the swap: %v", err)
	}
}

func TestABackendThatDies(t *testing.T) {
	r := newRig(t, configText())
	r.start()
	c := r.as("orders")
	encrypt := func() error {
		_, err := c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
		return err
	}
	if err := encrypt(); err != nil {
		t.Fatal(err)
	}
	first := r.await("a process", func(s *adminv1.StatusResponse) bool { return s.GetBackends()[0].GetPid() > 0 }).GetBackends()[0].GetPid()
	if err := syscall.Kill(int(first), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for range 50 {
		if err := encrypt(); err != nil {
			t.Fatalf("a cached data key does not survive its backend: %v", err)
		}
	}
	r.await("another process", func(s *adminv1.StatusResponse) bool {
		b := s.GetBackends()[0]
		return b.GetState() == "up" && b.GetPid() != first && b.GetRestarts() > 0
	})
	if _, err := c.Wrap(t.Context(), &kmsagentv1.WrapRequest{Key: "orders", Plaintext: []byte("x")}); err != nil {
		t.Errorf("after its replacement: %v", err)
	}
}

func TestAdministrationNeedsARule(t *testing.T) {
	r := newRig(t, configText("[{ uid: UID, operations: [status] }]", "[{ uid: UID, operations: [status] }]"))
	r.start()
	r.write(configText("allow: [{ uid: UID, operations: [status] }]", "allow: []"))
	var err error
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline) && err == nil; time.Sleep(20 * time.Millisecond) {
		_, err = r.status()
	}
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("status for nobody's administrator: %v", err)
	}
	if info, err := os.Stat(r.path("admin.sock")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("admin socket: %v, %v; want mode 0600", info.Mode(), err)
	}
}

func TestTwoAgentsDoNotShare(t *testing.T) {
	r := newRig(t, configText())
	r.start()
	cfg, err := agent.LoadConfig(r.config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := agent.New(cfg, r.config, zap.NewNop()); err == nil {
		t.Error("a second agent writes to the same audit log")
	}
}

func TestNothingIsLeftBehind(t *testing.T) {
	r := newRig(t, configText())
	r.start()
	r.stop()
	for _, name := range []string{"kms.sock", "admin.sock"} {
		if _, err := os.Stat(r.path(name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
	left, err := os.ReadDir(r.path("run"))
	if err != nil || len(left) != 0 {
		t.Errorf("left in the runtime directory: %v, %v", left, err)
	}
	if !strings.Contains(r.auditText(), `"operation":"status"`) {
		t.Error("the administrator's calls are not on record")
	}
}

func TestStartsWithoutItsBackend(t *testing.T) {
	r := newRig(t, configText())
	if err := os.Rename(r.path("keystore"), r.path("hidden")); err != nil {
		t.Fatal(err)
	}
	cfg, err := agent.LoadConfig(r.config)
	if err != nil {
		t.Fatal(err)
	}
	a, err := agent.New(cfg, r.config, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r.cancel, r.done = cancel, make(chan error, 1)
	go func() { r.done <- a.Run(ctx) }()
	defer r.stop()
	s := r.await("the state is told", func(s *adminv1.StatusResponse) bool {
		return s.GetState() == "not-serving" && s.GetIdentity().GetState() == "ready"
	})
	if !strings.Contains(strings.Join(s.GetProblems(), "\n"), "keystore") {
		t.Errorf("problems = %q, want what is wrong with the keystore", s.GetProblems())
	}
	_, err = r.as("orders").Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"})
	wantReason(t, err, "BACKEND_UNAVAILABLE")
	wantHealth(t, r.plain(), grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	if err := os.Rename(r.path("hidden"), r.path("keystore")); err != nil {
		t.Fatal(err)
	}
	r.await("recovery", func(s *adminv1.StatusResponse) bool { return s.GetState() == "serving" })
	wantHealth(t, r.plain(), grpc_health_v1.HealthCheckResponse_SERVING)
}
