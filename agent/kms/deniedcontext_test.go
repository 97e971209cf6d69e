package kms_test

import (
	"bytes"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/envelope"
)

// denies lets a backend refuse one encrypted data key, and be well otherwise.
func (b *troubled) denies(one envelope.EDK) {
	b.refuse(func(ciphertext []byte) error {
		if bytes.Equal(ciphertext, one.Ciphertext) {
			return denied()
		}
		return nil
	})
}

// exported makes a data key for a tenant.
func (p *pair) exported(tenant string) (kms.DataKeyResponse, map[string]string) {
	p.t.Helper()
	pairs := map[string]string{"tenant": tenant}
	made, err := p.GenerateDataKey(p.t.Context(), caller(p.t, orders), kms.GenerateDataKeyRequest{Key: "orders", Context: pairs})
	if err != nil {
		p.t.Fatal(err)
	}
	p.Settle()
	return made, pairs
}

// opensKey asks for a data key by some of its EDKs.
func (p *pair) opensKey(edks []envelope.EDK, pairs map[string]string) error {
	p.t.Helper()
	_, err := p.DecryptDataKey(p.t.Context(), caller(p.t, orders), kms.DecryptDataKeyRequest{EDKs: edks, Context: pairs})
	return err
}

// One backend denies a context that the other opens, to an agent that may only decrypt:
// what others ask for is served, and is not asked about with that context again and again.
func TestContextThatOneOfTwoDenies(t *testing.T) {
	p := newPair(t, 1)
	p.b.seesContexts()
	bad, evil := p.exported("evil")
	good, honest := p.exported("good")
	q := p.again()
	var described atomic.Int64
	p.b.intercept(func(call string) error {
		if call == "describe" {
			described.Add(1)
		}
		return decryptOnly(call)
	})
	p.b.denies(bad.EDKs[1])
	if err := q.opensKey(good.EDKs, honest); err != nil {
		t.Fatal(err)
	}
	q.Settle()
	q.clock.Advance(10 * time.Minute)
	_ = q.opensKey(bad.EDKs, evil)
	q.Settle()
	comesBack(t, q, "of another", func() error { return q.opensKey(good.EDKs, honest) })
	described.Store(0)
	for range 100 {
		if err := q.opensKey(good.EDKs, honest); err != nil {
			t.Fatalf("of another: %v", err)
		}
	}
	if n := described.Load(); n > 3 {
		t.Errorf("100 requests asked %d times what the key is", n)
	}
}

