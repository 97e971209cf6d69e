package serve_test

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/serve"
)

// One user does not take every place, and a connection that ends gives its back.
func TestConnectionsOfOneUser(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	inner, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	refused := make(chan uint32, 10)
	l := serve.Bound(inner, 10, 2, func(uid uint32) { refused <- uid })
	accepted := make(chan net.Conn)
	go func() {
		defer close(accepted)
		for {
			conn, err := l.Accept()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Error(err)
				}
				return
			}
			accepted <- conn
		}
	}()
	dial := func() net.Conn {
		t.Helper()
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	dial()
	first := <-accepted
	dial()
	second := <-accepted
	tooMany := dial()
	if uid := <-refused; uid != uint32(os.Getuid()) {
		t.Errorf("refused is user %d", uid)
	}
	_ = tooMany.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := tooMany.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the connection that was too many: %v, want its end", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	_ = first.Close() // a second time gives no second place
	dial()
	third := <-accepted
	dial()
	<-refused
	for _, conn := range []net.Conn{second, third} {
		_ = conn.Close()
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	<-accepted
}
