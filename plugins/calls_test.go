package plugins

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	pluginv1 "github.com/kms-agent/kms-agent/api/plugin/v1"
)

// odd is a backend that does what the wrapping key's URI says.
type odd struct {
	keeper

	started chan struct{} // has a value for each call that waits
	ended   chan error    // why a call that waited ended
}

func (o *odd) Wrap(ctx context.Context, key KeyRef, plaintext []byte, _ Binding) ([]byte, error) {
	switch {
	case key.URI == "wait":
		o.started <- struct{}{}
		<-ctx.Done()
		o.ended <- ctx.Err()
		return nil, ctx.Err()
	case key.URI == "panic":
		panic("at the disco")
	case key.URI == "large":
		return make([]byte, 2<<20), nil
	case strings.HasPrefix(key.URI, "refused"):
		return nil, &Error{Class: Denied, Detail: "no", RetryAfter: time.Minute}
	}
	return append([]byte(key.URI+":"), plaintext...), nil
}

func (o *odd) Unwrap(_ context.Context, key KeyRef, ciphertext []byte, _ Binding) ([]byte, error) {
	rest, ok := bytes.CutPrefix(ciphertext, []byte(key.URI+":"))
	switch {
	case !ok:
		return nil, Errorf(BadCiphertext, "another key's")
	case key.URI == "forgets":
		return nil, Errorf(BadCiphertext, "does not open")
	case key.URI == "changes":
		return append(bytes.Clone(rest), 0), nil
	case key.URI == "away":
		return nil, Errorf(Unavailable, "away")
	}
	return bytes.Clone(rest), nil
}

// wired is a Remote of a backend, and how many RPCs there were by method.
type wired struct {
	*Remote

	conn   *grpc.ClientConn
	server *grpc.Server
	unary  atomic.Int64
	stream atomic.Int64
}

func wire(t *testing.T, b Backend, change func(*Remote)) *wired {
	t.Helper()
	return wireTo(t, &server{backend: b, each: recoverPanics(new(bytes.Buffer))}, change)
}

func wireTo(t *testing.T, service pluginv1.BackendServer, change func(*Remote)) *wired {
	t.Helper()
	w := &wired{}
	listener := bufconn.Listen(1 << 20)
	w.server = grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, q any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if strings.HasSuffix(info.FullMethod, "rap") {
				w.unary.Add(1)
			}
			return next(ctx, q)
		}),
		grpc.StreamInterceptor(func(s any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			w.stream.Add(1)
			return next(s, stream)
		}))
	pluginv1.RegisterBackendServer(w.server, service)
	served := make(chan error, 1)
	go func() { served <- w.server.Serve(listener) }()
	var err error
	w.conn, err = grpc.NewClient("passthrough:plugin", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = w.conn.Close()
		w.server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Errorf("Serve: %v", err)
		}
	})
	w.Remote = NewRemote(w.conn)
	if change != nil {
		change(w.Remote)
	}
	if _, err := w.Open(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	return w
}

func TestCallsShareAStream(t *testing.T) {
	w := wire(t, &odd{}, nil)
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			key := KeyRef{URI: fmt.Sprint("key-", i), Version: "1"}
			if i%4 == 0 {
				key.URI = fmt.Sprint("refused-", i)
			}
			for n := range 50 {
				material := []byte(fmt.Sprint(i, n))
				wrapped, err := w.Wrap(t.Context(), key, material, Binding{})
				if i%4 == 0 {
					if e := (*Error)(nil); !errors.As(err, &e) || e.Class != Denied || e.RetryAfter != time.Minute {
						t.Errorf("%s: %v", key.URI, err)
					}
					continue
				}
				if err != nil || !bytes.HasPrefix(wrapped, []byte(key.URI+":")) {
					t.Errorf("%s: %q, %v", key.URI, wrapped, err)
				}
				if opened, err := w.Unwrap(t.Context(), key, wrapped, Binding{}); err != nil || !bytes.Equal(opened, material) {
					t.Errorf("%s: %q, %v", key.URI, opened, err)
				}
			}
		})
	}
	wg.Wait()
	if u, s := w.unary.Load(), w.stream.Load(); u != 0 || s != 1 {
		t.Errorf("%d RPCs and %d streams, want one stream", u, s)
	}
}

