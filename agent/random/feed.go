package random

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/kms-agent/kms-agent/plugins"
)

const (
	// fetchSize is how many bytes are fetched by one call.
	fetchSize = plugins.MaxRandomSize
	// fetchTimeout bounds one call; backends have shorter ones of their own.
	fetchTimeout = 10 * time.Second
	// restFactor is how many times as long as a call took the next one waits: random
	// has at most a tenth of one session of an HSM, however slow that is.
	restFactor = 9
	restMin    = 5 * time.Millisecond
	// retryMin, doubled up to retryMax, is how long a backend in an outage is not asked.
	retryMin = time.Second
	retryMax = time.Minute
	// retryFault is for one that says something is wrong: asking again soon would not
	// help, and look like a process that must be replaced.
	retryFault = 5 * time.Minute
)

// feed fetches one backend's random for a Pool, one call at a time and only while the
// Pool wants some.
type feed struct {
	backend string
	source  plugins.RandomSource
	wanted  chan struct{} // one place: the Pool is low
	cancel  context.CancelFunc
	done    chan struct{}
}

func newFeed(backend string, source plugins.RandomSource) *feed {
	return &feed{backend: backend, source: source, wanted: make(chan struct{}, 1), done: make(chan struct{})}
}

// start fills p, and goes on doing so until stop.
func (f *feed) start(p *Pool) {
	ctx, cancel := context.WithCancel(context.Background())
	f.cancel = cancel
	f.want()
	go func() {
		defer close(f.done)
		f.run(ctx, p)
	}()
}

// stop ends the call under way and waits; nil has none.
func (f *feed) stop() {
	if f == nil {
		return
	}
	f.cancel()
	<-f.done
}

// want never blocks.
func (f *feed) want() {
	select {
	case f.wanted <- struct{}{}:
	default:
	}
}

func (f *feed) run(ctx context.Context, p *Pool) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.wanted:
		}
		failures := 0
		for p.room(f) {
			began := time.Now()
			err := f.fetch(ctx, p)
			if ctx.Err() != nil {
				return
			}
			p.noted(f, err)
			if failures++; err == nil {
				failures = 0
			}
			if !sleep(ctx, pause(err, failures, time.Since(began))) {
				return
			}
		}
	}
}

// fetch gives p one call's worth. The memory behind the pool's own is the feed's.
func (f *feed) fetch(ctx context.Context, p *Pool) error {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	fresh := p.memory.Bytes()[poolSize : poolSize+fetchSize]
	defer clear(fresh)
	if err := f.source.Random(ctx, fresh); err != nil {
		return err
	}
	p.add(f, fresh)
	return nil
}

// pause is how long the backend is left alone after a call that took so long, and that
// failed so many times in a row.
func pause(err error, failures int, took time.Duration) time.Duration {
	if err == nil {
		return max(restMin, restFactor*took)
	}
	wait := retryFault
	if class := plugins.ClassOf(err); class == plugins.Unavailable || class == plugins.Unauthenticated {
		wait = retryMax
		if doublings := failures - 1; doublings < 6 { // 64 s are more than retryMax
			wait = retryMin << doublings
		}
	}
	return wait/2 + rand.N(wait/2) //nolint:gosec // jitter: hosts that lost the same HSM do not come back together
}

// sleep returns false where ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// room tells whether there is room for what one call gives.
func (p *Pool) room(f *feed) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.feed == f && p.held+fetchSize <= poolSize
}

// add keeps fresh random of a feed, if that is still the one.
func (p *Pool) add(f *feed, fresh []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.feed != f {
		return
	}
	erasing(func() { copy(p.memory.Bytes()[p.held:poolSize], fresh) })
	p.held += len(fresh)
}

// noted takes the outcome of a call.
func (p *Pool) noted(f *feed, err error) {
	p.mu.Lock()
	changed := p.feed == f && (err == nil) != (p.lastErr == nil)
	if p.feed == f {
		p.lastErr = err
	}
	p.mu.Unlock()
	if changed {
		p.changed(f.backend, err)
	}
}
