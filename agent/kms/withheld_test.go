package kms_test

import (
	"bytes"
	"context"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/cache/seal"
	"github.com/kms-agent/kms-agent/plugins"
)

// butWraps lets a backend tell of its keys, and nothing else.
func butWraps(call string) error {
	if call == "describe" {
		return nil
	}
	return unreachable()
}

// partial returns a message that the second backend has not wrapped.
func (p *pair) partial() []byte {
	p.t.Helper()
	p.forget()
	p.b.intercept(butWraps)
	made := p.must()
	p.wantWraps("the second is away", made.Message, 1)
	p.b.intercept(nil)
	p.forget()
	return made.Message
}

func wantRefused(t *testing.T, what string, err error) {
	t.Helper()
	if reason := kms.ReasonOf(err); reason != kms.ReasonKeyUnusable && reason != kms.ReasonKeySuspended {
		t.Errorf("%s: %v, want that the key is refused", what, err)
	}
}

// comesBack lets time pass until what was refused is allowed: questions that were under way
// when upstream changed its mind may be answered still.
func comesBack(t *testing.T, p *pair, what string, use func() error) {
	t.Helper()
	var err error
	for range 20 {
		p.clock.Advance(time.Minute)
		if err = use(); err == nil {
			return
		}
		p.Settle()
	}
	t.Errorf("%s, when it says yes: %v", what, err)
}

func (p *pair) encrypts() error {
	_, err := p.encrypt()
	return err
}

func (p *pair) decrypts(message []byte) func() error {
	return func() error {
		_, err := p.decrypt(message)
		return err
	}
}

// A backend that has refused everything since the agent began is heard, and remembered
// when it is away; what it has not wrapped is its business too.
func TestDeniedFromTheStart(t *testing.T) {
	for range 5 { // whoever answers first
		p := newPair(t, 1)
		whole, partial := p.must().Message, p.partial()
		q := p.again()
		p.b.fail(denied())
		for what, message := range map[string][]byte{"whole": whole, "partial": partial} {
			_, _ = q.decrypt(message) // the other may have been faster
			q.Settle()
			q.clock.Advance(6 * time.Minute)
			_, err := q.decrypt(message)
			wantRefused(t, what, err)
		}
		_, err := q.encrypt()
		wantRefused(t, "encrypt", err)
		p.b.fail(unreachable())
		for range 3 {
			q.clock.Advance(10 * time.Second)
			_, err = q.encrypt()
			wantRefused(t, "encrypt, while it is away", err)
			_, err = q.decrypt(whole)
			wantRefused(t, "decrypt, while it is away", err)
		}
		p.b.fail(nil)
		comesBack(t, q, "encrypt", q.encrypts)
		comesBack(t, q, "whole", q.decrypts(whole))
		comesBack(t, q, "partial", q.decrypts(partial))
	}
}

// A no to one thing is a no to all that is under the same version: it is not served in
// grace either, when both backends are away since.
func TestANoCoversWhatOthersWrappedToo(t *testing.T) {
	p := newPair(t, 1)
	whole := p.must().Message
	p.forget()
	p.a.fail(unreachable())
	alone := p.must().Message
	p.wantWraps("the first is away", alone, 1)
	p.a.fail(nil)
	if _, err := p.decrypt(whole); err != nil {
		t.Fatal(err)
	}
	p.b.intercept(butDescribe)
	_, err := p.decrypt(alone)
	wantRefused(t, "by the one that refuses alone", err)
	p.a.fail(unreachable())
	p.b.intercept(nil)
	p.b.fail(unreachable())
	for range 3 {
		p.clock.Advance(6 * time.Minute)
		_, err = p.decrypt(whole)
		wantRefused(t, "by both, in an outage", err)
	}
}

