package kms_test

import (
	"bytes"
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

// guarded is a backend whose policy decides by the binding.
type guarded struct {
	plugins.Backend

	t     *troubled
	deny  atomic.Pointer[func(b plugins.Binding) bool]
	blind atomic.Bool // its plugin has not started: the capability is not known
}

func newGuarded(b *troubled) *guarded {
	b.seesContexts()
	return &guarded{Backend: b, t: b}
}

func (u *guarded) SeesContext() (sees, known bool) { return !u.blind.Load(), !u.blind.Load() }

func (u *guarded) denying(f func(b plugins.Binding) bool) { u.deny.Store(&f) }

func (u *guarded) denies(b plugins.Binding) bool {
	f := u.deny.Load()
	return f != nil && (*f)(b)
}

func (u *guarded) away() bool {
	u.t.mu.Lock()
	defer u.t.mu.Unlock()
	return u.t.err != nil
}

func (u *guarded) Wrap(ctx context.Context, key plugins.KeyRef, plaintext []byte, b plugins.Binding) ([]byte, error) {
	if !u.away() && u.denies(b) {
		return nil, denied()
	}
	return u.Backend.Wrap(ctx, key, plaintext, b)
}

func (u *guarded) Unwrap(ctx context.Context, key plugins.KeyRef, c []byte, b plugins.Binding) ([]byte, error) {
	if !u.away() && u.denies(b) {
		return nil, denied()
	}
	return u.Backend.Unwrap(ctx, key, c, b)
}

func evilDenied(b plugins.Binding) bool { return b.Context["tenant"] == "evil" }

func onlyGood(b plugins.Binding) bool { return b.ContextBound && b.Context["tenant"] != "good" }

func (p *pair) guard() *guarded {
	p.t.Helper()
	g := newGuarded(p.b)
	p.config.Backends["b"] = g
	p.lets(stranger)
	return g
}

func (p *pair) opensAs(who string, edks []envelope.EDK, pairs map[string]string) error {
	_, err := p.DecryptDataKey(p.t.Context(), caller(p.t, who), kms.DecryptDataKeyRequest{EDKs: edks, Context: pairs})
	return err
}

func garbage(edk envelope.EDK, n byte) envelope.EDK {
	edk.Ciphertext = bytes.Repeat([]byte{n}, len(edk.Ciphertext))
	return edk
}

// What serves in grace does so after a restart, also where the plugin has not started yet, so
// that nobody says whether its policy sees contexts.
func TestStoredKeysWhileThePluginDoesNotRun(t *testing.T) {
	for name, blind := range map[string]bool{"control: known": false, "unknown": true} {
		t.Run(name, func(t *testing.T) {
			p, r := newStoredPair(t)
			g := newGuarded(p.b)
			r.config.Backends["b"] = g
			r.apply()
			good, honest := p.exported("good")
			if err := p.opensKey(good.EDKs, honest); err != nil {
				t.Fatal(err)
			}
			p.a.fail(unreachable())
			p.b.fail(unreachable())
			g.blind.Store(blind)
			r.restart()
			if err := p.opensKey(good.EDKs, honest); err != nil {
				t.Errorf("stored, confirmed seconds ago: %v", err)
			}
		})
	}
}

// A policy that wants a context with every call, as by a condition on the encryption context,
// says nothing of what is bound to one when it denies a forged message that is not.
func TestANoToWhatIsBoundToNoContext(t *testing.T) {
	for name, attack := range map[string]bool{"control": false, "one forged message": true} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			g := p.guard()
			p.config.Keys[0].BindContext = true
			p.apply()
			g.denying(func(b plugins.Binding) bool { return !b.ContextBound })
			good, honest := p.exported("good")
			if len(good.EDKs) != 2 {
				t.Fatal(len(good.EDKs))
			}
			for _, edks := range [][]envelope.EDK{good.EDKs, good.EDKs[:1]} {
				if err := p.opensAs(orders, edks, honest); err != nil {
					t.Fatal(err)
				}
			}
			made := p.must()
			p.Settle()
			if attack {
				m, err := envelope.Parse(made.Message)
				if err != nil {
					t.Fatal(err)
				}
				edk := garbage(m.EDKs[1], 7)
				info, err := envelope.ParseProviderInfo(edk.ProviderInfo)
				if err != nil {
					t.Fatal(err)
				}
				info.ContextBound = false
				if edk.ProviderInfo, err = info.Marshal(); err != nil {
					t.Fatal(err)
				}
				forged, err := envelope.Seal(nil, make([]byte, envelope.DataKeySize), []envelope.EDK{edk}, nil, []byte("x"))
				if err != nil {
					t.Fatal(err)
				}
				_, err = p.Decrypt(t.Context(), caller(t, stranger), kms.DecryptRequest{Message: forged})
				t.Log("the forged one: ", err)
				p.Settle()
			}
			fails := 0
			var last error
			for range 60 { // an hour, everybody is well
				p.clock.Advance(time.Minute)
				if err := p.opensAs(orders, good.EDKs[:1], honest); err != nil {
					fails++
					last = err
				}
				p.Settle()
			}
			if fails > 3 {
				t.Errorf("what B has not wrapped: refused %d of 60 times: %v", fails, last)
			}
			p.b.fail(unreachable()) // disaster
			fails = 0
			for range 60 {
				p.clock.Advance(time.Minute)
				if err := p.opensAs(orders, good.EDKs, honest); err != nil {
					fails++
					last = err
				}
				p.Settle()
			}
			if fails > 3 {
				t.Errorf("B is lost, A answers: refused %d of 60 times: %v", fails, last)
			}
		})
	}
}

