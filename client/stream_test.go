package client_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
)

var start = &kmsagentv1.EncryptStreamStart{Key: "orders", Context: map[string]string{"a": "b"}, LengthLimit: 1 << 30}

func TestStreams(t *testing.T) {
	k := &kms{}
	c := plain(t, k)
	for _, size := range []int{0, 1, 64<<10 - 1, 64 << 10, 64<<10 + 1, 3<<20 + 5} {
		for name, wrap := range map[string]func(io.Reader) io.Reader{
			"whole":         func(r io.Reader) io.Reader { return r },
			"halves":        iotest.HalfReader,
			"data with EOF": iotest.DataErrReader,
		} {
			t.Run(fmt.Sprint(size, name), func(t *testing.T) {
				data := make([]byte, size)
				_, _ = rand.Read(data)
				var message, plaintext bytes.Buffer
				got, err := c.EncryptStream(patiently(t), start, wrap(bytes.NewReader(data)), &message)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(use, got, protocmp.Transform()); diff != "" {
					t.Errorf("key use: %s", diff)
				}
				if diff := cmp.Diff(start, k.lastAsked(), protocmp.Transform()); diff != "" {
					t.Errorf("start: %s", diff)
				}
				if !bytes.Equal(message.Bytes(), masked(data)) {
					t.Error("the message is not what the agent sent")
				}
				asked := &kmsagentv1.DecryptStreamStart{ExpectedContext: map[string]string{"tenant": "a"}}
				header, err := c.DecryptStream(patiently(t), asked, wrap(&message), &plaintext)
				if err != nil {
					t.Fatal(err)
				}
				if header.GetKeyUse().GetKey() != "orders" || header.GetContext()["tenant"] != "a" {
					t.Errorf("header %v", header)
				}
				if diff := cmp.Diff(asked, k.lastAsked(), protocmp.Transform()); diff != "" {
					t.Errorf("start: %s", diff)
				}
				if !bytes.Equal(plaintext.Bytes(), data) {
					t.Error("the plaintext is not what was encrypted")
				}
			})
		}
	}
}

// endless is a reader that counts what is taken from it.
type endless struct{ taken atomic.Int64 }

func (e *endless) Read(p []byte) (int, error) {
	e.taken.Add(int64(len(p)))
	return len(p), nil
}

// blocked is a reader or writer that says when it is reached and waits.
type blocked struct {
	reached chan struct{}
	free    chan struct{}
	release func()
}

func newBlocked(t testing.TB) *blocked {
	b := &blocked{reached: make(chan struct{}, 1), free: make(chan struct{})}
	b.release = sync.OnceFunc(func() { close(b.free) })
	t.Cleanup(b.release)
	return b
}

func (b *blocked) wait() {
	select {
	case b.reached <- struct{}{}:
	default:
	}
	<-b.free
}

func (b *blocked) Read([]byte) (int, error)    { b.wait(); return 0, io.EOF }
func (b *blocked) Write(p []byte) (int, error) { b.wait(); return len(p), nil }

// When nobody takes the answer, the reader is left alone: memory is bounded.
func TestStreamBackpressure(t *testing.T) {
	c := plain(t, &kms{})
	r, w := &endless{}, newBlocked(t)
	ctx, cancel := context.WithCancel(patiently(t))
	done := make(chan error, 1)
	go func() {
		_, err := c.EncryptStream(ctx, start, r, w)
		done <- err
	}()
	<-w.reached
	// Reading stops by itself: wait until it stands.
	before := int64(-1)
	for still := 0; still < 20; still++ {
		<-tick()
		if now := r.taken.Load(); now != before {
			before, still = now, 0
		}
		if before > 8<<20 {
			t.Fatalf("%d bytes were read although nobody takes the answer", before)
		}
	}
	cancel()
	w.release()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
}

func refusal(t testing.TB) error {
	return detailed(t, codes.PermissionDenied, "no", &errdetails.ErrorInfo{Domain: "kms-agent", Reason: "ACCESS_DENIED"})
}

func wantReason(t testing.TB, err error, reason client.Reason) {
	t.Helper()
	var e *client.Error
	if !errors.As(err, &e) || e.Reason != reason {
		t.Fatalf("got %v (%T), want reason %s", err, err, reason)
	}
}

// What the agent says is what the caller hears, not the io.EOF of a Send.
func TestStreamRefused(t *testing.T) {
	no := refusal(t)
	at := map[string]func(encryptServer) error{
		"at once": func(encryptServer) error { return no },
		"after the key": func(s encryptServer) error {
			if err := sendUse(s); err != nil {
				return err
			}
			return no
		},
		"in the middle": func(s encryptServer) error {
			if err := sendUse(s); err != nil {
				return err
			}
			for range 5 {
				r, err := s.Recv()
				if err != nil {
					return err
				}
				if err := sendChunk(s, r.GetChunk()); err != nil {
					return err
				}
			}
			return no
		},
	}
	for name, encrypt := range at {
		t.Run(name, func(t *testing.T) {
			c := plain(t, &kms{encrypt: encrypt})
			got, err := c.EncryptStream(patiently(t), start, &endless{}, io.Discard)
			wantReason(t, err, "ACCESS_DENIED")
			if got != nil {
				t.Errorf("a key use beside an error: %v", got)
			}
		})
	}
	t.Run("at the end", func(t *testing.T) {
		c := plain(t, &kms{fail: no})
		_, err := c.DecryptStream(patiently(t), &kmsagentv1.DecryptStreamStart{}, strings.NewReader("x"), io.Discard)
		wantReason(t, err, "ACCESS_DENIED")
	})
	t.Run("while the reader blocks", func(t *testing.T) {
		c := plain(t, &kms{encrypt: func(encryptServer) error { return no }})
		_, err := c.EncryptStream(patiently(t), start, newBlocked(t), io.Discard)
		wantReason(t, err, "ACCESS_DENIED")
	})
}

