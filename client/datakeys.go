package client

import (
	"container/list"
	"context"
	"sync"
	"time"

	"github.com/kms-agent/kms-agent/envelope"
)

// keyID identifies what a data key is for: a hash.
type keyID [32]byte

// dataKey is a data key in clear, with what is known of it.
type dataKey struct {
	id        keyID
	key       []byte
	edks      []envelope.EDK // nil for decryption
	name      string
	version   string
	freshness Freshness // as it was at asked
	asked     time.Time // when the agent was asked for it
	until     time.Time // when its use ends, by the wall clock
	life      time.Duration

	// Guarded by dataKeys.mu.
	messages, bytes uint64
	holders         int
	retired         bool
	place           *list.Element
	expiry          *time.Timer
}

// elapsed is the time since the agent was asked. Both clocks count: one stands
// while the host sleeps, the other can be set back.
func (k *dataKey) elapsed(now time.Time) time.Duration {
	return max(now.Sub(k.asked), now.Round(0).Sub(k.asked.Round(0)), 0)
}

// left is for how long the data key may still be used.
func (k *dataKey) left(now time.Time) time.Duration {
	left := min(k.until.Sub(now.Round(0)), k.life-k.elapsed(now))
	if k.freshness.Source == SourceGrace {
		left = min(left, k.freshness.GraceLeft-k.elapsed(now))
	}
	return left
}

// at is the key's freshness at a later time.
func (k *dataKey) at(now time.Time) Freshness {
	elapsed := k.elapsed(now)
	f := Freshness{Source: k.freshness.Source, Age: k.freshness.Age + elapsed}
	if f.Source == SourceUpstream {
		f.Source = SourceCached
	}
	if f.Source == SourceGrace {
		f.GraceLeft = max(k.freshness.GraceLeft-elapsed, 0)
	}
	return f
}

// want is one demand for a data key.
type want struct {
	id       keyID
	bytes    uint64 // of plaintext that it will encrypt; 0 for decryption
	maxStale *time.Duration
	fetch    func(context.Context) (*dataKey, error)
}

// confirmed says that only a key asked for from now on will do.
func (w *want) confirmed() bool { return w.maxStale != nil && *w.maxStale <= 0 }

// dataKeys holds the data keys of one direction, within limits. It is safe for
// concurrent use.
type dataKeys struct {
	limits CacheLimits

	mu      sync.Mutex // guards everything below
	keys    map[keyID]*dataKey
	recent  list.List // of *dataKey, the latest used first
	flights map[keyID]*flight
	closed  bool
	hits    uint64
	misses  uint64
}

// flight is a data key on its way from the agent.
type flight struct {
	done chan struct{}
	// err is why there is none. It concerns those who wait, unless the one who
	// asked gave up.
	err     error
	gaveUp  bool
	private bool
}

func newDataKeys(limits CacheLimits) *dataKeys {
	return &dataKeys{limits: limits, keys: map[keyID]*dataKey{}, flights: map[keyID]*flight{}}
}

// acquire returns a data key, charged with the demand, and its freshness. The
// caller releases it. Of concurrent demands for one key, one asks the agent.
func (d *dataKeys) acquire(ctx context.Context, w want) (*dataKey, Freshness, error) {
	for {
		d.mu.Lock()
		if d.closed {
			d.mu.Unlock()
			return nil, Freshness{}, errClosed
		}
		now := time.Now()
		if k := d.keys[w.id]; k != nil && d.serves(k, &w, now) {
			d.hits++
			d.hold(k, &w)
			d.mu.Unlock()
			return k, k.at(now), nil
		}
		f := d.flights[w.id]
		if f == nil || w.confirmed() {
			f = d.begin(&w)
			d.mu.Unlock()
			return d.ask(ctx, &w, f)
		}
		d.mu.Unlock()
		select {
		case <-f.done:
		case <-ctx.Done():
			return nil, Freshness{}, ended(ctx)
		}
		if f.err != nil && !f.gaveUp {
			return nil, Freshness{}, f.err
		}
	}
}

// serves tells whether a key at hand will do.
func (d *dataKeys) serves(k *dataKey, w *want, now time.Time) bool {
	return k.left(now) > 0 &&
		k.messages < d.limits.MaxMessages && w.bytes <= d.limits.MaxBytes-min(k.bytes, d.limits.MaxBytes) &&
		(w.maxStale == nil || *w.maxStale > 0 && k.at(now).Age <= *w.maxStale)
}

func (d *dataKeys) hold(k *dataKey, w *want) {
	k.holders++
	k.messages++
	k.bytes += w.bytes
	if k.place != nil {
		d.recent.MoveToFront(k.place)
	}
}

func (d *dataKeys) begin(w *want) *flight {
	d.misses++
	f := &flight{done: make(chan struct{}), private: w.confirmed()}
	if !f.private {
		d.flights[w.id] = f
	}
	return f
}

// ask gets the key from the agent, for this demand and all who wait.
func (d *dataKeys) ask(ctx context.Context, w *want, f *flight) (*dataKey, Freshness, error) {
	k, err := w.fetch(ctx)
	d.mu.Lock()
	defer d.mu.Unlock()
	defer close(f.done)
	if !f.private {
		delete(d.flights, w.id)
	}
	if err == nil && d.closed {
		clear(k.key)
		err = errClosed
	}
	if err != nil {
		f.err, f.gaveUp = err, ctx.Err() != nil
		if definite(err) {
			d.retire(d.keys[w.id])
		}
		return nil, Freshness{}, err
	}
	d.hold(k, w)
	d.keep(k)
	return k, k.freshness, nil
}

// keep makes a new key the one of its ID, if it lasts at all.
func (d *dataKeys) keep(k *dataKey) {
	d.retire(d.keys[k.id])
	left := k.left(time.Now())
	if left <= 0 {
		k.retired = true // for this one use
		return
	}
	d.keys[k.id] = k
	k.place = d.recent.PushFront(k)
	k.expiry = time.AfterFunc(left, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.retire(k)
	})
	for d.recent.Len() > d.limits.MaxEntries {
		d.retire(d.recent.Back().Value.(*dataKey))
	}
}

// retire takes a key out and clears it as soon as nobody uses it.
func (d *dataKeys) retire(k *dataKey) {
	if k == nil || k.retired {
		return
	}
	k.retired = true
	k.expiry.Stop()
	d.recent.Remove(k.place)
	delete(d.keys, k.id)
	if k.holders == 0 {
		clear(k.key)
	}
}

// release ends one use of a key.
func (d *dataKeys) release(k *dataKey) {
	d.mu.Lock()
	defer d.mu.Unlock()
	k.holders--
	if k.retired && k.holders == 0 {
		clear(k.key)
	}
}

// close retires every key; those in use when their use ends.
func (d *dataKeys) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	for _, k := range d.keys {
		d.retire(k)
	}
}