// spray asks for made-up contexts.
func spray(p *pair, many int, edk envelope.EDK) {
	for i := range many {
		_ = p.opensAs(stranger, []envelope.EDK{garbage(edk, 7)}, map[string]string{"tenant": fmt.Sprint("made up ", i)})
	}
	p.Settle()
}

// Contexts that one caller makes up, and that are denied, cost nobody a stored data key.
func TestManyContextsAndTheStore(t *testing.T) {
	for name, many := range map[string]int{"control": 10, "sprayed": 700} {
		t.Run(name, func(t *testing.T) {
			p, r := newStoredPair(t)
			g := newGuarded(p.b)
			r.config.Backends["b"] = g
			r.config.Keys[0].Wraps = r.config.Keys[0].Wraps[1:]
			r.lets(stranger)
			bad, _ := p.exported("evil")
			good, honest := p.exported("good")
			made := p.must()
			if _, err := p.decrypt(made.Message); err != nil {
				t.Fatal(err)
			}
			g.denying(onlyGood)
			if err := p.opensKey(good.EDKs, honest); err != nil {
				t.Fatal(err)
			}
			spray(p, many, bad.EDKs[0])
			p.b.fail(unreachable())
			r.restart()
			if err := p.opensKey(good.EDKs, honest); err != nil {
				t.Errorf("good, stored, in an outage: %v", err)
			}
			if _, err := p.decrypt(made.Message); err != nil {
				t.Errorf("a message, stored, in an outage: %v", err)
			}
		})
	}
}

