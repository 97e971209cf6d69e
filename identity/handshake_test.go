package identity_test

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/kms-agent/kms-agent/identity"
)

// pair is both ends of one Unix connection.
func pair(t testing.TB, l net.Listener) (client *net.UnixConn, server net.Conn) {
	t.Helper()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.UnixConn), server
}

// FuzzHandshake is a client that says anything and then hangs up, or does not.
// The handshake ends by its deadline, never panics, and never finds a caller.
func FuzzHandshake(f *testing.F) {
	for _, seed := range []string{
		"", "\x16", "P", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00", "GET / HTTP/1.1\r\n\r\n",
		"\x16\x03\x01\xff\xff", "\x16\x03\x03\x40\x00\x01\xff\xff\xff", "\x15\x03\x01\x00\x02\x02\x28", "\x80\x2e\x01\x00\x02",
	} {
		f.Add([]byte(seed), true)
		f.Add([]byte(seed), false)
	}
	const timeout = 20 * time.Millisecond
	w := newWorld(f, func(c *identity.Config) {
		c.HandshakeTimeout = timeout
		c.StaticPeers = nil
	})
	l := listen(f, filepath.Join(tempDir(f), "s"), 0o600)
	f.Fuzz(func(t *testing.T, said []byte, hangUp bool) {
		if len(said) > 64<<10 {
			return // more than the socket's buffer: Write would wait for the reader
		}
		client, server := pair(t, l)
		defer func() { _, _ = client.Close(), server.Close() }()
		if _, err := client.Write(said); err != nil {
			t.Fatal(err)
		}
		if hangUp {
			_ = client.CloseWrite()
		}
		began := time.Now()
		conn, info, err := w.agent.creds.ServerHandshake(server)
		if took := time.Since(began); took > timeout+patience {
			t.Fatalf("the handshake took %v", took)
		}
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		isTLS := len(said) > 0 && said[0] == 0x16
		if isTLS || info.(*identity.Conn).TLS != nil {
			t.Fatalf("a handshake succeeded on %q", said)
		}
		if caller, err := identity.CallerFromContext(contextOf(info)); err == nil {
			t.Fatalf("%q made a caller: %+v", said, caller)
		}
		b := make([]byte, 1)
		if n, err := conn.Read(b); n != 1 || err != nil || b[0] != said[0] {
			t.Fatalf("the first byte is lost: read %q (%v) of %q", b[:n], err, said)
		}
	})
}

func contextOf(info credentials.AuthInfo) context.Context {
	return peer.NewContext(context.Background(), &peer.Peer{AuthInfo: info})
}

// live returns the context of a call on a connection that is open.
func (w *world) live(t testing.TB, withTLS bool) context.Context {
	t.Helper()
	l := listen(t, filepath.Join(tempDir(t), "s"), 0o600)
	client, server := pair(t, l)
	t.Cleanup(func() { _ = client.Close() })
	done := make(chan error, 1)
	go func() {
		if !withTLS {
			_, err := client.Write([]byte("PRI"))
			done <- err
			return
		}
		cfg := tlsClient(w.own.leaf(t, orders.String(), nil))
		cfg.NextProtos = []string{"h2"}
		done <- tlsHandshake(client, cfg)
	}()
	conn, info, err := w.agent.creds.ServerHandshake(server)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := identity.CallerFromContext(contextOf(info)); err != nil {
		t.Fatal(err)
	}
	return contextOf(info)
}

// What is asked at every call allocates nothing.
func TestCallerFromContextAllocatesNothing(t *testing.T) {
	w := newWorld(t, nil)
	for name, withTLS := range map[string]bool{"x509": true, "static": false} {
		// As a request's context is, but without a token.
		ctx := metadata.NewIncomingContext(w.live(t, withTLS), metadata.MD{
			":authority": {"localhost"}, "content-type": {"application/grpc"}, "user-agent": {"test"},
		})
		if n := testing.AllocsPerRun(100, func() { _, _ = identity.CallerFromContext(ctx) }); n > 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func BenchmarkCallerFromContext(b *testing.B) {
	w := newWorld(b, func(c *identity.Config) { c.Now = nil })
	for name, withTLS := range map[string]bool{"x509": true, "static": false} {
		b.Run(name, func(b *testing.B) {
			ctx := w.live(b, withTLS)
			for b.Loop() {
				if _, err := identity.CallerFromContext(ctx); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
