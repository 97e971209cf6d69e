package cache

import (
	"container/list"
	"context"
	"errors"
	"time"
)

// flight is one call upstream that any number of requests wait for. It is
// nobody's: it goes on to its answer, or its timeout, when they have all gone.
// Its fields but ctx and done are guarded by Cache.mu.
type flight struct {
	ctx    context.Context //nolint:containedctx // the call's own, not a caller's
	cancel context.CancelFunc
	began  time.Duration
	// place and caller are what a fill is for, and whose share it counts on;
	// those of a confirmation are zero.
	place  place
	caller string
	// waiters are served when the call lands, in the order in which they came.
	waiters list.List
	// dropped: the answer is for those who wait only to ask again; nobody joins.
	dropped bool
	// save: it is no call upstream, but waits for the store.
	save   bool
	landed bool
	err    error
	done   chan struct{}
}

type waiter struct {
	request *request
	use     *Use
}

// newFlight detaches a call from the caller that happened to be first; ctx
// gives values only.
func (c *Cache) newFlight(ctx context.Context) *flight {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.cfg.ConfirmTimeout)
	return &flight{ctx: ctx, cancel: cancel, began: c.cfg.Now(), done: make(chan struct{})}
}

// landLocked ends a flight. Those who wait are served before anything else can
// take from them what the flight brought.
func (c *Cache) landLocked(f *flight, err error) {
	f.landed, f.err = true, err
	f.cancel()
	now := c.cfg.Now()
	for el := f.waiters.Front(); el != nil && err == nil; el = el.Next() {
		w, _ := el.Value.(*waiter)
		w.use = c.serveLocked(w.request, now)
		if w.use != nil && w.use.freshness.Source == Cached && !f.save {
			w.use.freshness.Source = Upstream
		}
	}
	close(f.done)
}

// waitLocked gives up Cache.mu while it waits, and has it again when it
// returns: the flight's error, or that of ctx. Neither a Use nor an error means
// that the answer does not suffice for the request.
func (c *Cache) waitLocked(ctx context.Context, f *flight, r *request) (*Use, error) {
	w := &waiter{request: r}
	el := f.waiters.PushBack(w)
	patience, stop := timer(c.patienceLocked(f, r))
	defer stop()
	c.mu.Unlock()
	select {
	case <-f.done:
	case <-ctx.Done():
	case <-patience:
	}
	c.mu.Lock()
	if f.landed {
		return w.use, f.err
	}
	f.waiters.Remove(el)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	c.failedLocked(c.authorityLocked(r.place.Authority), f.began, errSlow)
	return nil, errSlow
}

// timer fires after d; never, where d is negative.
func timer(d time.Duration) (<-chan time.Time, func() bool) {
	if d < 0 {
		return nil, func() bool { return false }
	}
	t := time.NewTimer(d)
	return t.C, t.Stop
}

// awaitSaveLocked waits for a save, or for ctx.
func (c *Cache) awaitSaveLocked(ctx context.Context, f *flight) error {
	c.mu.Unlock()
	defer c.mu.Lock()
	select {
	case <-f.done:
		return f.err // written before done was closed
	case <-ctx.Done():
		return ctx.Err()
	}
}

// awaitLocked is waitLocked for those who want no data key.
func (c *Cache) awaitLocked(ctx context.Context, f *flight, r *request) error {
	limit := time.Duration(-1)
	if c.graciousLocked(f, r) {
		limit = c.untilSlow(f)
	}
	patience, stop := timer(limit)
	defer stop()
	c.mu.Unlock()
	select {
	case <-f.done:
	case <-ctx.Done():
	case <-patience:
	}
	c.mu.Lock()
	switch {
	case f.landed:
		return f.err
	case ctx.Err() != nil:
		return ctx.Err()
	}
	c.failedLocked(c.authorityLocked(r.place.Authority), f.began, errSlow)
	return errSlow
}

// verdict is what an answer of Fill or Confirm means.
func (c *Cache) verdict(err error) Verdict {
	switch {
	case err == nil:
		return Yes
	case errors.Is(err, errSlow):
		return Unreachable
	}
	return c.cfg.Classify(err)
}