// Who brings garbage, in a context that callers share (none given), keeps nobody else from
// asking whether it is allowed again.
func TestTurnsAreEachCallersOwn(t *testing.T) {
	for name, attack := range map[string]bool{"control": false, "garbage": true} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			g := p.guard()
			made, err := p.GenerateDataKey(t.Context(), caller(t, orders), kms.GenerateDataKeyRequest{Key: "orders"})
			if err != nil {
				t.Fatal(err)
			}
			wrapped, err := p.Wrap(t.Context(), caller(t, stranger), kms.WrapRequest{Key: "orders", Plaintext: []byte("x")})
			if err != nil {
				t.Fatal(err)
			}
			p.Settle()
			if err := p.opensAs(orders, made.EDKs, nil); err != nil {
				t.Fatal(err)
			}
			g.denying(func(b plugins.Binding) bool { return b.ContextBound }) // for a moment
			for range 3 {
				p.clock.Advance(6 * time.Minute)
				wantRefused(t, "denied", p.opensAs(orders, made.EDKs, nil))
				p.Settle()
			}
			g.denying(func(plugins.Binding) bool { return false }) // well again
			served := 0
			var last error
			for range 60 {
				p.clock.Advance(1100 * time.Millisecond)
				if attack {
					_, _ = p.Unwrap(t.Context(), caller(t, stranger), kms.UnwrapRequest{EDKs: []envelope.EDK{wrapped.EDKs[0], garbage(wrapped.EDKs[1], 9)}})
				}
				if err := p.opensAs(orders, made.EDKs, nil); err == nil {
					served++
				} else {
					last = err
				}
				p.Settle()
			}
			if served < 30 {
				t.Errorf("a minute after all backends allow again: served %d of 60; last: %v", served, last)
			}
		})
	}
}

// A context that one of two backends denies is refused to who brings what that one has
// wrapped, while it answers; its data key is destroyed, and nobody else's. What policy says to
// a context is each backend's own matter: the other one goes on where that one is away.
func TestAContextThatOneDenies(t *testing.T) {
	p := newPair(t, 1)
	g := p.guard()
	bad, evil := p.exported("evil")
	good, honest := p.exported("good")
	for _, d := range []struct {
		edks  []envelope.EDK
		pairs map[string]string
	}{{bad.EDKs, evil}, {good.EDKs, honest}} {
		if err := p.opensKey(d.edks, d.pairs); err != nil {
			t.Fatal(err)
		}
	}
	g.denying(evilDenied)
	for range 5 {
		p.clock.Advance(6 * time.Minute)
		_ = p.opensKey(bad.EDKs, evil)
		p.Settle()
		wantRefused(t, "the denied context", p.opensKey(bad.EDKs, evil))
		if err := p.opensKey(good.EDKs, honest); err != nil {
			t.Errorf("another context: %v", err)
		}
	}
	if s := p.Stats(); s.Evictions != 1 {
		t.Errorf("%d data keys were destroyed, want that of the context", s.Evictions)
	}
	p.b.fail(unreachable())
	p.clock.Advance(time.Minute)
	comesBack(t, p, "by the backend that allows it", func() error { return p.opensKey(bad.EDKs, evil) })
}

// Calls past the cache cost no more calls upstream where a backend sees contexts.
func TestCallsPastTheCacheInContexts(t *testing.T) {
	for name, sees := range map[string]bool{"control: blind": false, "sees contexts": true} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			if sees {
				p.b.seesContexts()
			}
			pairs := map[string]string{"tenant": "good"}
			wrapped, err := p.Wrap(t.Context(), caller(t, orders), kms.WrapRequest{Key: "orders", Plaintext: []byte("x"), Context: pairs})
			if err != nil {
				t.Fatal(err)
			}
			p.Settle()
			var described atomic.Int64
			p.a.intercept(func(call string) error {
				if call == "describe" {
					described.Add(1)
				}
				return nil
			})
			w0, u0 := p.a.counts()
			bw0, bu0 := p.b.counts()
			for range 100 {
				if _, err := p.Unwrap(t.Context(), caller(t, orders), kms.UnwrapRequest{EDKs: wrapped.EDKs, Context: pairs}); err != nil {
					t.Fatal(err)
				}
			}
			p.Settle()
			w1, u1 := p.a.counts()
			bw1, bu1 := p.b.counts()
			n := w1 - w0 + u1 - u0 + bw1 - bw0 + bu1 - bu0
			t.Logf("100 Unwraps: %d calls", n)
			if n > 130 {
				t.Errorf("100 Unwraps, all are well: %d calls upstream", n)
			}
			p.b.fail(unreachable())
			w0, u0 = p.a.counts()
			d0 := described.Load()
			for range 100 {
				if _, err := p.GenerateDataKey(t.Context(), caller(t, orders), kms.GenerateDataKeyRequest{Key: "orders", Context: pairs}); err != nil {
					t.Fatal(err)
				}
			}
			p.Settle()
			w1, u1 = p.a.counts()
			m := w1 - w0 + u1 - u0
			t.Logf("100 GenerateDataKeys: %d calls, %d describes", m, described.Load()-d0)
			if m > 230 || described.Load()-d0 > 10 {
				t.Errorf("100 GenerateDataKeys while B is away: %d calls of A and %d questions what the key is", m, described.Load()-d0)
			}
		})
	}
}

