// Package random makes the agent's random: the system's, with that of a backend mixed
// in where some is at hand.
package random

import (
	"crypto/rand"
	"crypto/subtle"
	"fmt"
	"sync"

	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/plugins"
)

const (
	// poolSize is how many bytes of a backend's random are kept at hand.
	poolSize = 16 << 10
	// lowMark is what the pool holds at most when it is filled again.
	lowMark = poolSize / 2
	// reserved is what data keys alone are given: who asks for much random must not
	// take theirs.
	reserved = poolSize / 4
)

// MaxMixed is how many bytes for a use other than data keys are mixed at most.
const MaxMixed = poolSize - reserved

// Use says what random is for.
type Use uint8

// The uses.
const (
	// DataKey is for the bytes of data keys.
	DataKey Use = iota
	// GenerateRandom is for callers who ask for random.
	GenerateRandom

	uses = 2
)

// String returns "data-key" or "generate-random".
func (u Use) String() string {
	return [uses]string{"data-key", "generate-random"}[u]
}

// Pool fetches a backend's random ahead and mixes it with the system's:
//
//	random = system XOR backend
//
// over all bytes (NIST SP 800-133r2 section 6.3: keys produced by combining). The two
// know nothing of each other, so that the result is as good as the better of them. It
// never waits for the backend: without enough at hand it is the system's random alone,
// and counted as such.
//
// A Pool is safe for concurrent use, but for Use and Close. nil is the system's random
// alone.
type Pool struct {
	changed func(backend string, err error)

	mu      sync.Mutex
	memory  *cache.Memory // mu guards memory and what follows; nil before the first backend
	held    int           // bytes from the beginning of memory, none of which was given yet
	feed    *feed         // nil without a backend
	lastErr error         // of the last fetch
	counts  [uses]Count
}

// Count says how often, and for how many bytes, random was made for a use while there
// was a backend.
type Count struct {
	// Mixed had random of the backend, Unmixed was the system's alone.
	Mixed, MixedBytes, Unmixed, UnmixedBytes uint64
}

// Stats is the state of a Pool.
type Stats struct {
	// Backend is empty where there is none.
	Backend string
	// Held is how many bytes are at hand, Size for how many there is room.
	Held, Size int
	// LastError is why the backend gave none when it was asked last; nil when it did.
	LastError error
	// Counts are by Use, since the Pool was made.
	Counts [uses]Count
}

// New returns a Pool without a backend. changed is told when the backend stops giving
// random and why, and with nil when it gives some again. It must not block, nor call the
// Pool; it may be nil.
func New(changed func(backend string, err error)) *Pool {
	if changed == nil {
		changed = func(string, error) {}
	}
	return &Pool{changed: changed}
}

// Fill fills dst with random. It never fails and never waits.
func (p *Pool) Fill(dst []byte, use Use) {
	_, _ = rand.Read(dst) // never fails: crypto/rand
	if p != nil {
		p.mix(dst, use)
	}
}

// mix adds random of the backend to all of dst, or to nothing of it.
func (p *Pool) mix(dst []byte, use Use) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.feed == nil {
		return
	}
	least := 0
	if use != DataKey {
		least = reserved
	}
	count, n := &p.counts[use], len(dst)
	if p.held-n < least {
		count.Unmixed++
		count.UnmixedBytes += uint64(n)
	} else {
		p.held -= n
		given := p.memory.Bytes()[p.held : p.held+n]
		erasing(func() { subtle.XORBytes(dst, dst, given) })
		clear(given) // once, and for nobody else
		count.Mixed++
		count.MixedBytes += uint64(n)
	}
	if p.held <= lowMark {
		p.feed.want()
	}
}

// Use makes source, the backend of that name, the one whose random is mixed in; nil is
// none. What is held of another one is erased. On an error, which is one of memory,
// nothing has changed.
func (p *Pool) Use(backend string, source plugins.RandomSource) error {
	p.mu.Lock()
	old := p.feed
	same := source == nil && old == nil || source != nil && old != nil && old.source == source && old.backend == backend
	err := p.reserveLocked(source != nil)
	if err == nil && !same {
		p.feed, p.lastErr = nil, nil
		p.eraseLocked()
	}
	p.mu.Unlock()
	if err != nil || same {
		return err
	}
	old.stop()
	if source == nil {
		return nil
	}
	next := newFeed(backend, source)
	p.mu.Lock()
	p.feed = next
	p.mu.Unlock()
	next.start(p)
	return nil
}

func (p *Pool) reserveLocked(needed bool) error {
	if !needed || p.memory != nil {
		return nil
	}
	memory, err := cache.NewMemory(poolSize + plugins.MaxRandomSize)
	if err != nil {
		return fmt.Errorf("random: %w", err)
	}
	p.memory = memory
	return nil
}

func (p *Pool) eraseLocked() {
	if p.memory != nil {
		clear(p.memory.Bytes())
	}
	p.held = 0
}

// Close erases what is held. What is made afterwards is the system's random alone.
func (p *Pool) Close() {
	_ = p.Use("", nil) // it needs no memory
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.memory != nil {
		p.memory.Free()
		p.memory = nil
	}
}

// Stats tells the state of the Pool; that of nil is empty.
func (p *Pool) Stats() Stats {
	if p == nil {
		return Stats{}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s := Stats{Held: p.held, Size: poolSize, LastError: p.lastErr, Counts: p.counts}
	if p.feed != nil {
		s.Backend = p.feed.backend
	}
	return s
}
