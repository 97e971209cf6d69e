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
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/envelope"
)

// cryptor is what Client and InProcess have in common.
type cryptor interface {
	Encrypt(context.Context, *client.EncryptRequest) (*client.EncryptResponse, error)
	Decrypt(context.Context, *client.DecryptRequest) (*client.DecryptResponse, error)
	EncryptStream(context.Context, *client.EncryptStreamStart, io.Reader, io.Writer) (*client.KeyUse, error)
	DecryptStream(context.Context, *client.DecryptStreamStart, io.Reader, io.Writer) (*client.DecryptStreamHeader, error)
	NewEncryptWriter(context.Context, *client.EncryptStreamStart, io.Writer) *client.EncryptWriter
	NewDecryptReader(context.Context, *client.DecryptStreamStart, io.Reader) (*client.DecryptReader, error)
}

var (
	_ cryptor = (*client.Client)(nil)
	_ cryptor = (*client.InProcess)(nil)
)

// as connects to the real agent.
func as(t testing.TB, workload string) *client.Client {
	t.Helper()
	return dial(t, client.Options{Socket: devAgent.socket(), WorkloadAPI: devAgent.workload(workload)})
}

func inProcess(t testing.TB, c *client.Client) *client.InProcess {
	t.Helper()
	p, err := c.InProcess(client.CacheLimits{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

var acme = map[string]string{"tenant": "acme"}

// pairs are all ways to make and to open a message.
func pairs(t *testing.T, run func(t *testing.T, makes, opens cryptor)) {
	c := as(t, "orders")
	p := inProcess(t, c)
	for name, pair := range map[string][2]cryptor{
		"agent, agent": {c, c}, "agent, in process": {c, p}, "in process, agent": {p, c}, "in process, in process": {p, p},
		"in process, another": {p, inProcess(t, as(t, "orders"))},
	} {
		t.Run(name, func(t *testing.T) { run(t, pair[0], pair[1]) })
	}
}

func TestMessagesOpenBothWays(t *testing.T) {
	pairs(t, func(t *testing.T, makes, opens cryptor) {
		for _, size := range []int{0, 1, 5000, 900_000} {
			data := make([]byte, size)
			_, _ = rand.Read(data)
			sealed, err := makes.Encrypt(patiently(t), &client.EncryptRequest{Key: "orders", Plaintext: data, Context: acme})
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(sealed.GetMessage(), data) && size > 1 {
				t.Fatal("the message holds the plaintext")
			}
			opened, err := opens.Decrypt(patiently(t), &client.DecryptRequest{Message: sealed.GetMessage(), ExpectedContext: acme})
			if err != nil || !bytes.Equal(opened.GetPlaintext(), data) || !cmp.Equal(opened.GetContext(), acme) {
				t.Fatalf("%d bytes: got %d, context %v, %v", size, len(opened.GetPlaintext()), opened.GetContext(), err)
			}
			for _, use := range []*client.KeyUse{sealed.GetKeyUse(), opened.GetKeyUse()} {
				if use.GetKey() != "orders" || use.GetKeyVersion() != "1" || client.FreshnessOf(use).Source == 0 {
					t.Errorf("key use %v", use)
				}
			}
		}
	})
}

func TestStreamsOpenBothWays(t *testing.T) {
	pairs(t, func(t *testing.T, makes, opens cryptor) {
		for _, size := range []int{0, 1, 64 << 10, 300_000} {
			for _, limit := range []uint64{0, uint64(size)} {
				data := make([]byte, size)
				_, _ = rand.Read(data)
				start := &client.EncryptStreamStart{Key: "orders", Context: acme, LengthLimit: limit}
				var message, plaintext bytes.Buffer
				use, err := makes.EncryptStream(patiently(t), start, iotest.HalfReader(bytes.NewReader(data)), &message)
				if err != nil || use.GetKey() != "orders" {
					t.Fatalf("%d bytes: %v, %v", size, use, err)
				}
				header, err := opens.DecryptStream(patiently(t), &client.DecryptStreamStart{ExpectedContext: acme}, iotest.HalfReader(&message), &plaintext)
				if err != nil || !bytes.Equal(plaintext.Bytes(), data) || !cmp.Equal(header.GetContext(), acme) || header.GetKeyUse().GetKey() != "orders" {
					t.Fatalf("%d bytes: got %d, %v, %v", size, plaintext.Len(), header, err)
				}
			}
		}
	})
}

// Failures have the agent's own reasons, wherever the work is done.
func TestFailuresAreAlike(t *testing.T) {
	pairs(t, func(t *testing.T, makes, opens cryptor) {
		sealed, err := makes.Encrypt(patiently(t), &client.EncryptRequest{Key: "orders", Plaintext: []byte("secret"), Context: acme})
		if err != nil {
			t.Fatal(err)
		}
		message := sealed.GetMessage()
		changed := bytes.Clone(message)
		changed[len(changed)-1] ^= 1
		for name, c := range map[string]struct {
			request *client.DecryptRequest
			want    client.Reason
		}{
			"changed":            {&client.DecryptRequest{Message: changed}, client.ErrDecryptFailed},
			"another context":    {&client.DecryptRequest{Message: message, ExpectedContext: map[string]string{"tenant": "evil"}}, client.ErrDecryptFailed},
			"absent context":     {&client.DecryptRequest{Message: message, ExpectedContext: map[string]string{"table": ""}}, client.ErrDecryptFailed},
			"no message":         {&client.DecryptRequest{Message: []byte("hello")}, client.ErrInvalidMessage},
			"empty":              {&client.DecryptRequest{}, client.ErrInvalidMessage},
			"cut":                {&client.DecryptRequest{Message: message[:len(message)-1]}, client.ErrInvalidMessage},
			"followed by others": {&client.DecryptRequest{Message: append(bytes.Clone(message), 1)}, client.ErrInvalidMessage},
			"negative staleness": {&client.DecryptRequest{Message: message, MaxStale: client.MaxStale(-1)}, client.ErrInvalidRequest},
		} {
			answer, err := opens.Decrypt(patiently(t), c.request)
			if !errors.Is(err, c.want) || answer != nil {
				t.Errorf("%s: got %v, %v, want %v", name, answer, err, c.want)
			}
		}
		for name, r := range map[string]*client.EncryptRequest{
			"reserved context":   {Key: "orders", Context: map[string]string{"aws-crypto-x": "y"}},
			"negative staleness": {Key: "orders", MaxStale: client.MaxStale(-1)},
		} {
			if _, err := makes.Encrypt(patiently(t), r); !errors.Is(err, client.ErrInvalidRequest) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := makes.Encrypt(patiently(t), nil); err == nil {
			t.Error("encrypt: nil is a request")
		}
		if _, err := opens.Decrypt(patiently(t), nil); !errors.Is(err, client.ErrInvalidMessage) {
			t.Errorf("decrypt: nil: %v", err)
		}
		if _, err := makes.EncryptStream(patiently(t), nil, strings.NewReader("x"), io.Discard); err == nil {
			t.Error("encrypt stream: nil is a start")
		}
		if _, err := opens.DecryptStream(patiently(t), nil, bytes.NewReader(message), io.Discard); err != nil {
			t.Errorf("decrypt stream: nil expects nothing, got %v", err)
		}
		if _, err := makes.Encrypt(patiently(t), &client.EncryptRequest{Key: "unknown"}); !errors.Is(err, client.ErrAccessDenied) {
			t.Errorf("unknown key: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := makes.Encrypt(ctx, &client.EncryptRequest{Key: "orders", Context: map[string]string{"new": "one"}}); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
	})
}

// Another workload gets neither a data key nor a plaintext.
func TestInProcessOfAStranger(t *testing.T) {
	sealed, err := inProcess(t, as(t, "orders")).Encrypt(patiently(t), &client.EncryptRequest{Key: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	stranger := inProcess(t, as(t, "stranger"))
	if _, err := stranger.Decrypt(patiently(t), &client.DecryptRequest{Message: sealed.GetMessage()}); !errors.Is(err, client.ErrAccessDenied) {
		t.Errorf("decrypt: %v", err)
	}
	if _, err := stranger.Encrypt(patiently(t), &client.EncryptRequest{Key: "orders"}); !errors.Is(err, client.ErrAccessDenied) {
		t.Errorf("encrypt: %v", err)
	}
}

func TestInProcessCache(t *testing.T) {
	p := inProcess(t, as(t, "orders"))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 50 {
				tenant := map[string]string{"tenant": fmt.Sprint(i % 2)}
				sealed, err := p.Encrypt(patiently(t), &client.EncryptRequest{Key: "orders", Plaintext: []byte("x"), Context: tenant})
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := p.Decrypt(patiently(t), &client.DecryptRequest{Message: sealed.GetMessage(), ExpectedContext: tenant}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	want := client.CacheStats{Entries: 2, Hits: 398, Misses: 2}
	if got := p.EncryptionStats(); got != want {
		t.Errorf("encryption: %+v, want %+v", got, want)
	}
	if got := p.DecryptionStats(); got != want {
		t.Errorf("decryption: %+v, want %+v", got, want)
	}
	sealed, err := p.Encrypt(patiently(t), &client.EncryptRequest{Key: "orders", Context: map[string]string{"tenant": "0"}, MaxStale: client.MaxStale(0)})
	if err != nil || client.FreshnessOf(sealed.GetKeyUse()) != (client.Freshness{Source: client.SourceUpstream}) || p.EncryptionStats().Misses != 3 {
		t.Errorf("max_stale 0: %v, %+v; want a key that is confirmed upstream", err, p.EncryptionStats())
	}
	again, err := p.Encrypt(patiently(t), &client.EncryptRequest{Key: "orders", Context: map[string]string{"tenant": "0"}})
	if f := client.FreshnessOf(again.GetKeyUse()); err != nil || f.Source != client.SourceCached || f.Age <= 0 {
		t.Errorf("afterwards: %+v, %v, want a cached key and its age", f, err)
	}
	if err := errors.Join(p.Close(), p.Close()); err != nil {
		t.Error(err)
	}
	if _, err := p.Encrypt(patiently(t), &client.EncryptRequest{Key: "orders"}); err == nil || p.EncryptionStats().Entries != 0 {
		t.Errorf("after Close: %v, %+v", err, p.EncryptionStats())
	}
}

// While the agent is away, what has a data key goes on; when it is there again,
// everything does, on the same client.
func TestRealAgentRestarts(t *testing.T) {
	own := &realAgent{dir: tempDir(t), binary: devAgent.binary}
	if err := own.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = own.stop() })
	c := dial(t, client.Options{Socket: own.socket(), WorkloadAPI: own.workload("orders"), Retry: time.Minute})
	p := inProcess(t, c)
	request := &client.EncryptRequest{Key: "orders", Plaintext: []byte("x")}
	if _, err := p.Encrypt(patiently(t), request); err != nil {
		t.Fatal(err)
	}
	if err := own.stop(); err != nil {
		t.Fatal(err)
	}
	sealed, err := p.Encrypt(patiently(t), request)
	if err != nil {
		t.Fatalf("without the agent, with a data key at hand: %v", err)
	}
	opened := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_, err := c.Decrypt(ctx, &client.DecryptRequest{Message: sealed.GetMessage()})
		opened <- err
	}()
	if err := own.start(); err != nil {
		t.Fatal(err)
	}
	if err := <-opened; err != nil {
		t.Errorf("a call over the restart: %v", err)
	}
}

func TestInProcessStreamFaults(t *testing.T) {
	c := as(t, "orders")
	p := inProcess(t, c)
	start := &client.EncryptStreamStart{Key: "orders"}
	var whole bytes.Buffer
	if _, err := p.EncryptStream(patiently(t), start, strings.NewReader(strings.Repeat("x", 200_000)), &whole); err != nil {
		t.Fatal(err)
	}
	fault := errors.New("disk on fire")
	changed := bytes.Clone(whole.Bytes())
	changed[150_000] ^= 1
	for name, o := range map[string]struct {
		r    io.Reader
		w    io.Writer
		want error
	}{
		"cut":                {bytes.NewReader(whole.Bytes()[:150_000]), io.Discard, client.ErrStreamTruncated},
		"cut header":         {bytes.NewReader(whole.Bytes()[:50]), io.Discard, client.ErrStreamTruncated},
		"no message":         {strings.NewReader("hello, this is no message"), io.Discard, client.ErrInvalidMessage},
		"goes on":            {io.MultiReader(bytes.NewReader(whole.Bytes()), strings.NewReader("x")), io.Discard, client.ErrInvalidMessage},
		"changed":            {bytes.NewReader(changed), io.Discard, client.ErrDecryptFailed},
		"read fails":         {io.MultiReader(bytes.NewReader(whole.Bytes()[:100_000]), iotest.ErrReader(fault)), io.Discard, fault},
		"read fails at once": {iotest.ErrReader(fault), io.Discard, fault},
		"read was cut":       {iotest.ErrReader(io.ErrUnexpectedEOF), io.Discard, io.ErrUnexpectedEOF},
		"write fails":        {bytes.NewReader(whole.Bytes()), failingWriter{fault}, fault},
		"short write":        {bytes.NewReader(whole.Bytes()), short{}, io.ErrShortWrite},
	} {
		header, err := p.DecryptStream(patiently(t), &client.DecryptStreamStart{}, o.r, o.w)
		if !errors.Is(err, o.want) || header != nil {
			t.Errorf("decrypt, %s: got %v, %v, want %v", name, header, err, o.want)
		}
	}
	for name, o := range map[string]struct {
		start *client.EncryptStreamStart
		r     io.Reader
		w     io.Writer
		want  error
	}{
		"read fails":        {start, iotest.ErrReader(fault), io.Discard, fault},
		"without progress":  {start, idle{}, io.Discard, io.ErrNoProgress},
		"write fails":       {start, strings.NewReader("x"), failingWriter{fault}, fault},
		"short write":       {start, strings.NewReader("x"), short{}, io.ErrShortWrite},
		"over its limit":    {&client.EncryptStreamStart{Key: "orders", LengthLimit: 3}, strings.NewReader("four"), io.Discard, client.ErrTooLarge},
		"limit beyond ours": {&client.EncryptStreamStart{Key: "orders", LengthLimit: client.DefaultMaxBytes + 1}, strings.NewReader("x"), io.Discard, client.ErrTooLarge},
		"context":           {&client.EncryptStreamStart{Key: "orders", Context: map[string]string{"": "x"}}, strings.NewReader("x"), io.Discard, client.ErrInvalidRequest},
		"denied":            {&client.EncryptStreamStart{Key: "other"}, strings.NewReader("x"), io.Discard, client.ErrAccessDenied},
	} {
		use, err := p.EncryptStream(patiently(t), o.start, o.r, o.w)
		if !errors.Is(err, o.want) || use != nil {
			t.Errorf("encrypt, %s: got %v, %v, want %v", name, use, err, o.want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	var n int
	_, err := p.EncryptStream(ctx, start, readerFunc(func(b []byte) (int, error) {
		if n++; n == 3 {
			cancel()
		}
		return len(b), nil
	}), io.Discard)
	if !errors.Is(err, context.Canceled) || n != 3 {
		t.Errorf("cancelled: %v after %d reads, want 3", err, n)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// Data keys of two keys in one message: which it is, the agent decides, and it
// refuses.
func TestInProcessMixedMessage(t *testing.T) {
	c := as(t, "orders")
	made, err := c.GenerateDataKey(patiently(t), &client.GenerateDataKeyRequest{Key: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	edk := made.GetEncryptedDataKey()
	info, err := envelope.ParseProviderInfo(edk.GetProviderInfo())
	if err != nil {
		t.Fatal(err)
	}
	info.Key = "another"
	other, err := info.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	message, err := envelope.Seal(nil, made.GetPlaintext(), []envelope.EDK{
		{ProviderID: envelope.ProviderID, ProviderInfo: other, Ciphertext: []byte{1}},
		{ProviderID: edk.GetProviderId(), ProviderInfo: edk.GetProviderInfo(), Ciphertext: edk.GetCiphertext()},
	}, nil, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	p := inProcess(t, c)
	_, want := c.Decrypt(patiently(t), &client.DecryptRequest{Message: message})
	_, got := p.Decrypt(patiently(t), &client.DecryptRequest{Message: message})
	if fmt.Sprint(reason(got)) != fmt.Sprint(reason(want)) || p.DecryptionStats().Misses != 0 {
		t.Errorf("got %v, want what the agent says: %v", got, want)
	}
}

func reason(err error) client.Reason {
	var e *client.Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return ""
}
