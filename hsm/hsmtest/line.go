package hsmtest

import (
	"io"
	"net"
	"sync"
	"time"
)

// line passes what comes to one Unix socket on to another, and does to it what its
// ways say.
type line struct {
	near, far string // paths of the sockets
	ended     sync.WaitGroup

	mu       sync.Mutex // guards what follows
	listener net.Listener
	links    map[*link]struct{}
	ways     ways
	changed  chan struct{} // closed when ways change
	made     int           // connections since counted
}

// ways is what is done to connections.
type ways struct {
	refuse, silent bool
	whole, halves  int // answers that pass, then answers that are cut in half
	delay          time.Duration
	rate           int // bytes a second of each connection; 0 is as fast as can be
	clean, dirty   int // answers that pass, then answers of which one bit is another
}

// link is one connection, which is two.
type link struct {
	near, far net.Conn
	end       func()
	ended     chan struct{}
}

func newLine(near, far string) *line {
	return &line{near: near, far: far, links: map[*link]struct{}{}, changed: make(chan struct{})}
}

// open listens at the near end.
func (l *line) open() error {
	listener, err := net.Listen("unix", l.near) //nolint:noctx // it does not wait
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.listener = listener
	l.mu.Unlock()
	l.ended.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			l.take(near)
		}
	})
	return nil
}

// close ends all connections and takes the near end away.
func (l *line) close() {
	l.mu.Lock()
	if l.listener != nil {
		_ = l.listener.Close()
		l.listener = nil
	}
	l.mu.Unlock()
	l.cut()
	l.ended.Wait()
}

func (l *line) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for k := range l.links {
		k.end()
	}
}

func (l *line) change(how func(*ways)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	how(&l.ways)
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *line) counted() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.made
	l.made = 0
	return n
}

// take connects one who came to the far end.
func (l *line) take(near net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.made++
	far, err := net.Dial("unix", l.far) //nolint:noctx // it does not wait
	if err != nil || l.ways.refuse || l.listener == nil {
		_ = near.Close()
		if err == nil {
			_ = far.Close()
		}
		return
	}
	k := &link{near: near, far: far, ended: make(chan struct{})}
	k.end = sync.OnceFunc(func() {
		close(k.ended)
		_, _ = near.Close(), far.Close()
	})
	l.links[k] = struct{}{}
	l.ended.Go(func() {
		_, _ = io.Copy(far, near)
		k.end()
	})
	l.ended.Go(func() {
		l.answers(k)
		k.end()
		l.mu.Lock()
		delete(l.links, k)
		l.mu.Unlock()
	})
}

// answers passes answers back, until the connection ends.
func (l *line) answers(k *link) {
	buffer := make([]byte, 64<<10)
	for {
		n, err := k.far.Read(buffer)
		if err != nil {
			return
		}
		whole, dirty := l.hold(k, n)
		if !whole {
			n /= 2
		}
		if dirty {
			buffer[n/2] ^= 1
		}
		if _, err := k.near.Write(buffer[:n]); err != nil || !whole {
			return
		}
	}
}

// hold keeps an answer of so many bytes back for as long as it is to be, and tells
// whether all of it arrives, and whether a bit is to be changed.
func (l *line) hold(k *link, bytes int) (whole, dirty bool) {
	for {
		l.mu.Lock()
		w, changed := l.ways, l.changed
		if !w.silent {
			whole, dirty = l.ways.next(), l.ways.nextDirty()
		}
		l.mu.Unlock()
		if !w.silent {
			return whole && k.wait(w.delay+w.takes(bytes)), dirty
		}
		select {
		case <-changed:
		case <-k.ended:
			return false, false
		}
	}
}

// takes is how long so many bytes are under way.
func (w *ways) takes(bytes int) time.Duration {
	if w.rate <= 0 {
		return 0
	}
	return time.Duration(bytes) * time.Second / time.Duration(w.rate)
}

// nextDirty tells whether the next answer has a bit changed.
func (w *ways) nextDirty() bool {
	switch {
	case w.dirty == 0:
		return false
	case w.clean > 0:
		w.clean--
		return false
	}
	w.dirty--
	return true
}

// next tells whether the next answer arrives whole.
func (w *ways) next() bool {
	switch {
	case w.halves == 0:
		return true
	case w.whole > 0:
		w.whole--
		return true
	}
	w.halves--
	return false
}

// wait returns false when the connection ends meanwhile.
func (k *link) wait(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-k.ended:
		return false
	}
}
