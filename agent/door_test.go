package agent_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

// raw opens a connection for bytes that no client would send.
func (r *rig) raw() net.Conn {
	r.t.Helper()
	conn, err := (&net.Dialer{}).DialContext(r.t.Context(), "unix", r.path("kms.sock"))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		r.t.Fatal(err)
	}
	return conn
}

// request begins a gRPC request on a raw connection and sends some of its body.
func request(t *testing.T, conn net.Conn, method string, body []byte, header ...string) *http2.Framer {
	t.Helper()
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	framer := http2.NewFramer(conn, conn)
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	fields := append([]string{
		":method", "POST", ":scheme", "http", ":path", method, ":authority", "x", "content-type", "application/grpc", "te", "trailers",
	}, header...)
	for i := 0; i < len(fields); i += 2 {
		if err := encoder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}); err != nil {
			t.Fatal(err)
		}
	}
	if err := framer.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	if err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true}); err != nil {
		t.Fatal(err)
	}
	if err := framer.WriteData(1, false, body); err != nil {
		t.Fatal(err)
	}
	return framer
}

// trailer reads until the answer to the first request has its gRPC status.
func trailer(t *testing.T, framer *http2.Framer) map[string]string {
	t.Helper()
	got := map[string]string{}
	decoder := hpack.NewDecoder(4096, func(f hpack.HeaderField) { got[f.Name] = f.Value })
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			t.Fatalf("no answer: %v", err)
		}
		if h, ok := frame.(*http2.HeadersFrame); ok {
			if _, err := decoder.Write(h.HeaderBlockFragment()); err != nil {
				t.Fatal(err)
			}
			if got["grpc-status"] != "" {
				return got
			}
		}
	}
}

// held begins a request of 1024 bytes, sends some of them and returns when the
// agent has let it in or refused it: it answers the frames of a connection in turn.
func held(t *testing.T, conn net.Conn, method string) {
	t.Helper()
	framer := request(t, conn, method, append([]byte{0, 0, 0, 4, 0}, make([]byte, 100)...))
	if err := framer.WritePing(false, [8]byte{1}); err != nil {
		t.Fatal(err)
	}
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			t.Fatalf("no answer: %v", err)
		}
		if p, ok := frame.(*http2.PingFrame); ok && p.IsAck() {
			return
		}
	}
}

// half is the beginning of a message of a gigabyte.
func half() []byte {
	b := make([]byte, 5, 1000)
	binary.BigEndian.PutUint32(b[1:], 1<<30)
	return append(b, make([]byte, 900)...)
}

const encryptMethod = "/kmsagent.v1.KMS/Encrypt"

// Who is not known is refused before the payload is there, on the record, and is
// told so in the terms of the API.
func TestRefusedBeforeThePayload(t *testing.T) {
	r := newRig(t, withAudit("coalesce_denials: 0s"))
	r.start()
	got := trailer(t, request(t, r.raw(), encryptMethod, half()))
	if got["grpc-status"] != fmt.Sprint(int(codes.Unauthenticated)) {
		t.Errorf("trailer = %v, want UNAUTHENTICATED though the payload never comes", got)
	}
	_, err := kmsagentv1.NewKMSClient(r.plain()).Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"})
	if status.Code(err) != codes.Unauthenticated || len(status.Convert(err).Details()) == 0 {
		t.Errorf("error = %v, want UNAUTHENTICATED with details", err)
	}
	if n := strings.Count(r.auditLog(), `"reason":"CALLER_UNIDENTIFIED"`); n < 2 {
		t.Errorf("%d refusals are on record, want 2:\n%s", n, r.auditLog())
	}
}

// Requests that are half sent count, so that one caller holds a bounded number
// of them, and no longer when they end.
func TestHalfSentRequestsCount(t *testing.T) {
	r := newRig(t, strings.Replace(configText("PEERS", staticPeer()), "limits: {", "limits: { max_concurrent_per_caller: 2,", 1))
	r.start()
	c := kmsagentv1.NewKMSClient(r.plain())
	encrypt := func() error {
		_, err := c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"})
		return err
	}
	first, second := r.raw(), r.raw()
	held(t, first, encryptMethod)
	held(t, second, encryptMethod)
	err := encrypt()
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a third request: %v, want RESOURCE_EXHAUSTED", err)
	}
	_ = first.Close()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if err = encrypt(); err == nil {
			return
		}
	}
	t.Errorf("after the end of one: %v", err)
}

// Anybody may ask for health, and nobody holds more than a bounded number of such
// requests half sent.
func TestHalfSentHealthRequestsCount(t *testing.T) {
	r := newRig(t, strings.Replace(configText(), "limits: {", "limits: { max_concurrent_per_caller: 1,", 1))
	r.start()
	c := grpc_health_v1.NewHealthClient(r.plain())
	check := func() error {
		_, err := c.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
		return err
	}
	conn := r.raw()
	held(t, conn, grpc_health_v1.Health_Check_FullMethodName)
	err := check()
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a second request: %v, want RESOURCE_EXHAUSTED", err)
	}
	_ = conn.Close()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Errorf("after the end of the first: %v", err)
}

