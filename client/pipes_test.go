package client_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/kms-agent/kms-agent/client"
)

func both(t *testing.T, run func(t *testing.T, c cryptor)) {
	c := as(t, "orders")
	t.Run("agent", func(t *testing.T) { run(t, c) })
	t.Run("in process", func(t *testing.T) { run(t, inProcess(t, c)) })
}

func TestWriterAndReader(t *testing.T) {
	both(t, func(t *testing.T, c cryptor) {
		var message bytes.Buffer
		w := c.NewEncryptWriter(patiently(t), &client.EncryptStreamStart{Key: "orders", Context: acme}, &message)
		defer w.Abort()
		if w.KeyUse() != nil {
			t.Error("a key use before the end")
		}
		data := strings.Repeat("0123456789", 30_000)
		for _, part := range []string{data[:1], data[1:100_000], data[100_000:]} {
			if n, err := io.WriteString(w, part); err != nil || n != len(part) {
				t.Fatal(n, err)
			}
		}
		if err := errors.Join(w.Close(), w.Close()); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte("x")); err == nil {
			t.Error("it takes data after its end")
		}
		if w.KeyUse().GetKey() != "orders" {
			t.Errorf("key use %v", w.KeyUse())
		}
		r, err := c.NewDecryptReader(patiently(t), &client.DecryptStreamStart{ExpectedContext: acme}, &message)
		if err != nil {
			t.Fatal(err)
		}
		if h := r.Header(); h.GetContext()["tenant"] != "acme" || h.GetKeyUse().GetKey() != "orders" {
			t.Errorf("header %v", h)
		}
		got, err := io.ReadAll(r)
		if err != nil || string(got) != data {
			t.Fatalf("got %d bytes, %v", len(got), err)
		}
		if err := errors.Join(r.Close(), r.Close()); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
}

// What was not closed well is no message.
func TestWriterGivenUp(t *testing.T) {
	both(t, func(t *testing.T, c cryptor) {
		for _, data := range []string{"", "x", strings.Repeat("x", 200_000)} {
			var message bytes.Buffer
			w := c.NewEncryptWriter(patiently(t), &client.EncryptStreamStart{Key: "orders"}, &message)
			if _, err := io.WriteString(w, data); err != nil {
				t.Fatal(err)
			}
			w.Abort()
			if err := w.Close(); err == nil || w.KeyUse() != nil {
				t.Errorf("Close after Abort: %v, %v", err, w.KeyUse())
			}
			if _, err := c.DecryptStream(patiently(t), &client.DecryptStreamStart{}, &message, io.Discard); err == nil {
				t.Errorf("%d bytes that were given up decrypt", len(data))
			}
		}
	})
}

func TestWriterFails(t *testing.T) {
	full := errors.New("disk full")
	both(t, func(t *testing.T, c cryptor) {
		w := c.NewEncryptWriter(patiently(t), &client.EncryptStreamStart{Key: "orders"}, failingWriter{full})
		if _, err := io.Copy(w, &endless{}); !errors.Is(err, full) {
			t.Errorf("Write: %v", err)
		}
		if err := w.Close(); !errors.Is(err, full) {
			t.Errorf("Close: %v", err)
		}
		w = c.NewEncryptWriter(patiently(t), &client.EncryptStreamStart{Key: "other"}, io.Discard)
		if err := w.Close(); !errors.Is(err, client.ErrAccessDenied) {
			t.Errorf("denied: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		w = c.NewEncryptWriter(ctx, &client.EncryptStreamStart{Key: "orders"}, io.Discard)
		if _, err := io.WriteString(w, "x"); err != nil {
			t.Fatal(err)
		}
		cancel()
		if _, err := io.Copy(w, &endless{}); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: Write: %v", err)
		}
		if err := w.Close(); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: Close: %v", err)
		}
	})
}

func TestReaderFails(t *testing.T) {
	both(t, func(t *testing.T, c cryptor) {
		var message bytes.Buffer
		if _, err := c.EncryptStream(patiently(t), &client.EncryptStreamStart{Key: "orders", Context: acme}, strings.NewReader(strings.Repeat("x", 300_000)), &message); err != nil {
			t.Fatal(err)
		}
		open := func(ctx context.Context, b []byte) *client.DecryptReader {
			t.Helper()
			r, err := c.NewDecryptReader(ctx, &client.DecryptStreamStart{}, bytes.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		r := open(patiently(t), message.Bytes()[:200_000])
		if _, err := io.ReadAll(r); !errors.Is(err, client.ErrStreamTruncated) {
			t.Errorf("cut: %v", err)
		}
		if err := r.Close(); !errors.Is(err, client.ErrStreamTruncated) {
			t.Errorf("cut: Close: %v", err)
		}
		r = open(patiently(t), message.Bytes())
		if _, err := io.ReadFull(r, make([]byte, 300_000)); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(r.Close()); !errors.Is(err, client.ErrIncomplete) {
			t.Errorf("closed before the end: %v", err)
		}
		if _, err := r.Read(make([]byte, 1)); err == nil {
			t.Error("it reads after Close")
		}
		if err := r.Close(); !errors.Is(err, client.ErrIncomplete) {
			t.Errorf("closed again: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		r = open(ctx, message.Bytes())
		cancel()
		if _, err := io.ReadAll(r); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
		_ = r.Close()
		for name, o := range map[string]struct {
			start *client.DecryptStreamStart
			text  io.Reader
			want  error
		}{
			"another context": {&client.DecryptStreamStart{ExpectedContext: map[string]string{"tenant": "evil"}}, bytes.NewReader(message.Bytes()), client.ErrDecryptFailed},
			"no message":      {&client.DecryptStreamStart{}, strings.NewReader("hello, this is no message"), client.ErrInvalidMessage},
		} {
			if r, err := c.NewDecryptReader(patiently(t), o.start, o.text); !errors.Is(err, o.want) || r != nil {
				t.Errorf("%s: got %v, %v", name, r, err)
			}
		}
	})
}