// retiring is a backend that retires version 1: 2 is current, and 1 disabled.
type retiring struct {
	*troubled

	retired atomic.Bool
}

func (v *retiring) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	d, err := v.troubled.Describe(ctx, uri)
	if err == nil && v.retired.Load() {
		d.Current = "2"
		d.Versions = []plugins.KeyVersion{{Version: "1", State: plugins.Disabled}, {Version: "2", State: plugins.Enabled}}
	}
	return d, err
}

func (v *retiring) Unwrap(ctx context.Context, key plugins.KeyRef, c []byte, b plugins.Binding) ([]byte, error) {
	if v.retired.Load() && key.Version == "1" {
		return nil, plugins.Errorf(plugins.KeyUnusable, "disabled")
	}
	return v.troubled.Unwrap(ctx, key, c, b)
}

// Denied for a moment, then allowed, rotated, and the old version disabled as planned.
func TestARetiredVersionHoldsNothingBack(t *testing.T) {
	for name, moment := range map[string]bool{"control": false, "denied for a moment": true} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			whole, partial := p.must().Message, p.partial()
			q := p.again()
			v := &retiring{troubled: p.b}
			q.config.Backends["b"] = v
			q.apply()
			p.b.intercept(decryptOnly)
			if _, err := q.decrypt(partial); err != nil {
				t.Fatal(err)
			}
			if moment {
				p.b.intercept(butDescribe)
				p.a.fail(unreachable())
				_, err := q.decrypt(whole)
				wantRefused(t, "whole", err)
				p.a.fail(nil)
				q.Settle()
				p.b.intercept(decryptOnly)
			}
			v.retired.Store(true)
			comesBack(t, q, "what B has not wrapped, and would open under version 2", q.decrypts(partial))
			fails := 0
			for range 60 {
				q.clock.Advance(time.Minute)
				if q.decrypts(partial)() != nil {
					fails++
				}
				q.Settle()
			}
			if fails > 5 {
				t.Errorf("refused %d of 60 times", fails)
			}
		})
	}
}

// A message from before bind_context, which policy denies, takes nothing from what is bound.
func TestAMessageFromBeforeContextsWereBound(t *testing.T) {
	p := newPair(t, 1)
	g := p.guard()
	old := p.must().Message // binds nothing yet
	p.forget()
	p.config.Keys[0].BindContext = true
	p.apply()
	good, honest := p.exported("good")
	q := p.again() // another agent
	g.denying(func(b plugins.Binding) bool { return !b.ContextBound })
	if err := q.opensAs(orders, good.EDKs, honest); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		q.clock.Advance(6 * time.Minute)
		_, _ = q.decrypt(old)
		q.Settle()
	}
	p.b.fail(unreachable())
	fails := 0
	var last error
	for range 20 {
		q.clock.Advance(time.Minute)
		if err := q.opensAs(orders, good.EDKs, honest); err != nil {
			fails++
			last = err
		}
		q.Settle()
	}
	if fails > 3 {
		t.Errorf("a context that B never refused, A answers: refused %d of 20 times: %v", fails, last)
	}
}