func TestCallsAlone(t *testing.T) {
	w := wire(t, &odd{}, (*Remote).Alone)
	if _, err := w.Wrap(t.Context(), KeyRef{URI: "k", Version: "1"}, []byte("m"), Binding{}); err != nil {
		t.Error(err)
	}
	if u, s := w.unary.Load(), w.stream.Load(); u != 1 || s != 0 {
		t.Errorf("%d RPCs and %d streams, want one RPC", u, s)
	}
}

// What happens to one call does not happen to the others on the stream.
func TestCallsAreIndependent(t *testing.T) {
	o := &odd{started: make(chan struct{}, 1), ended: make(chan error, 1)}
	w := wire(t, o, nil)
	good := func(after string) {
		t.Helper()
		if _, err := w.Wrap(t.Context(), KeyRef{URI: "good", Version: "1"}, []byte("m"), Binding{}); err != nil {
			t.Errorf("after %s: %v", after, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	waits := make(chan error, 1)
	go func() {
		_, err := w.Wrap(ctx, KeyRef{URI: "wait", Version: "1"}, []byte("m"), Binding{})
		waits <- err
	}()
	<-o.started
	good("a call that waits")
	cancel()
	if err := <-waits; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if err := <-o.ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the backend's context: %v", err)
	}
	bounded, done := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer done()
	if _, err := w.Wrap(bounded, KeyRef{URI: "wait", Version: "1"}, []byte("m"), Binding{}); ClassOf(err) != Unavailable {
		t.Errorf("overdue: %v", err)
	}
	<-o.started
	if err := <-o.ended; err == nil {
		t.Error("the backend's context did not end")
	}
	for _, uri := range []string{"panic", "large"} {
		if _, err := w.Wrap(t.Context(), KeyRef{URI: uri, Version: "1"}, []byte("m"), Binding{}); ClassOf(err) != Internal {
			t.Errorf("%s: %v, want Internal", uri, err)
		}
		good(uri)
	}
	if s := w.stream.Load(); s != 1 {
		t.Errorf("%d streams, want 1", s)
	}
	// What is too large for the stream goes by itself.
	if _, err := w.Wrap(t.Context(), KeyRef{URI: "good", Version: "1"}, []byte("m"), Binding{ProviderInfo: make([]byte, 100_000)}); err != nil {
		t.Errorf("a large call: %v", err)
	}
	if u := w.unary.Load(); u != 1 {
		t.Errorf("%d RPCs, want 1", u)
	}
}

// Calls under way end with the stream, and the next open another.
func TestCallsOutliveAStream(t *testing.T) {
	o := &odd{started: make(chan struct{}, 1), ended: make(chan error, 1)}
	w := wire(t, o, nil)
	waits := make(chan error, 1)
	go func() {
		_, err := w.Wrap(t.Context(), KeyRef{URI: "wait", Version: "1"}, []byte("m"), Binding{})
		waits <- err
	}()
	<-o.started
	calls := w.calls.Load()
	calls.mu.Lock()
	current := calls.current
	calls.mu.Unlock()
	// A number that is in use is against the contract: the plugin ends the stream.
	current.queue <- &pluginv1.Call{Id: 1, Request: &pluginv1.Call_Wrap{Wrap: &pluginv1.WrapRequest{}}}
	if err := <-waits; ClassOf(err) == 0 || err == nil {
		t.Errorf("the stream ended: %v", err)
	}
	if err := <-o.ended; err == nil {
		t.Error("the backend's context did not end with the stream")
	}
	if _, err := w.Wrap(t.Context(), KeyRef{URI: "good", Version: "1"}, []byte("m"), Binding{}); err != nil {
		t.Errorf("after it: %v", err)
	}
	if s := w.stream.Load(); s != 2 {
		t.Errorf("%d streams, want 2", s)
	}
	w.server.Stop()
	if _, err := w.Wrap(t.Context(), KeyRef{URI: "good", Version: "1"}, []byte("m"), Binding{}); ClassOf(err) != Unavailable {
		t.Errorf("without a plugin: %v, want Unavailable", err)
	}
}

// nonsense answers calls on the stream as it likes, and Open as it should.
type nonsense struct {
	server

	answer func(id uint64) []*pluginv1.Answer
}

func (n *nonsense) Calls(stream grpc.BidiStreamingServer[pluginv1.CallsRequest, pluginv1.CallsResponse]) error {
	for {
		calls, err := stream.Recv()
		if err != nil {
			return err
		}
		for _, c := range calls.GetCalls() {
			if err := stream.Send(&pluginv1.CallsResponse{Answers: n.answer(c.GetId())}); err != nil {
				return err
			}
		}
	}
}

func TestCallsHoldAnswersToTheContract(t *testing.T) {
	unwrapped := &pluginv1.Answer_Unwrap{Unwrap: &pluginv1.UnwrapResponse{}}
	for name, answer := range map[string]func(id uint64) []*pluginv1.Answer{
		"nothing in it":          func(id uint64) []*pluginv1.Answer { return []*pluginv1.Answer{{Id: id}} },
		"of another method":      func(id uint64) []*pluginv1.Answer { return []*pluginv1.Answer{{Id: id, Result: unwrapped}} },
		"of nobody, then of one": func(id uint64) []*pluginv1.Answer { return []*pluginv1.Answer{{Id: id + 7}, nil, {Id: id}, {Id: id}} },
		"an error that is none": func(id uint64) []*pluginv1.Answer {
			return []*pluginv1.Answer{{Id: id, Result: &pluginv1.Answer_Error{}}}
		},
		"no error at all": func(id uint64) []*pluginv1.Answer {
			return []*pluginv1.Answer{{Id: id, Result: &pluginv1.Answer_Error{Error: []byte("x")}}}
		},
	} {
		n := &nonsense{answer: answer}
		n.backend = &odd{}
		w := wireTo(t, n, nil)
		if _, err := w.Wrap(t.Context(), KeyRef{URI: "k", Version: "1"}, []byte("m"), Binding{}); ClassOf(err) != Internal {
			t.Errorf("%s: %v, want Internal", name, err)
		}
	}
}

func TestWrapProven(t *testing.T) {
	w := wire(t, &odd{}, nil)
	local := &odd{}
	for name, b := range map[string]Backend{"in one call": w.Remote, "in two": local} {
		wrapped, err := WrapProven(t.Context(), b, KeyRef{URI: "good", Version: "1"}, []byte("m"), Binding{})
		if err != nil || string(wrapped) != "good:m" {
			t.Errorf("%s: %q, %v", name, wrapped, err)
		}
		for _, uri := range []string{"forgets", "changes"} {
			wrapped, err := WrapProven(t.Context(), b, KeyRef{URI: uri, Version: "1"}, []byte("m"), Binding{})
			if !errors.Is(err, ErrUnproven) || ClassOf(err) != Internal || wrapped != nil {
				t.Errorf("%s, %s: %q, %v, want ErrUnproven", name, uri, wrapped, err)
			}
		}
		if _, err := WrapProven(t.Context(), b, KeyRef{URI: "away", Version: "1"}, []byte("m"), Binding{}); ClassOf(err) != Unavailable {
			t.Errorf("%s, away: %v", name, err)
		}
		if _, err := WrapProven(t.Context(), b, KeyRef{URI: "refused", Version: "1"}, []byte("m"), Binding{}); ClassOf(err) != Denied {
			t.Errorf("%s, refused: %v", name, err)
		}
	}
}

// A plugin that knows nothing of proofs is asked to unwrap.
func TestWrapProvenByAnOlderPlugin(t *testing.T) {
	w := wire(t, &odd{}, (*Remote).Alone)
	w.service = older{w.service}
	if wrapped, err := w.WrapProven(t.Context(), KeyRef{URI: "good", Version: "1"}, []byte("m"), Binding{}); err != nil || string(wrapped) != "good:m" {
		t.Errorf("%q, %v", wrapped, err)
	}
	if _, err := w.WrapProven(t.Context(), KeyRef{URI: "changes", Version: "1"}, []byte("m"), Binding{}); !errors.Is(err, ErrUnproven) {
		t.Errorf("changes: %v", err)
	}
	if n := w.unary.Load(); n != 4 {
		t.Errorf("%d calls, want 4", n)
	}
}

type older struct{ pluginv1.BackendClient }

func (o older) Wrap(ctx context.Context, q *pluginv1.WrapRequest, opts ...grpc.CallOption) (*pluginv1.WrapResponse, error) {
	q.Prove = false
	return o.BackendClient.Wrap(ctx, q, opts...)
}

func TestStatusOfAnAnswer(t *testing.T) {
	if err := statusOf(&pluginv1.Answer{Result: &pluginv1.Answer_Wrap{}}); err != nil {
		t.Errorf("an answer: %v", err)
	}
	if err := statusOf(&pluginv1.Answer{Result: &pluginv1.Answer_Error{}}); status.Code(err) != codes.Internal {
		t.Errorf("an error that is none: %v", err)
	}
}

// A process that takes a connection and says nothing does not keep its callers.
func TestCallsDoNotWaitForAStream(t *testing.T) {
	listener := bufconn.Listen(1 << 20)
	defer func() { _ = listener.Close() }()
	conn, err := grpc.NewClient("passthrough:plugin", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	r := NewRemote(conn)
	host, plugin := fixedKey(t, "host"), fixedKey(t, "plugin")
	session, err := newSession(host, plugin.PublicKey().Bytes(), true)
	if err != nil {
		t.Fatal(err)
	}
	r.session.Store(session)
	r.calls.Store(&caller{service: r.service})
	began := time.Now()
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if _, err := r.Wrap(ctx, KeyRef{URI: "k", Version: "1"}, []byte("m"), Binding{}); ClassOf(err) != Unavailable {
				t.Errorf("%v, want Unavailable", err)
			}
		})
	}
	wg.Wait()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the callers waited for %v", took)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	calls := r.calls.Load()
	select {
	case <-calls.stream().ended:
	case <-time.After(10 * time.Second):
		t.Error("the stream does not end with its connection")
	}
}

