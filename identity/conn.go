package identity

import (
	"crypto/tls"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"
)

// Conn is one connection as the handshake left it: gRPC's AuthInfo. It is safe
// for concurrent use.
type Conn struct {
	credentials.CommonAuthInfo
	// Peer is who called connect(2). A connection can be passed on to another
	// process, which then speaks with the first one's identity.
	Peer Peer
	// TLS is nil on a plaintext connection. It is not to be changed.
	TLS *tls.ConnectionState

	// credentials made the connection.
	credentials *Credentials
	verifier    Verifier
	// verdict is what verifier last found out.
	verdict atomic.Pointer[verdict]
	// pidfd of the process that connected; nil where the kernel has none.
	pidfd *os.File
	// transport is what Close closes.
	transport net.Conn

	closeOnce sync.Once
	closeErr  error
	// ending is set when the timer that ends the connection has been started.
	ending atomic.Bool
	mu     sync.Mutex
	timer  *time.Timer // mu guards timer
	closed bool        // mu guards closed
}

// verdict is a finding that holds while its basis is the current one: a
// pointer to the bundles, or to the table of static peers.
type verdict struct {
	basis  any
	caller Caller
	err    error
}

// AuthType implements gRPC's AuthInfo.
func (c *Conn) AuthType() string { return "kms-agent" }

// PeerExited reports whether the process that connected has ended, and whether
// that is known: it is not before Linux 6.5. A connection may outlive the
// process, in a child or in whoever it was passed to.
func (c *Conn) PeerExited() (exitedNow, known bool) {
	if c.pidfd == nil {
		return false, false
	}
	ended, err := exited(c.pidfd)
	return ended, err == nil
}

// endAt closes the connection at t, so that its client connects again and shows
// the SVID that it has by then: gRPC clients keep a connection as long as they
// can and would otherwise go on failing on this one. Only the first call counts.
func (c *Conn) endAt(t time.Time, now time.Time) {
	if c.transport == nil || !c.ending.CompareAndSwap(false, true) {
		return
	}
	// A client that calls after t is told why before it is cut off.
	wait := max(t.Sub(now), lastWord)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.timer = time.AfterFunc(wait, func() { _ = c.close() })
	}
}

// lastWord is the time in which a refusal reaches the client before its
// connection is closed.
const lastWord = 100 * time.Millisecond

func (c *Conn) close() error {
	c.closeOnce.Do(func() {
		c.mu.Lock()
		c.closed = true
		if c.timer != nil {
			c.timer.Stop()
		}
		c.mu.Unlock()
		c.closeErr = c.transport.Close()
		if c.pidfd != nil {
			_ = c.pidfd.Close()
		}
	})
	return c.closeErr
}

// ownedConn is the net.Conn that gRPC gets: closing it releases all of Conn.
type ownedConn struct {
	net.Conn
	owner *Conn
}

func (c *ownedConn) Close() error { return c.owner.close() }

// NetConn returns the connection below, TLS or plain.
func (c *ownedConn) NetConn() net.Conn { return c.Conn }