// What somebody forges while a backend refuses everything is not what it is asked with when
// it is well again.
func TestForgedWhileRefused(t *testing.T) {
	p := newPair(t, 1)
	whole, partial := p.must().Message, p.partial()
	q := p.again()
	p.b.intercept(decryptOnly)
	if _, err := q.decrypt(partial); err != nil {
		t.Fatal(err)
	}
	q.clock.Advance(6 * time.Minute)
	p.b.intercept(butDescribe)
	p.a.fail(unreachable()) // so that the second is asked
	_, err := q.decrypt(whole)
	wantRefused(t, "whole", err)
	m, err := envelope.Parse(whole)
	if err != nil {
		t.Fatal(err)
	}
	bad := m.EDKs[1]
	bad.Ciphertext = bytes.Repeat([]byte{7}, len(bad.Ciphertext))
	forged, err := envelope.Seal(nil, make([]byte, envelope.DataKeySize), []envelope.EDK{bad}, nil, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	q.clock.Advance(2 * time.Second)
	_, _ = q.decrypt(forged)
	p.a.fail(nil)
	for range 3 {
		_, _ = q.decrypt(partial)
		q.Settle()
		q.clock.Advance(2 * time.Minute)
	}
	p.b.intercept(decryptOnly)
	comesBack(t, q, "what it has not wrapped", q.decrypts(partial))
}

// A refusal is stored however large the context is that a caller gives, also where the
// agent has only opened since it began.
func TestStoredRefusalOfALargeContext(t *testing.T) {
	for name, size := range map[string]int{"small": 10, "large": 14000} {
		t.Run(name, func(t *testing.T) {
			p, r := newStoredPair(t)
			made, pairs := p.exported(strings.Repeat("<", size))
			whole := p.must().Message
			p.Settle()
			r.restart()
			p.a.fail(unreachable())
			if err := p.opensKey(made.EDKs, pairs); err != nil {
				t.Fatal(err)
			}
			p.a.fail(nil)
			p.clock.Advance(6 * time.Minute)
			p.b.intercept(butDescribe)
			for range 3 {
				wantRefused(t, "it says no", p.opensKey(made.EDKs, pairs))
				p.Settle()
				p.clock.Advance(6 * time.Minute)
			}
			p.b.intercept(nil)
			p.b.fail(unreachable())
			r.restart()
			for range 3 {
				p.clock.Advance(5 * time.Second)
				wantRefused(t, "a message, after a restart", p.decrypts(whole)())
				wantRefused(t, "the data key, after a restart", p.opensKey(made.EDKs, pairs))
			}
		})
	}
}

// An agent that has wrapped, and may not any more, does not take the denial of a context for
// one of the key.
func TestDeniedContextAfterWrapping(t *testing.T) {
	p := newPair(t, 1)
	p.b.seesContexts()
	bad, evil := p.exported("evil")
	partial := p.partial()
	q := p.again()
	q.must()
	q.Settle()
	p.b.intercept(decryptOnly)
	p.b.denies(bad.EDKs[1])
	for range 3 {
		wantRefused(t, "the denied context", q.opensKey(bad.EDKs[1:], evil))
		q.Settle()
		q.clock.Advance(11 * time.Second)
	}
	comesBack(t, q, "of another", q.decrypts(partial))
}

// A context that was allowed once, and is denied now, is no word on the key either.
func TestContextDeniedLater(t *testing.T) {
	for name, two := range map[string]bool{"two backends": true, "one": false} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			p.b.seesContexts()
			if !two {
				p.config.Keys[0].Wraps = p.config.Keys[0].Wraps[1:]
				p.apply()
			}
			bad, evil := p.exported("evil")
			good, honest := p.exported("good")
			last := len(bad.EDKs) - 1
			var partial []byte
			if two {
				partial = p.partial()
			}
			q := p.again()
			p.b.intercept(decryptOnly)
			for _, d := range []struct {
				edks  []envelope.EDK
				pairs map[string]string
			}{{good.EDKs, honest}, {bad.EDKs, evil}} {
				if err := q.opensKey(d.edks[last:], d.pairs); err != nil {
					t.Fatal(err)
				}
			}
			q.clock.Advance(6 * time.Minute)
			p.b.denies(bad.EDKs[last])
			for range 5 {
				_ = q.opensKey(bad.EDKs[last:], evil)
				_ = q.opensKey(good.EDKs[last:], honest)
				q.Settle()
				q.clock.Advance(2 * time.Second)
			}
			comesBack(t, q, "the other context", func() error { return q.opensKey(good.EDKs[last:], honest) })
			if two {
				comesBack(t, q, "what it has not wrapped", q.decrypts(partial))
			}
			if s := q.Stats(); s.Evictions > 1 {
				t.Errorf("%d data keys were destroyed, one is of the context", s.Evictions)
			}
		})
	}
}

// A denied Describe is taken back by one that is not, whatever it lists.
func TestDeniedDescribeIsTakenBack(t *testing.T) {
	p := newPair(t, 1)
	v := &vanishing{troubled: p.b}
	p.config.Backends["b"] = v
	p.apply()
	made := p.must()
	if _, err := p.decrypt(made.Message); err != nil {
		t.Fatal(err)
	}
	p.Settle()
	p.b.intercept(func(call string) error {
		if call == "describe" {
			return denied()
		}
		return nil
	})
	p.clock.Advance(6 * time.Minute)
	_, err := p.encrypt()
	wantRefused(t, "denied", err)
	v.only = "2" // version 1 is deleted meanwhile, which is a fault and no refusal
	p.b.intercept(func(call string) error {
		if call == "unwrap" {
			return gone()
		}
		return nil
	})
	comesBack(t, p, "what the first backend opens", func() error {
		_, _ = p.encrypt()
		return p.decrypts(made.Message)()
	})
}

// Unwrap, which is never cached, does not ask the other backend each time while a no is
// remembered.
func TestUnwrapWhileWithheld(t *testing.T) {
	p := newPair(t, 1)
	ctx, c := t.Context(), caller(t, orders)
	wrapped, err := p.Wrap(ctx, c, kms.WrapRequest{Key: "orders", Plaintext: []byte("abc")})
	if err != nil {
		t.Fatal(err)
	}
	p.Settle()
	unwrap := func() error {
		_, err := p.Unwrap(ctx, c, kms.UnwrapRequest{EDKs: wrapped.EDKs})
		return err
	}
	p.b.intercept(butDescribe)
	for range 3 {
		p.clock.Advance(6 * time.Minute)
		wantRefused(t, "it says no", unwrap())
		p.Settle()
	}
	var asked atomic.Int64
	p.b.intercept(func(string) error {
		asked.Add(1)
		return unreachable()
	})
	wraps, unwraps := p.a.counts()
	for range 100 {
		wantRefused(t, "while it is away", unwrap())
	}
	more, moreUnwraps := p.a.counts()
	if n := int64(more-wraps+moreUnwraps-unwraps) + asked.Load(); n > 8 {
		t.Errorf("100 refused Unwraps made %d calls upstream", n)
	}
}
