package serve

import (
	"net"
	"sync"

	"github.com/kms-agent/kms-agent/identity"
)

// Bound returns a listener that has at most total connections open at a time,
// and at most perUser of one user of the host: further ones of a user are closed
// at once, and refused is told; of all users together they wait in the kernel's
// queue. refused must not block.
func Bound(l net.Listener, total, perUser int, refused func(uid uint32)) net.Listener {
	return &boundListener{
		Listener: l, places: make(chan struct{}, total), closed: make(chan struct{}),
		perUser: perUser, byUser: map[uint32]int{}, refused: refused,
	}
}

type boundListener struct {
	net.Listener

	places    chan struct{}
	closed    chan struct{}
	closeOnce sync.Once
	perUser   int
	refused   func(uid uint32)

	mu     sync.Mutex
	byUser map[uint32]int // mu guards byUser
}

// Accept returns the next connection that is within the bounds.
func (l *boundListener) Accept() (net.Conn, error) {
	select {
	case l.places <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			<-l.places
			return nil, err
		}
		peer, err := identity.PeerOf(conn)
		if err != nil { // it has ended already, or nobody can say whose it is
			_ = conn.Close()
			continue
		}
		if !l.enter(peer.UID) {
			_ = conn.Close()
			l.refused(peer.UID)
			continue
		}
		return &boundConn{Conn: conn, leave: func() { l.leave(peer.UID) }}, nil
	}
}

func (l *boundListener) enter(uid uint32) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byUser[uid] >= l.perUser {
		return false
	}
	l.byUser[uid]++
	return true
}

func (l *boundListener) leave(uid uint32) {
	l.mu.Lock()
	if l.byUser[uid]--; l.byUser[uid] == 0 {
		delete(l.byUser, uid)
	}
	l.mu.Unlock()
	<-l.places
}

func (l *boundListener) Close() error {
	l.closeOnce.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

type boundConn struct {
	net.Conn

	once  sync.Once
	leave func()
}

func (c *boundConn) Close() error {
	defer c.once.Do(c.leave)
	return c.Conn.Close()
}

// NetConn lets the kernel be asked about the socket below.
func (c *boundConn) NetConn() net.Conn { return c.Conn }