// What no client would send harms nobody.
func TestHostileBytes(t *testing.T) {
	r := newRig(t, administrator("PEERS", staticPeer()))
	r.start()
	honest := kmsagentv1.NewKMSClient(r.plain())
	for name, send := range map[string]func(conn net.Conn){
		"nothing":          func(net.Conn) {},
		"zeros":            func(c net.Conn) { _, _ = c.Write(make([]byte, 4096)) },
		"HTTP/1":           func(c net.Conn) { _, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n") },
		"preface only":     func(c net.Conn) { _, _ = io.WriteString(c, http2.ClientPreface) },
		"half a preface":   func(c net.Conn) { _, _ = io.WriteString(c, http2.ClientPreface[:10]) },
		"TLS client hello": func(c net.Conn) { _, _ = c.Write([]byte{0x16, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3}) },
		"a frame of 16 MiB": func(c net.Conn) {
			_, _ = c.Write(append([]byte(http2.ClientPreface), 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1))
		},
		"unknown method":  func(c net.Conn) { request(t, c, "/kmsagent.v1.KMS/Steal", half()) },
		"no method":       func(c net.Conn) { request(t, c, "/", half()) },
		"length of a GiB": func(c net.Conn) { request(t, c, encryptMethod, half()) },
		"unknown compressor": func(c net.Conn) {
			request(t, c, encryptMethod, []byte{1, 0, 0, 0, 1, 0}, "grpc-encoding", "zip-bomb")
		},
		"rubbish body":      func(c net.Conn) { request(t, c, encryptMethod, []byte{0, 0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff}) },
		"deadline of zero":  func(c net.Conn) { request(t, c, encryptMethod, nil, "grpc-timeout", "0S") },
		"deadline of years": func(c net.Conn) { request(t, c, encryptMethod, []byte{0, 0, 0, 0, 0}, "grpc-timeout", "99999999H") },
		"rubbish deadline":  func(c net.Conn) { request(t, c, encryptMethod, nil, "grpc-timeout", "soon") },
		"large header":      func(c net.Conn) { request(t, c, encryptMethod, nil, "x", strings.Repeat("x", 15<<10)) },
		"rubbish frames": func(c net.Conn) {
			_, _ = io.WriteString(c, http2.ClientPreface)
			for kind := range byte(12) {
				_, _ = c.Write(append([]byte{0, 0, 5, kind, 0xff, 0, 0, 0, 1}, "12345"...))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			conn := r.raw()
			send(conn)
			if _, err := honest.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"}); err != nil {
				t.Errorf("an honest caller meanwhile: %v", err)
			}
			_ = conn.Close()
			send(r.raw()) // and left open
		})
	}
	if s, err := r.status(); err != nil || s.GetState() != "serving" {
		t.Errorf("status = %v, %v", s.GetState(), err)
	}
}

// Requests that clients can make and should not.
func TestHostileRequests(t *testing.T) {
	r := newRig(t, configText("PEERS", staticPeer()))
	r.start()
	c := kmsagentv1.NewKMSClient(r.plain())
	ctx := t.Context()
	encrypt := func(ctx context.Context, q *kmsagentv1.EncryptRequest, o ...grpc.CallOption) error {
		_, err := c.Encrypt(ctx, q, o...)
		return err
	}
	flood := metadata.MD{}
	for i := range 2000 {
		flood.Append(fmt.Sprintf("x-%d", i), "some value that takes room")
	}
	expired, cancel := context.WithDeadline(ctx, time.Now().Add(-time.Second))
	defer cancel()
	for name, tc := range map[string]struct {
		err  error
		want codes.Code
	}{
		"bomb":       {encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: make([]byte, 64<<20)}, grpc.UseCompressor(gzip.Name)), codes.ResourceExhausted},
		"compressed": {encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: make([]byte, 1000)}, grpc.UseCompressor(gzip.Name)), codes.OK},
		"oversized":  {encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: make([]byte, 70<<10)}), codes.InvalidArgument},
		"huge":       {encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: make([]byte, 1<<20)}), codes.ResourceExhausted},
		"huge name":  {encrypt(ctx, &kmsagentv1.EncryptRequest{Key: strings.Repeat("x", 100<<10)}), codes.PermissionDenied},
		"metadata":   {encrypt(metadata.NewOutgoingContext(ctx, flood), &kmsagentv1.EncryptRequest{Key: "orders"}), codes.Internal},
		"expired":    {encrypt(expired, &kmsagentv1.EncryptRequest{Key: "orders"}), codes.DeadlineExceeded},
		"other door": {func() error {
			_, err := adminv1.NewAdminClient(r.plain()).Status(ctx, &adminv1.StatusRequest{})
			return err
		}(), codes.Unimplemented},
		"empty":        {encrypt(ctx, &kmsagentv1.EncryptRequest{}), codes.PermissionDenied},
		"zero in name": {encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders\x00"}), codes.PermissionDenied},
	} {
		if got := status.Code(tc.err); got != tc.want {
			t.Errorf("%s: %v (%v), want %v", name, got, tc.err, tc.want)
		}
	}
}

// FuzzNativeDoor sends any bytes to the native socket of a running agent, as
// they are and behind an HTTP/2 preface. It stays up and serves.
func FuzzNativeDoor(f *testing.F) {
	r := newRig(f, configText("PEERS", staticPeer()))
	r.start()
	honest := kmsagentv1.NewKMSClient(r.plain())
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte(http2.ClientPreface))
	f.Add([]byte{0x16, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3})
	f.Add([]byte{0, 0, 5, 1, 4, 0, 0, 0, 1, 0x82, 0x84, 0x86, 0x41, 0x8a})
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, prefix := range []string{"", http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00"} {
			conn, err := (&net.Dialer{}).DialContext(t.Context(), "unix", r.path("kms.sock"))
			if err != nil {
				t.Fatal(err)
			}
			_, _ = conn.Write(append([]byte(prefix), data...)) // it may be closed already
			_ = conn.Close()
		}
		if _, err := honest.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders"}); err != nil {
			t.Errorf("an honest caller: %v", err)
		}
	})
}
