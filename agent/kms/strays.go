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

	mu     sync.Mutex // guards closed, and work against a Wait that has begun
	closed bool
	work   sync.WaitGroup
}

func newStrays() *strays {
	life, end := context.WithCancel(context.Background())
	return &strays{life: life, end: end}
}

// begin detaches a call from the end of who makes it; done must be called after it.
func (s *strays) begin(ctx context.Context) (detached context.Context, done func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, cache.ErrClosed
	}
	s.work.Add(1)
	detached, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(s.life, cancel)
	return detached, func() {
		stop()
		cancel()
		s.work.Done()
	}, nil
}

// stop ends the calls under way, and keeps others from being begun.
func (s *strays) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.end()
}
