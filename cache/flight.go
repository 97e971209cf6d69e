package cache

import (
	"context"
	"time"
)

// flight is one call upstream that several may wait for. It ends early when
// nobody waits any more. Its fields but ctx and done are guarded by Cache.mu.
type flight struct {
	ctx     context.Context //nolint:containedctx // the call's own, not a caller's
	cancel  context.CancelFunc
	began   time.Duration
	waiters int
	done    chan struct{}
	err     error
}

// newFlight detaches a call from the caller that happened to be first.
func (c *Cache) newFlight(ctx context.Context) *flight {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.cfg.ConfirmTimeout)
	return &flight{ctx: ctx, cancel: cancel, began: c.cfg.Now(), done: make(chan struct{})}
}

// finish requires Cache.mu.
func (f *flight) finish(err error) {
	f.err = err
	f.cancel()
	close(f.done)
}

// wait gives up Cache.mu while it waits, and has it again when it returns: the
// flight's error, or that of ctx.
func (c *Cache) waitLocked(ctx context.Context, f *flight) error {
	f.waiters++
	c.mu.Unlock()
	var err error
	select {
	case <-f.done:
		err = f.err
	case <-ctx.Done():
		err = ctx.Err()
	}
	c.mu.Lock()
	if f.waiters--; f.waiters == 0 {
		f.cancel()
	}
	return err
}
