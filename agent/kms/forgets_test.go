package kms_test

import (
	"context"
	"fmt"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/plugins"
)

// rotating is a backend whose wrapping key has further versions, the last of which is current.
type rotating struct {
	*troubled

	more atomic.Int64
}

func (r *rotating) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	d, err := r.troubled.Describe(ctx, uri)
	if err != nil {
		return d, err
	}
	d.Versions = append([]plugins.KeyVersion(nil), d.Versions...)
	for i := range r.more.Load() {
		d.Current = strconv.Itoa(int(i) + 2)
		d.Versions = append(d.Versions, plugins.KeyVersion{Version: d.Current, State: plugins.Enabled})
	}
	return d, nil
}

// A backend refuses every use of its key, and has never said yes since. That the key
// is rotated there, as by a schedule, is no yes.
func TestRotationIsNoYes(t *testing.T) {
	for name, more := range map[string]int64{"control": 0, "rotated": 1} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			v := &rotating{troubled: p.b}
			p.config.Backends["b"] = v
			p.apply()
			whole, partial := p.must().Message, p.partial()
			for _, m := range [][]byte{whole, partial} {
				if _, err := p.decrypt(m); err != nil {
					t.Fatal(err)
				}
			}
			p.b.intercept(butDescribe)
			for range 3 {
				p.clock.Advance(6 * time.Minute)
				_, _ = p.encrypt()
				_, _ = p.decrypt(whole)
				_, _ = p.decrypt(partial)
				p.Settle()
			}
			wantRefused(t, "partial, before", p.decrypts(partial)())
			v.more.Store(more)
			for range 3 {
				p.clock.Advance(6 * time.Minute)
				_, _ = p.encrypt()
				_ = p.decrypts(partial)()
				p.Settle()
				wantRefused(t, "whole", p.decrypts(whole)())
				wantRefused(t, "partial", p.decrypts(partial)())
				wantRefused(t, "encrypt", p.encrypts())
			}
		})
	}
}

// An agent with a sealed store that hears a no before it has had anything to store
// forgets it with an ordered restart: the other backend opens then what the one refuses.
func TestANoWithoutDataKeysIsStored(t *testing.T) {
	for name, drop := range map[string]bool{"first start": true, "control: it has stored something": false} {
		t.Run(name, func(t *testing.T) {
			p, _ := newStoredPair(t)
			made := p.must().Message
			q, r := newStoredPair(t) // another agent of the same backends, that knows nothing
			r.config.Backends, r.config.Keys = p.config.Backends, p.config.Keys
			q.a, q.b = p.a, p.b
			r.apply()
			if !drop {
				if _, err := q.decrypt(made); err != nil {
					t.Fatal(err)
				}
				q.forget()
			}
			p.b.fail(denied())
			for range 3 {
				_, _ = q.decrypt(made)
				q.Settle()
				q.clock.Advance(6 * time.Minute)
			}
			wantRefused(t, "before the restart", q.decrypts(made)())
			p.b.fail(unreachable())
			r.restart()
			for range 3 {
				q.clock.Advance(5 * time.Second)
				wantRefused(t, "after a restart", q.decrypts(made)())
			}
		})
	}
}

// manifold is a backend whose wrapping key has many versions (plugins.MaxVersions are
// allowed), of which the first is current.
type manifold struct {
	*troubled

	many int
}

func (m *manifold) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	d, err := m.troubled.Describe(ctx, uri)
	if err != nil {
		return d, err
	}
	d.Versions = append([]plugins.KeyVersion(nil), d.Versions...)
	for i := range m.many {
		d.Versions = append(d.Versions, plugins.KeyVersion{Version: fmt.Sprintf("%08x-0000-4000-8000-000000000000", i), State: plugins.Enabled})
	}
	return d, nil
}

// A backend that tells nothing of a key any more (denied) refuses all its versions: of
// a key with many the note is too large, and is left out with all that was refused.
func TestARefusalOfManyVersionsIsStored(t *testing.T) {
	for _, many := range []int{10, 300, 700} {
		t.Run(fmt.Sprint(many), func(t *testing.T) {
			p, r := newStoredPair(t)
			r.config.Backends["b"] = &manifold{p.b, many}
			r.apply()
			whole := p.must().Message
			partial := p.partial()
			for _, m := range [][]byte{whole, partial} {
				if _, err := p.decrypt(m); err != nil {
					t.Fatal(err)
				}
			}
			p.b.fail(denied())
			for range 3 {
				p.clock.Advance(6 * time.Minute)
				_, _ = p.encrypt()
				_, _ = p.decrypt(whole)
				_, _ = p.decrypt(partial)
				p.Settle()
			}
			wantRefused(t, "before the restart", p.decrypts(whole)())
			wantRefused(t, "before the restart", p.encrypts())
			p.b.fail(unreachable())
			r.restart()
			for range 3 {
				p.clock.Advance(5 * time.Second)
				wantRefused(t, "whole", p.decrypts(whole)())
				wantRefused(t, "partial", p.decrypts(partial)())
				wantRefused(t, "encrypt", p.encrypts())
			}
		})
	}
}

// A no that is heard while the configuration is replaced is forgotten: the question
// was to the wrapping of before, whose noes have been copied already.
func TestANoDuringAReload(t *testing.T) {
	inBubble(t, func(p *pair) {
		made := p.must().Message
		if _, err := p.decrypt(made); err != nil {
			p.t.Fatal(err)
		}
		p.b.intercept(butDescribe)
		p.b.slow(300 * time.Millisecond)
		p.clock.Advance(6 * time.Minute)
		ended := make(chan error, 1)
		go func() { ended <- p.decrypts(made)() }()
		p.pass(100 * time.Millisecond)
		next := &troubled{Backend: p.b.Backend}
		next.fail(unreachable())
		p.config.Backends["b"] = next
		p.apply()
		p.pass(time.Second)
		if err := <-ended; err == nil {
			p.t.Error("served while the second refuses")
		}
		for range 3 {
			p.pass(10 * time.Second)
			if reason := kms.ReasonOf(p.decrypts(made)()); reason != kms.ReasonKeyUnusable && reason != kms.ReasonKeySuspended {
				p.t.Errorf("after the reload, which the second's no came in: reason %q, want that the key is refused", reason)
			}
		}
	})
}
