package serve

import (
	"net"
	"sync"
)

// Bound returns a listener that accepts at most limit connections at a time;
// further ones wait in the kernel's queue.
func Bound(l net.Listener, limit int) net.Listener {
	return &boundListener{Listener: l, places: make(chan struct{}, limit), closed: make(chan struct{})}
}

type boundListener struct {
	net.Listener

	places    chan struct{}
	closed    chan struct{}
	closeOnce sync.Once
}

func (l *boundListener) Accept() (net.Conn, error) {
	select {
	case l.places <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.places
		return nil, err
	}
	return &boundConn{Conn: conn, leave: func() { <-l.places }}, nil
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