// newStoredPair is newPair with a sealed store.
func newStoredPair(t *testing.T) (*pair, *storeRig) {
	t.Helper()
	p := newPair(t, 1)
	r := &storeRig{rig: p.rig, dir: t.TempDir(), max: 64, wall: time.Now(), boot: "first"}
	sealer, err := seal.OpenFile(filepath.Join(r.dir, "sealer"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(sealer.Close)
	r.sealer = sealer
	r.config.Keys[0].Limits.Store = true
	r.config.Upstreams = map[string]string{"local": "one", "b": "two"}
	r.restart()
	return p, r
}

// What a backend has refused stays refused over a restart, also what it has not wrapped.
func TestARefusalOutlastsARestart(t *testing.T) {
	p, r := newStoredPair(t)
	partial, whole := p.partial(), p.must().Message
	p.clock.Advance(6 * time.Minute)
	p.must()
	for _, message := range [][]byte{whole, partial} {
		if _, err := p.decrypt(message); err != nil {
			t.Fatal(err)
		}
	}
	p.b.intercept(butDescribe)
	for range 3 {
		p.clock.Advance(6 * time.Minute)
		_, _ = p.encrypt()
		_, _ = p.decrypt(whole)
	}
	p.b.intercept(nil)
	p.b.fail(unreachable())
	for what, other := range map[string]string{"the same backend": "two", "another configuration of it": "three"} {
		r.config.Upstreams = map[string]string{"local": "one", "b": other}
		r.restart()
		for range 3 {
			p.clock.Advance(5 * time.Second)
			_, err := p.decrypt(partial)
			wantRefused(t, what+": partial", err)
			_, err = p.decrypt(whole)
			wantRefused(t, what+": whole", err)
			_, err = p.encrypt()
			wantRefused(t, what+": encrypt", err)
		}
	}
	p.b.fail(nil)
	comesBack(t, p, "encrypt", p.encrypts)
	comesBack(t, p, "whole", p.decrypts(whole))
	comesBack(t, p, "partial", p.decrypts(partial))
}

// An eviction makes the next use ask all backends, however lately they said yes.
func TestEvictionAsksAll(t *testing.T) {
	for name, evict := range map[string]string{"of the key": "orders", "of all": ""} {
		p := newPair(t, 1)
		made := p.must()
		exported, err := p.GenerateDataKey(t.Context(), caller(t, orders), kms.GenerateDataKeyRequest{Key: "orders"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.decrypt(made.Message); err != nil {
			t.Fatal(err)
		}
		p.Settle()
		p.clock.Advance(time.Minute)
		p.b.fail(denied())
		if _, known, err := p.Evict(evict); !known || err != nil {
			t.Fatal(err)
		}
		_, err = p.decrypt(made.Message)
		wantRefused(t, name+": a message", err)
		_, err = p.DecryptDataKey(t.Context(), caller(t, orders), kms.DecryptDataKeyRequest{EDKs: exported.EDKs})
		wantRefused(t, name+": a data key", err)
	}
}

// A reload that gives a backend other settings is no yes.
func TestAReloadIsNoYes(t *testing.T) {
	p := newPair(t, 1)
	made := p.must()
	if _, err := p.decrypt(made.Message); err != nil {
		t.Fatal(err)
	}
	p.b.intercept(butDescribe)
	for range 3 {
		p.clock.Advance(6 * time.Minute)
		_, _ = p.encrypt()
		_, _ = p.decrypt(made.Message)
	}
	next := &troubled{Backend: p.b.Backend}
	next.fail(unreachable())
	p.config.Backends["b"] = next
	p.apply()
	for range 3 {
		p.clock.Advance(5 * time.Second)
		_, err := p.encrypt()
		wantRefused(t, "encrypt", err)
		_, err = p.decrypt(made.Message)
		wantRefused(t, "decrypt", err)
	}
	next.fail(nil)
	comesBack(t, p, "encrypt", p.encrypts)
	comesBack(t, p, "decrypt", p.decrypts(made.Message))
}

// What a backend says to a data key that somebody has forged is no word on the key: not
// when it is late, and not to those who asked at the same time.
func TestANoToAForgery(t *testing.T) {
	for name, c := range map[string]struct{ takes, beside time.Duration }{"late": {700 * time.Millisecond, 0}, "in time": {100 * time.Millisecond, 20 * time.Millisecond}} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(p *pair) {
				p.b.seesContexts()
				var genuine [][]byte
				for range 2 {
					genuine = append(genuine, p.must().Message)
					p.forget()
				}
				q := p.again()
				forged, forgery := p.forge(genuine[0])
				p.b.refuse(func(ciphertext []byte) error {
					if bytes.Equal(ciphertext, forgery) {
						return denied()
					}
					return nil
				})
				p.b.slow(c.takes)
				go func() { _, _ = q.decrypt(forged) }()
				time.Sleep(c.beside)
				if _, err := q.decrypt(genuine[1]); err != nil {
					t.Errorf("the genuine one: %v", err)
				}
				q.pass(time.Second)
				if _, err := q.decrypt(genuine[1]); err != nil {
					t.Errorf("afterwards: %v", err)
				}
			})
		})
	}
}

// vanishing lists one version only.
type vanishing struct {
	*troubled

	only string
}

func (v *vanishing) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	d, err := v.troubled.Describe(ctx, uri)
	if err == nil && v.only != "" {
		d.Current, d.Versions = v.only, []plugins.KeyVersion{{Version: v.only, State: plugins.Enabled}}
	}
	return d, err
}

