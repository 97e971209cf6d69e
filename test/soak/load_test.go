package soak

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

// kind is one kind of caller. once does one thing; an error whose reason is
// among the allowed ones is part of its life.
type kind struct {
	name    string
	callers int
	pause   time.Duration
	once    func(context.Context, *load) error
	allowed []string
}

// load is what callers share.
type load struct {
	*rig
	client kmsagentv1.KMSClient
	done   map[string]*atomic.Int64
	failed chan error // the first that should not be
}

// reasons that a backend which is just being replaced brings about.
func replaced() []string { return []string{"BACKEND_UNAVAILABLE", "KEY_SUSPENDED"} }

func kinds() []kind {
	return []kind{
		{"messages", 4, 0, messages, replaced()},
		{"streams", 2, 0, streams, replaced()},
		{"tenants", 2, 0, tenants, append(replaced(), "TOO_MANY_REQUESTS")},
		{"data keys", 2, 0, dataKeys, replaced()},
		{"forbidden", 1, time.Millisecond, forbidden, nil},
		{"damaged", 1, time.Millisecond, damaged, replaced()},
		{"impatient", 1, time.Millisecond, impatient, append(replaced(), "DEADLINE_EXCEEDED", "CANCELLED")},
		{"newcomers", 1, time.Millisecond, newcomers, replaced()},
		{"rubbish", 1, time.Millisecond, rubbish, nil},
		{"left streams", 1, time.Millisecond, leftStreams, replaced()},
		{"administrator", 1, 500 * time.Millisecond, administrator, nil},
		{"killer", 1, 5 * time.Second, killer, nil},
	}
}

// run lets every kind of caller work until ctx ends, or one fails.
func (l *load) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var group sync.WaitGroup
	for _, k := range kinds() {
		l.done[k.name] = &atomic.Int64{}
	}
	for _, k := range kinds() {
		for range k.callers {
			group.Go(func() { l.live(ctx, k, cancel) })
		}
	}
	group.Wait()
	select {
	case err := <-l.failed:
		return err
	default:
		return nil
	}
}

func (l *load) live(ctx context.Context, k kind, stop func()) {
	for ctx.Err() == nil {
		err := k.once(ctx, l)
		if ctx.Err() != nil {
			return
		}
		if err != nil && !allowed(err, k.allowed) {
			select {
			case l.failed <- fmt.Errorf("%s: %w", k.name, err):
			default:
			}
			stop()
			return
		}
		l.done[k.name].Add(1)
		select {
		case <-ctx.Done():
		case <-time.After(k.pause):
		}
	}
}

func reasonOf(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

func allowed(err error, reasons []string) bool {
	reason := reasonOf(err)
	for _, r := range reasons {
		if r == reason {
			return true
		}
	}
	text := err.Error() // gRPC's own words for the end of a context
	return len(reasons) > 2 && (strings.Contains(text, "DeadlineExceeded") || strings.Contains(text, "Canceled"))
}

// want is an error unless err has one of the reasons.
func want(err error, reasons ...string) error {
	reason := reasonOf(err)
	for _, r := range reasons {
		if r == reason {
			return nil
		}
	}
	return fmt.Errorf("got %w, want one of %v", errors.Join(err, errors.New("(end)")), reasons)
}

func payload(most int) []byte {
	b := make([]byte, mrand.IntN(most))
	_, _ = rand.Read(b)
	return b
}

func messages(ctx context.Context, l *load) error { return messageWith(ctx, l.client) }

func messageWith(ctx context.Context, c kmsagentv1.KMSClient) error {
	plaintext := payload(64 << 10)
	sealed, err := c.Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: plaintext, Context: map[string]string{"a": "b"}})
	if err != nil {
		return err
	}
	opened, err := c.Decrypt(ctx, &kmsagentv1.DecryptRequest{Message: sealed.GetMessage()})
	if err != nil {
		return err
	}
	if !bytes.Equal(opened.GetPlaintext(), plaintext) {
		return errors.New("a message opened to something else")
	}
	return nil
}

// tenants fill the cache: every context is a data key.
func tenants(ctx context.Context, l *load) error {
	tenant := map[string]string{"tenant": fmt.Sprint(mrand.IntN(2000))}
	sealed, err := l.client.Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "tenants", Plaintext: []byte("x"), Context: tenant})
	if err != nil {
		return err
	}
	_, err = l.client.Decrypt(ctx, &kmsagentv1.DecryptRequest{Message: sealed.GetMessage(), ExpectedContext: tenant})
	return err
}

func dataKeys(ctx context.Context, l *load) error {
	key, err := l.client.GenerateDataKey(ctx, &kmsagentv1.GenerateDataKeyRequest{Key: "orders"})
	if err != nil {
		return err
	}
	again, err := l.client.DecryptDataKey(ctx, &kmsagentv1.DecryptDataKeyRequest{EncryptedDataKey: key.GetEncryptedDataKey()})
	if err == nil && !bytes.Equal(again.GetPlaintext(), key.GetPlaintext()) {
		return errors.New("a data key opened to something else")
	}
	return err
}

func forbidden(ctx context.Context, l *load) error {
	_, err := l.client.Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "archive"})
	return want(err, "ACCESS_DENIED")
}

