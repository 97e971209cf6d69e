package renew_test

import (
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/cmd/kms-agent/renew"
	"github.com/kms-agent/kms-agent/envelope"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeAgent makes and opens real messages, all under one data key, and says that
// they are under the wrapping keys that it was told.
type fakeAgent struct {
	kmsagentv1.UnimplementedKMSServer
	mu        sync.Mutex // guards what follows
	wrappings []renew.Wrapping
	// before is asked before each ReEncrypt; its error is the answer.
	before func(plaintext string) error
	// garble changes what ReEncrypt and EncryptStream make.
	garble     func([]byte) []byte
	inside     int // calls of ReEncrypt
	maxMessage int // bytes of a message that ReEncrypt takes
}

func newFake() *fakeAgent {
	return &fakeAgent{wrappings: []renew.Wrapping{{URI: "local:orders", Version: "1"}}, maxMessage: 1 << 20}
}

func (f *fakeAgent) under(wrappings ...renew.Wrapping) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wrappings = wrappings
}

// set changes the fake while nobody calls it.
func (f *fakeAgent) set(change func(*fakeAgent)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

var dataKey = make([]byte, envelope.DataKeySize)

func (f *fakeAgent) edks(key string) []envelope.EDK {
	f.mu.Lock()
	defer f.mu.Unlock()
	var edks []envelope.EDK
	for _, w := range f.wrappings {
		info, err := envelope.ProviderInfo{Purpose: envelope.PurposeMessage, Key: key, URI: w.URI, Version: w.Version}.Marshal()
		if err != nil {
			panic(err)
		}
		edks = append(edks, envelope.EDK{ProviderID: envelope.ProviderID, ProviderInfo: info, Ciphertext: []byte("wrapped")})
	}
	return edks
}

func (f *fakeAgent) seal(key string, pairs map[string]string, plaintext []byte) []byte {
	message, err := envelope.Seal(nil, dataKey, f.edks(key), pairs, plaintext)
	if err != nil {
		panic(err)
	}
	return message
}

func keyOf(h *envelope.Header) string {
	info, err := envelope.ParseProviderInfo(h.EDKs[0].ProviderInfo)
	if err != nil {
		panic(err)
	}
	return info.Key
}

func refusal(code codes.Code, reason client.Reason, retry time.Duration) error {
	st := status.New(code, "refused")
	st, _ = st.WithDetails(&errdetails.ErrorInfo{Domain: "kms-agent", Reason: string(reason)})
	if retry > 0 {
		st, _ = st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(retry)})
	}
	return st.Err()
}

func (f *fakeAgent) WhoAmI(context.Context, *kmsagentv1.WhoAmIRequest) (*kmsagentv1.WhoAmIResponse, error) {
	return &kmsagentv1.WhoAmIResponse{}, nil
}

func (f *fakeAgent) Encrypt(_ context.Context, r *kmsagentv1.EncryptRequest) (*kmsagentv1.EncryptResponse, error) {
	return &kmsagentv1.EncryptResponse{Message: f.seal(r.GetKey(), r.GetContext(), r.GetPlaintext())}, nil
}

func (f *fakeAgent) ReEncrypt(_ context.Context, r *kmsagentv1.ReEncryptRequest) (*kmsagentv1.ReEncryptResponse, error) {
	f.mu.Lock()
	f.inside++
	before, garble, most := f.before, f.garble, f.maxMessage
	f.mu.Unlock()
	message, err := envelope.Parse(r.GetMessage())
	if err != nil {
		return nil, refusal(codes.InvalidArgument, client.ErrInvalidMessage, 0)
	}
	if message.PlaintextSize() > most {
		return nil, refusal(codes.InvalidArgument, client.ErrTooLarge, 0)
	}
	plaintext, err := message.Open(nil, dataKey)
	if err != nil {
		return nil, refusal(codes.InvalidArgument, client.ErrDecryptFailed, 0)
	}
	if before != nil {
		if err := before(string(plaintext)); err != nil {
			return nil, err
		}
	}
	key, pairs := keyOf(&message.Header), message.Context
	if r.GetDestinationKey() != "" {
		key = r.GetDestinationKey()
	}
	if r.GetReplaceContext() {
		pairs = r.GetDestinationContext()
	}
	made := f.seal(key, pairs, plaintext)
	if garble != nil {
		made = garble(made)
	}
	return &kmsagentv1.ReEncryptResponse{Message: made}, nil
}