func TestStreamCancelledWhileTheReaderBlocks(t *testing.T) {
	c := plain(t, &kms{})
	r := newBlocked(t)
	ctx, cancel := context.WithCancel(patiently(t))
	go func() { <-r.reached; cancel() }()
	if _, err := c.EncryptStream(ctx, start, r, io.Discard); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want context.Canceled", err)
	}
}

// A reader that fails must not look like one that ends: the agent would make a
// good message of half the data.
func TestStreamReaderFails(t *testing.T) {
	for name, fault := range map[string]error{
		"own error":       errors.New("disk on fire"),
		"was cut":         io.ErrUnexpectedEOF,
		"timed out":       iotest.ErrTimeout,
		"looks like ours": fmt.Errorf("wrapped: %w", context.Canceled),
	} {
		t.Run(name, func(t *testing.T) {
			k := &kms{aborted: make(chan error, 1)}
			c := plain(t, k)
			r := io.MultiReader(strings.NewReader(strings.Repeat("x", 100_000)), iotest.ErrReader(fault))
			_, err := c.EncryptStream(patiently(t), start, r, io.Discard)
			if !errors.Is(err, fault) || !strings.Contains(err.Error(), "read what to send") {
				t.Errorf("got %v, want %v", err, fault)
			}
			if got := <-k.aborted; status.Code(got) != codes.Canceled {
				t.Errorf("for the agent the stream ended with %v, want Canceled", got)
			}
		})
	}
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

func TestStreamWriterFails(t *testing.T) {
	full := errors.New("disk full")
	c := plain(t, &kms{})
	for name, r := range map[string]io.Reader{"endless": &endless{}, "one byte": strings.NewReader("x")} {
		if _, err := c.EncryptStream(patiently(t), start, r, failingWriter{full}); !errors.Is(err, full) {
			t.Errorf("%s: got %v, want %v", name, err, full)
		}
	}
	_, err := c.DecryptStream(patiently(t), &kmsagentv1.DecryptStreamStart{}, strings.NewReader("x"), failingWriter{full})
	if !errors.Is(err, full) {
		t.Errorf("got %v, want %v", err, full)
	}
}

// An answer that is not complete is an error, whatever its status says.
func TestStreamIncomplete(t *testing.T) {
	drain := func(s encryptServer) error {
		for {
			if _, err := s.Recv(); err != nil {
				return nil //nolint:nilerr // the end
			}
		}
	}
	cases := map[string]func(encryptServer) error{
		"nothing":            drain,
		"early OK":           sendUse,
		"early OK with data": func(s encryptServer) error { return errors.Join(sendUse(s), sendChunk(s, []byte("x"))) },
		"chunk before key":   func(s encryptServer) error { return errors.Join(sendChunk(s, []byte("x")), drain(s)) },
		"key twice":          func(s encryptServer) error { return errors.Join(sendUse(s), sendUse(s), drain(s)) },
		"empty message": func(s encryptServer) error {
			return errors.Join(sendUse(s), s.Send(&kmsagentv1.EncryptStreamResponse{}), drain(s))
		},
	}
	for name, encrypt := range cases {
		t.Run(name, func(t *testing.T) {
			c := plain(t, &kms{encrypt: encrypt})
			var r io.Reader = &endless{}
			if name == "nothing" {
				r = strings.NewReader("x")
			}
			got, err := c.EncryptStream(patiently(t), start, r, io.Discard)
			if err == nil || got != nil {
				t.Fatalf("got %v, %v, want an error alone", got, err)
			}
			if !strings.Contains(err.Error(), "kms-agent: the agent") {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestStreamAgentDies(t *testing.T) {
	path, stop := static(t, &kms{})
	c := dial(t, client.Options{Socket: path})
	r := newBlocked(t)
	done := make(chan error, 1)
	go func() {
		_, err := c.EncryptStream(patiently(t), start, io.MultiReader(strings.NewReader(strings.Repeat("x", 200_000)), r), io.Discard)
		done <- err
	}()
	<-r.reached
	stop()
	if err := <-done; status.Code(err) != codes.Unavailable {
		t.Fatalf("got %v, want Unavailable", err)
	}
}

// idle is a reader that never has anything and never fails.
type idle struct{}

func (idle) Read([]byte) (int, error) { return 0, nil }

func TestStreamReaderWithoutProgress(t *testing.T) {
	c := plain(t, &kms{})
	if _, err := c.EncryptStream(patiently(t), start, idle{}, io.Discard); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("got %v, want io.ErrNoProgress", err)
	}
}

// short is a writer that takes less than it is given and says nothing.
type short struct{}

func (short) Write(p []byte) (int, error) { return len(p) / 2, nil }

func TestStreamShortWrite(t *testing.T) {
	c := plain(t, &kms{})
	if _, err := c.EncryptStream(patiently(t), start, strings.NewReader("four"), short{}); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("encrypt: got %v, want io.ErrShortWrite", err)
	}
	_, err := c.DecryptStream(patiently(t), &kmsagentv1.DecryptStreamStart{}, strings.NewReader("four"), short{})
	if !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("decrypt: got %v, want io.ErrShortWrite", err)
	}
}