// A call leaves nothing behind on its stream, which lives as long as the plugin.
func TestCallsAreForgotten(t *testing.T) {
	w := wire(t, &odd{}, nil)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	objects := func() uint64 {
		for range 2000 {
			if _, err := w.Wrap(ctx, KeyRef{URI: "good", Version: "1"}, []byte("m"), Binding{}); err != nil {
				t.Fatal(err)
			}
		}
		var m runtime.MemStats
		runtime.GC()
		runtime.GC() // what pools keep lives through one
		runtime.ReadMemStats(&m)
		return m.HeapObjects
	}
	before := objects()
	if after := objects(); after > before+500 {
		t.Errorf("2000 calls leave %d objects behind", after-before)
	}
}

// A backend's time is up before its caller's: the caller learns which of them hangs.
func TestCallsAnswerInTime(t *testing.T) {
	o := &odd{started: make(chan struct{}, 1), ended: make(chan error, 1)}
	w := wire(t, o, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err := w.Wrap(ctx, KeyRef{URI: "wait", Version: "1"}, []byte("m"), Binding{})
	if err == nil || ctx.Err() != nil {
		t.Errorf("%v, and the caller's time: %v", err, ctx.Err())
	}
	if ended := <-o.ended; !errors.Is(ended, context.DeadlineExceeded) {
		t.Errorf("the backend's call ended by %v", ended)
	}
}
