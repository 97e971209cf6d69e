package kms

import (
	"context"
	"sync"

	"github.com/kms-agent/kms-agent/cache"
)

// strays are calls upstream that may go on when nobody waits for them any more. They end
// with the service, which waits for them.
type strays struct {
	life context.Context //nolint:containedctx // the service's own
	end  context.CancelFunc

	mu     sync.Mutex // guards what follows
	closed bool
	under  int        // calls under way
	idle   *sync.Cond // there are none
}

func newStrays() *strays {
	life, end := context.WithCancel(context.Background())
	s := &strays{life: life, end: end}
	s.idle = sync.NewCond(&s.mu)
	return s
}

// begin detaches a call from the end of who makes it; done must be called after it.
func (s *strays) begin(ctx context.Context) (detached context.Context, done func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, cache.ErrClosed
	}
	s.under++
	detached, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(s.life, cancel)
	return detached, func() {
		stop()
		cancel()
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.under--; s.under == 0 {
			s.idle.Broadcast()
		}
	}, nil
}

// wait returns when no call is under way.
func (s *strays) wait() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.under > 0 {
		s.idle.Wait()
	}
}

// stop ends the calls under way, and keeps others from being begun.
func (s *strays) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.end()
}