func damaged(ctx context.Context, l *load) error {
	sealed, err := l.client.Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: payload(1000)})
	if err != nil {
		return err
	}
	message := sealed.GetMessage()
	switch mrand.IntN(3) {
	case 0:
		message = payload(2000)
	case 1:
		message = message[:mrand.IntN(len(message))]
	case 2:
		message[mrand.IntN(len(message))] ^= 1 << mrand.IntN(8)
	}
	_, err = l.client.Decrypt(ctx, &kmsagentv1.DecryptRequest{Message: message})
	return want(err, "INVALID_MESSAGE", "DECRYPT_FAILED", "ACCESS_DENIED", "KEY_UNUSABLE", "BACKEND_UNAVAILABLE", "KEY_SUSPENDED", "INVALID_REQUEST", "STREAM_TRUNCATED")
}

// impatient callers give up before, in, or after their call.
func impatient(ctx context.Context, l *load) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(mrand.IntN(3000))*time.Microsecond)
	defer cancel()
	_, err := l.client.Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: payload(64 << 10), MaxStale: durationpb.New(0)})
	return err
}

// newcomers connect for each call.
func newcomers(ctx context.Context, l *load) error {
	conn, err := dial(l.path("kms.sock"))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	return messageWith(ctx, kmsagentv1.NewKMSClient(conn))
}

// rubbish is what no client would send.
func rubbish(ctx context.Context, l *load) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", l.path("kms.sock"))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	first := []string{"", "\x16\x03\x01\x02\x00", "GET / HTTP/1.1\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"}[mrand.IntN(4)]
	_, _ = conn.Write(append([]byte(first), payload(4096)...)) // it may be closed already
	return nil
}

func streams(ctx context.Context, l *load) error {
	plaintext := payload(2 << 20)
	message, err := encryptStream(ctx, l.client, plaintext)
	if err != nil {
		return err
	}
	opened, err := decryptStream(ctx, l.client, message)
	if err == nil && !bytes.Equal(opened, plaintext) {
		return errors.New("a stream opened to something else")
	}
	return err
}

const chunk = 64 << 10

func encryptStream(ctx context.Context, c kmsagentv1.KMSClient, plaintext []byte) ([]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := c.EncryptStream(ctx)
	if err != nil {
		return nil, err
	}
	go func() {
		_ = s.Send(&kmsagentv1.EncryptStreamRequest{Part: &kmsagentv1.EncryptStreamRequest_Start{Start: &kmsagentv1.EncryptStreamStart{Key: "orders"}}})
		for part := range chunks(plaintext) {
			_ = s.Send(&kmsagentv1.EncryptStreamRequest{Part: &kmsagentv1.EncryptStreamRequest_Chunk{Chunk: part}})
		}
		_ = s.CloseSend()
	}()
	var out []byte
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		out = append(out, r.GetChunk()...)
	}
}

func decryptStream(ctx context.Context, c kmsagentv1.KMSClient, message []byte) ([]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := c.DecryptStream(ctx)
	if err != nil {
		return nil, err
	}
	go func() {
		_ = s.Send(&kmsagentv1.DecryptStreamRequest{Part: &kmsagentv1.DecryptStreamRequest_Start{Start: &kmsagentv1.DecryptStreamStart{}}})
		for part := range chunks(message) {
			_ = s.Send(&kmsagentv1.DecryptStreamRequest{Part: &kmsagentv1.DecryptStreamRequest_Chunk{Chunk: part}})
		}
		_ = s.CloseSend()
	}()
	var out []byte
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		out = append(out, r.GetChunk()...)
	}
}

func chunks(b []byte) func(yield func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(b) > 0 {
			n := min(chunk, len(b))
			if !yield(b[:n]) {
				return
			}
			b = b[n:]
		}
	}
}

// leftStreams are begun and left.
func leftStreams(ctx context.Context, l *load) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := l.client.EncryptStream(ctx)
	if err != nil {
		return err
	}
	_ = s.Send(&kmsagentv1.EncryptStreamRequest{Part: &kmsagentv1.EncryptStreamRequest_Start{Start: &kmsagentv1.EncryptStreamStart{Key: "orders"}}})
	_ = s.Send(&kmsagentv1.EncryptStreamRequest{Part: &kmsagentv1.EncryptStreamRequest_Chunk{Chunk: payload(chunk)}})
	_, err = s.Recv()
	return err
}

// administrator reloads, evicts and replaces under load.
func administrator(ctx context.Context, l *load) error {
	return l.administer(ctx, func(ctx context.Context, c adminv1.AdminClient) error {
		var err error
		switch mrand.IntN(4) {
		case 0:
			l.configure(fmt.Sprint(mrand.Int()))
			_, err = c.Reload(ctx, &adminv1.ReloadRequest{})
		case 1:
			_, err = c.Evict(ctx, &adminv1.EvictRequest{All: true})
		case 2:
			_, err = c.RestartPlugin(ctx, &adminv1.RestartPluginRequest{Backend: "local"})
		case 3:
			_, err = c.SetLogLevel(ctx, &adminv1.SetLogLevelRequest{Level: "error", For: durationpb.New(time.Second)})
		}
		return err
	})
}

// killer kills the backend's process, which comes again.
func killer(ctx context.Context, l *load) error {
	s, err := l.status()
	if err != nil {
		return err
	}
	if pid := s.GetBackends()[0].GetPid(); pid > 0 {
		_ = unix.Kill(int(pid), unix.SIGKILL) // it may have ended by itself
	}
	// The administrator's own replacement may fail while it is down.
	for ctx.Err() == nil {
		if s, err = l.status(); err == nil && s.GetBackends()[0].GetState() == "up" {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil
}