func (f *fakeAgent) EncryptStream(s grpc.BidiStreamingServer[kmsagentv1.EncryptStreamRequest, kmsagentv1.EncryptStreamResponse]) error {
	first, err := s.Recv()
	if err != nil {
		return err
	}
	start := first.GetStart()
	use := &kmsagentv1.EncryptStreamResponse{Part: &kmsagentv1.EncryptStreamResponse_KeyUse{KeyUse: &kmsagentv1.KeyUse{Key: start.GetKey()}}}
	if err := s.Send(use); err != nil {
		return err
	}
	out := sender(func(b []byte) error {
		return s.Send(&kmsagentv1.EncryptStreamResponse{Part: &kmsagentv1.EncryptStreamResponse_Chunk{Chunk: b}})
	})
	w, err := envelope.NewWriter(out, dataKey, f.edks(start.GetKey()), start.GetContext())
	if err != nil {
		return err
	}
	for {
		next, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return w.Close()
		}
		if err == nil {
			_, err = w.Write(next.GetChunk())
		}
		if err != nil {
			return err
		}
	}
}

func (f *fakeAgent) DecryptStream(s grpc.BidiStreamingServer[kmsagentv1.DecryptStreamRequest, kmsagentv1.DecryptStreamResponse]) error {
	if _, err := s.Recv(); err != nil {
		return err
	}
	in, pipe := io.Pipe()
	defer func() { _ = in.Close() }()
	go func() {
		for {
			next, err := s.Recv()
			if err == nil {
				_, err = pipe.Write(next.GetChunk())
			}
			if err != nil {
				_ = pipe.CloseWithError(err) // io.EOF is the end
				return
			}
		}
	}()
	r, err := envelope.NewReader(in)
	if err == nil {
		err = r.Unlock(dataKey)
	}
	if err != nil {
		return refusal(codes.InvalidArgument, client.ErrDecryptFailed, 0)
	}
	header := &kmsagentv1.DecryptStreamHeader{KeyUse: &kmsagentv1.KeyUse{Key: keyOf(r.Header())}, Context: maps.Clone(r.Header().Context)}
	if err := s.Send(&kmsagentv1.DecryptStreamResponse{Part: &kmsagentv1.DecryptStreamResponse_Header{Header: header}}); err != nil {
		return err
	}
	_, err = r.WriteTo(sender(func(b []byte) error {
		return s.Send(&kmsagentv1.DecryptStreamResponse{Part: &kmsagentv1.DecryptStreamResponse_Chunk{Chunk: b}})
	}))
	if err != nil {
		return refusal(codes.InvalidArgument, client.ErrStreamTruncated, 0)
	}
	return nil
}

// sender is an io.Writer that sends.
type sender func([]byte) error

func (s sender) Write(b []byte) (int, error) { return len(b), s(append([]byte(nil), b...)) }

// serve starts the fake and returns a client of it.
func serve(t *testing.T, f *fakeAgent) *client.Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "kms.sock")
	stop := listen(t, f, socket)
	t.Cleanup(stop)
	c, err := client.Dial(t.Context(), client.Options{Socket: socket, Retry: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func listen(t *testing.T, f *fakeAgent, socket string) (stop func()) {
	t.Helper()
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	kmsagentv1.RegisterKMSServer(server, f)
	var served sync.WaitGroup
	served.Go(func() { _ = server.Serve(listener) })
	return func() {
		server.Stop()
		served.Wait()
	}
}

// options are those of a run with nothing special.
func options() renew.Options { return renew.Options{Jobs: 2, Timeout: 10 * time.Second} }

func write(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// opened is the plaintext of a file.
func opened(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	message, err := envelope.Parse(content)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	plaintext, err := message.Open(nil, dataKey)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return string(plaintext)
}

// alone fails when a directory has other entries than these.
func alone(t *testing.T, dir string, names ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if len(got) != len(names) {
		t.Errorf("the directory has %v, want %v", got, names)
	}
}
