package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/identity"
	"github.com/kms-agent/kms-agent/identity/issuer"
)

type spiffeID = spiffeid.ID

const patience = 20 * time.Second

// TestMain runs the tests, and the examples beside a real agent.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(mainFunc(func() int {
		a, err := startDevAgent()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer a.remove()
		// Where a process on a host finds its agent and its identity.
		for name, value := range map[string]string{"KMS_AGENT_SOCKET": a.socket(), "SPIFFE_ENDPOINT_SOCKET": a.workload("orders")} {
			if err := os.Setenv(name, value); err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
		}
		devAgent = a
		return m.Run()
	}))
}

type mainFunc func() int

func (f mainFunc) Run() int { return f() }

var (
	domain  = spiffeid.RequireTrustDomainFromString("dev.local")
	agentID = spiffeid.RequireFromString("spiffe://dev.local/kms-agent")
	orders  = spiffeid.RequireFromString("spiffe://dev.local/orders")
)

func patiently(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// mask stands in for encryption: it is its own inverse.
const mask = 0x5a

func masked(b []byte) []byte {
	out := make([]byte, len(b))
	for i := range b {
		out[i] = b[i] ^ mask
	}
	return out
}

// kms is a service that answers with what it was asked, or with fail, and whose
// streams do what the test says.
type kms struct {
	kmsagentv1.UnimplementedKMSServer
	fail    error
	encrypt func(grpc.BidiStreamingServer[kmsagentv1.EncryptStreamRequest, kmsagentv1.EncryptStreamResponse]) error

	mu      sync.Mutex
	asked   []any // mu guards asked
	aborted chan error
}

func (k *kms) note(request any) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asked = append(k.asked, request)
}

func (k *kms) lastAsked() any {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.asked) == 0 {
		return nil
	}
	return k.asked[len(k.asked)-1]
}

var (
	use = &kmsagentv1.KeyUse{Key: "orders", KeyVersion: "3"}
	edk = &kmsagentv1.EncryptedDataKey{ProviderId: "kms-agent", Ciphertext: []byte{1, 2}}
)

func answer[A any](k *kms, request any, a *A) (*A, error) {
	k.note(request)
	if k.fail != nil {
		return nil, k.fail
	}
	return a, nil
}

func (k *kms) Encrypt(_ context.Context, r *kmsagentv1.EncryptRequest) (*kmsagentv1.EncryptResponse, error) {
	return answer(k, r, &kmsagentv1.EncryptResponse{Message: masked(r.GetPlaintext()), KeyUse: use})
}

func (k *kms) Decrypt(_ context.Context, r *kmsagentv1.DecryptRequest) (*kmsagentv1.DecryptResponse, error) {
	return answer(k, r, &kmsagentv1.DecryptResponse{Plaintext: masked(r.GetMessage()), KeyUse: use})
}

func (k *kms) ReEncrypt(_ context.Context, r *kmsagentv1.ReEncryptRequest) (*kmsagentv1.ReEncryptResponse, error) {
	return answer(k, r, &kmsagentv1.ReEncryptResponse{Message: r.GetMessage(), Source: use, Destination: use})
}

func (k *kms) GenerateDataKey(_ context.Context, r *kmsagentv1.GenerateDataKeyRequest) (*kmsagentv1.GenerateDataKeyResponse, error) {
	return answer(k, r, &kmsagentv1.GenerateDataKeyResponse{EncryptedDataKey: edk, KeyUse: use})
}

func (k *kms) GenerateDataKeyWithoutPlaintext(_ context.Context, r *kmsagentv1.GenerateDataKeyWithoutPlaintextRequest) (*kmsagentv1.GenerateDataKeyWithoutPlaintextResponse, error) {
	return answer(k, r, &kmsagentv1.GenerateDataKeyWithoutPlaintextResponse{EncryptedDataKey: edk, KeyUse: use})
}

func (k *kms) DecryptDataKey(_ context.Context, r *kmsagentv1.DecryptDataKeyRequest) (*kmsagentv1.DecryptDataKeyResponse, error) {
	return answer(k, r, &kmsagentv1.DecryptDataKeyResponse{KeyUse: use})
}

func (k *kms) Wrap(_ context.Context, r *kmsagentv1.WrapRequest) (*kmsagentv1.WrapResponse, error) {
	return answer(k, r, &kmsagentv1.WrapResponse{Wrapped: edk, KeyUse: use})
}

func (k *kms) Unwrap(_ context.Context, r *kmsagentv1.UnwrapRequest) (*kmsagentv1.UnwrapResponse, error) {
	return answer(k, r, &kmsagentv1.UnwrapResponse{KeyUse: use})
}

func (k *kms) GenerateRandom(_ context.Context, r *kmsagentv1.GenerateRandomRequest) (*kmsagentv1.GenerateRandomResponse, error) {
	return answer(k, r, &kmsagentv1.GenerateRandomResponse{Random: make([]byte, r.GetLength())})
}

func (k *kms) DescribeKey(_ context.Context, r *kmsagentv1.DescribeKeyRequest) (*kmsagentv1.DescribeKeyResponse, error) {
	return answer(k, r, &kmsagentv1.DescribeKeyResponse{Key: &kmsagentv1.Key{Name: r.GetKey()}})
}

func (k *kms) ListKeys(_ context.Context, r *kmsagentv1.ListKeysRequest) (*kmsagentv1.ListKeysResponse, error) {
	return answer(k, r, &kmsagentv1.ListKeysResponse{NextPageToken: r.GetPageToken()})
}