// A version that was refused, and then deleted, is not opened by the other backend.
func TestRefusedVersionIsDeleted(t *testing.T) {
	p := newPair(t, 1)
	v := &vanishing{troubled: p.b}
	p.config.Backends["b"] = v
	p.apply()
	made := p.must()
	if _, err := p.decrypt(made.Message); err != nil {
		t.Fatal(err)
	}
	p.b.intercept(butDescribe)
	for range 2 {
		p.clock.Advance(6 * time.Minute)
		_, err := p.decrypt(made.Message)
		wantRefused(t, "disabled", err)
	}
	v.only = "2"
	for range 3 {
		p.clock.Advance(6 * time.Minute)
		_, _ = p.encrypt()
		_, err := p.decrypt(made.Message)
		wantRefused(t, "deleted", err)
	}
}

// A no to what is bound to a context counts for the key where the backend, which has wrapped
// for the agent, lets nothing be wrapped any more, and is remembered.
func TestANoToBoundKeys(t *testing.T) {
	for name, bound := range map[string]bool{"messages": true, "data keys": false} {
		p := newPair(t, 1)
		p.config.Keys[0].BindContext = bound
		p.apply()
		made := p.must()
		exported, err := p.GenerateDataKey(t.Context(), caller(t, orders), kms.GenerateDataKeyRequest{Key: "orders"})
		if err != nil {
			t.Fatal(err)
		}
		p.Settle()
		q := p.again() // has no canary
		use := func() error {
			if bound {
				_, err := q.decrypt(made.Message)
				return err
			}
			_, err := q.DecryptDataKey(t.Context(), caller(t, orders), kms.DecryptDataKeyRequest{EDKs: exported.EDKs})
			return err
		}
		q.must()
		q.Settle() // its canaries
		if err := use(); err != nil {
			t.Fatal(err)
		}
		p.b.intercept(butDescribe)
		for range 3 {
			q.clock.Advance(6 * time.Minute)
			wantRefused(t, name+", it says no", use())
		}
		p.b.intercept(nil)
		p.b.fail(unreachable())
		for range 3 {
			q.clock.Advance(10 * time.Second)
			wantRefused(t, name+", it is away", use())
		}
		p.b.fail(nil)
		comesBack(t, q, name, use)
	}
}

// contextual is a backend that treats wraps without a context in its own way.
type contextual struct {
	*troubled

	wrap func(ctx context.Context) error
}

func (u *contextual) Wrap(ctx context.Context, key plugins.KeyRef, plaintext []byte, b plugins.Binding) ([]byte, error) {
	if !b.ContextBound {
		if err := u.wrap(ctx); err != nil {
			return nil, err
		}
	}
	return u.troubled.Wrap(ctx, key, plaintext, b)
}

// Canaries that nobody has asked for cost no one anything: they do not pile up behind a
// backend that is slow, nor is it a no to the key that they are not to be had.
func TestCanariesThatAreNotToBeHad(t *testing.T) {
	t.Run("slow", func(t *testing.T) {
		p := newPair(t, 1)
		p.config.Backends["b"] = &contextual{p.b, func(ctx context.Context) error {
			select {
			case <-time.After(5 * time.Second):
			case <-ctx.Done():
			}
			return unreachable()
		}}
		p.apply()
		if err := p.export(); err != nil {
			t.Fatal(err)
		}
		before := runtime.NumGoroutine()
		for range 200 {
			if err := p.export(); err != nil {
				t.Fatal(err)
			}
		}
		if n := runtime.NumGoroutine() - before; n > 20 {
			t.Errorf("%d goroutines wait for one canary", n)
		}
	})
	t.Run("denied", func(t *testing.T) {
		p := newPair(t, 1)
		var tries atomic.Int64
		p.config.Backends["b"] = &contextual{p.b, func(context.Context) error {
			tries.Add(1)
			return denied()
		}}
		p.apply()
		var callers sync.WaitGroup
		for range 4 {
			callers.Go(func() {
				for range 50 {
					if err := p.export(); err != nil {
						t.Errorf("refused because of a canary: %v", err)
						return
					}
				}
			})
		}
		callers.Wait()
		p.Settle()
		if n := tries.Load(); n > 2 {
			t.Errorf("%d canaries were tried", n)
		}
	})
}

// What ends a stream from outside is no fault of the agent's, whoever knows it first.
func TestStreamEndedByItsCaller(t *testing.T) {
	r := newRig(t)
	for cause, want := range map[error]kms.Reason{context.Canceled: kms.ReasonCancelled, context.DeadlineExceeded: kms.ReasonDeadlineExceeded} {
		var out bytes.Buffer
		st, err := r.EncryptStream(t.Context(), caller(t, orders), kms.EncryptStreamRequest{Key: "orders"}, &out)
		if err != nil {
			t.Fatal(err)
		}
		wantReason(t, st.Close(t.Context(), cause), want)
		if got := r.lastRecord().Reason; got != string(want) {
			t.Errorf("on record as %q, want %q", got, want)
		}
	}
}