func (k *kms) WhoAmI(ctx context.Context, r *kmsagentv1.WhoAmIRequest) (*kmsagentv1.WhoAmIResponse, error) {
	caller, err := identity.CallerFromContext(ctx)
	if err != nil {
		return nil, err
	}
	return answer(k, r, &kmsagentv1.WhoAmIResponse{SpiffeId: caller.ID.String(), Proof: string(caller.Proof)})
}

type encryptServer = grpc.BidiStreamingServer[kmsagentv1.EncryptStreamRequest, kmsagentv1.EncryptStreamResponse]

func sendUse(s encryptServer) error {
	return s.Send(&kmsagentv1.EncryptStreamResponse{Part: &kmsagentv1.EncryptStreamResponse_KeyUse{KeyUse: use}})
}

func sendChunk(s encryptServer, b []byte) error {
	return s.Send(&kmsagentv1.EncryptStreamResponse{Part: &kmsagentv1.EncryptStreamResponse_Chunk{Chunk: b}})
}

// EncryptStream does what the test says; nothing said: it answers each chunk.
func (k *kms) EncryptStream(s encryptServer) (err error) {
	defer func() {
		if k.aborted != nil {
			k.aborted <- err
		}
	}()
	first, err := s.Recv()
	if err != nil {
		return err
	}
	if first.GetStart() == nil {
		return errors.New("the first message is not start")
	}
	k.note(first.GetStart())
	if k.encrypt != nil {
		return k.encrypt(s)
	}
	if err := sendUse(s); err != nil {
		return err
	}
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := sendChunk(s, masked(r.GetChunk())); err != nil {
			return err
		}
	}
}

// DecryptStream answers when it has everything, unlike EncryptStream.
func (k *kms) DecryptStream(s grpc.BidiStreamingServer[kmsagentv1.DecryptStreamRequest, kmsagentv1.DecryptStreamResponse]) error {
	var all bytes.Buffer
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if start := r.GetStart(); start != nil {
			k.note(start)
		}
		all.Write(r.GetChunk())
	}
	if k.fail != nil {
		return k.fail
	}
	header := &kmsagentv1.DecryptStreamHeader{KeyUse: use, Context: map[string]string{"tenant": "a"}}
	if err := s.Send(&kmsagentv1.DecryptStreamResponse{Part: &kmsagentv1.DecryptStreamResponse_Header{Header: header}}); err != nil {
		return err
	}
	for all.Len() > 0 {
		chunk := masked(all.Next(50_000))
		if err := s.Send(&kmsagentv1.DecryptStreamResponse{Part: &kmsagentv1.DecryptStreamResponse_Chunk{Chunk: chunk}}); err != nil {
			return err
		}
	}
	return nil
}

// serve puts k behind cfg's credentials and returns the socket's path.
func serve(t testing.TB, k *kms, cfg identity.Config) (path string, stop func()) {
	t.Helper()
	// What a URL could not hold.
	return serveAt(t, filepath.Join(tempDir(t), "a %41?#.sock"), k, cfg)
}

func serveAt(t testing.TB, path string, k kmsagentv1.KMSServer, cfg identity.Config) (_ string, stop func()) {
	t.Helper()
	creds, err := identity.NewCredentials(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := identity.Listen(t.Context(), path, 0o600, -1)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(creds), grpc.WaitForHandlers(true))
	kmsagentv1.RegisterKMSServer(s, k)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	stop = sync.OnceFunc(func() { s.Stop(); <-done })
	t.Cleanup(stop)
	return path, stop
}

// static is a plaintext server that knows this process.
func static(t testing.TB, k *kms) (path string, stop func()) {
	t.Helper()
	uid := uint32(os.Getuid())
	return serve(t, k, identity.Config{StaticPeers: []identity.StaticPeer{{UID: &uid, ID: orders}}})
}

func dial(t testing.TB, o client.Options) *client.Client {
	t.Helper()
	c, err := client.Dial(patiently(t), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return c
}

func plain(t testing.TB, k *kms) *client.Client {
	t.Helper()
	path, _ := static(t, k)
	return dial(t, client.Options{Socket: path, Retry: -1})
}

// issue runs an issuer with one socket for each ID and returns their addresses.
func issue(t testing.TB, domain spiffeid.TrustDomain, ids ...spiffeid.ID) []string {
	t.Helper()
	cfg := issuer.Config{TrustDomain: domain, Sockets: map[string]spiffeid.ID{}}
	var addresses []string
	for _, id := range ids {
		path := filepath.Join(tempDir(t), "api.sock")
		cfg.Sockets[path] = id
		addresses = append(addresses, issuer.AddressOf(path))
	}
	i, err := issuer.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	run(t, i.Run)
	return addresses
}

func run(t testing.TB, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// proven is a server that proves the ID that the Workload API at address gives.
func proven(t testing.TB, k *kms, address string) string {
	t.Helper()
	source, err := identity.NewSource(identity.SourceConfig{Address: address})
	if err != nil {
		t.Fatal(err)
	}
	run(t, source.Run)
	if err := source.WaitReady(patiently(t)); err != nil {
		t.Fatal(err)
	}
	path, _ := serve(t, k, identity.Config{Source: source})
	return path
}

// tick is a short while in a loop that watches something stand still.
func tick() <-chan time.Time { return time.After(5 * time.Millisecond) }
