package kms_test

import (
	"bytes"
	"context"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/plugins"
)

// decryptOnly is what a backend says to an agent that may only decrypt.
func decryptOnly(call string) error {
	if call == "wrap" {
		return denied()
	}
	return nil
}

// stated is a backend whose versions all have one state.
type stated struct {
	*troubled

	state atomic.Int64 // plugins.KeyState
}

func (v *stated) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	d, err := v.troubled.Describe(ctx, uri)
	d.Versions = append([]plugins.KeyVersion(nil), d.Versions...)
	for i := range d.Versions {
		d.Versions[i].State = plugins.KeyState(v.state.Load())
	}
	return d, err
}

// An agent that may only decrypt hears a no, and that it is taken back, also of a backend
// that has not wrapped what it opens.
func TestNoesAreTakenBack(t *testing.T) {
	for name, no := range map[string]func(p *pair, v *stated, whole []byte) (back func()){
		"denied when it is described": func(p *pair, _ *stated, _ []byte) func() {
			p.b.intercept(func(call string) error {
				if call == "describe" {
					return denied()
				}
				return decryptOnly(call)
			})
			return func() {}
		},
		"disabled": func(_ *pair, v *stated, _ []byte) func() {
			v.state.Store(int64(plugins.Disabled))
			return func() { v.state.Store(int64(plugins.Enabled)) }
		},
		"denied in use": func(p *pair, _ *stated, whole []byte) func() {
			p.b.intercept(butDescribe)
			p.a.fail(unreachable()) // so that it is asked
			_, err := p.decrypt(whole)
			wantRefused(t, "in use", err)
			p.a.fail(nil)
			return func() {}
		},
		"and a reload": func(p *pair, _ *stated, whole []byte) func() {
			p.b.fail(denied())
			_, _ = p.decrypt(whole)
			return func() {
				p.b.fail(nil)
				next := &troubled{Backend: p.b.Backend}
				next.intercept(decryptOnly)
				p.config.Backends["b"] = next
				p.apply()
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			whole, partial := p.must().Message, p.partial()
			q := p.again()
			v := &stated{troubled: p.b}
			v.state.Store(int64(plugins.Enabled))
			q.config.Backends["b"] = v
			q.apply()
			p.b.intercept(decryptOnly)
			if _, err := q.decrypt(partial); err != nil {
				t.Fatal(err)
			}
			q.clock.Advance(6 * time.Minute)
			back := no(q, v, whole)
			for range 3 {
				_, _ = q.decrypt(partial)
				q.Settle()
				q.clock.Advance(2 * time.Minute)
			}
			_, err := q.decrypt(partial)
			wantRefused(t, "what it has not wrapped", err)
			p.b.intercept(decryptOnly)
			back()
			comesBack(t, q, "what it has not wrapped", q.decrypts(partial))
			comesBack(t, q, "what it has wrapped", q.decrypts(whole))
		})
	}
}

// That a backend denies a caller's context is nothing to other callers of an agent that may
// only decrypt, however often it is tried, and also once the backend is away.
func TestDeniedContextOfAnother(t *testing.T) {
	p := newPair(t, 1)
	p.b.seesContexts()
	ctx, c := t.Context(), caller(t, orders)
	evil := map[string]string{"tenant": "evil"}
	bad, err := p.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: "orders", Context: evil})
	if err != nil {
		t.Fatal(err)
	}
	p.Settle()
	whole, partial := p.must().Message, p.partial()
	q := p.again()
	p.b.intercept(decryptOnly)
	p.b.refuse(func(ciphertext []byte) error {
		if bytes.Equal(ciphertext, bad.EDKs[1].Ciphertext) {
			return denied()
		}
		return nil
	})
	for range 10 {
		_, err := q.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: bad.EDKs[1:], Context: evil})
		wantRefused(t, "the denied context", err)
		q.Settle()
		q.clock.Advance(2 * time.Second)
	}
	comesBack(t, q, "of another", q.decrypts(partial))
	comesBack(t, q, "of another, by both", q.decrypts(whole))
	p.b.fail(unreachable())
	comesBack(t, q, "of another, while it is away", q.decrypts(partial))
	comesBack(t, q, "of another, by both, while it is away", q.decrypts(whole))
}

// One answer, whoever waits for it, is one no: it destroys nothing that upstream opens.
func TestOneDenialIsOneNo(t *testing.T) {
	for range 20 {
		p := newPair(t, 1)
		whole, partial := p.must().Message, p.partial()
		q := p.again()
		for _, message := range [][]byte{whole, partial} {
			if _, err := q.decrypt(message); err != nil {
				t.Fatal(err)
			}
		}
		q.Settle()
		q.clock.Advance(6 * time.Minute)
		var asked atomic.Int64
		p.b.intercept(func(call string) error {
			if call == "describe" && asked.Add(1) == 1 {
				return denied()
			}
			return nil
		})
		_, _ = q.encrypt()
		comesBack(t, q, "whole", q.decrypts(whole))
		comesBack(t, q, "partial", q.decrypts(partial))
		if s := q.Stats(); s.DecryptionKeys < 2 || s.Evictions > 0 {
			t.Fatalf("%+v: a denial destroyed a data key", s)
		}
	}
}

// Of a single backend that tells nothing of its keys, data keys are held as long as the
// canary opens.
func TestDescribeIsDenied(t *testing.T) {
	r := newRig(t)
	ctx, c := t.Context(), caller(t, orders)
	for i := range 5 {
		pairs := map[string]string{"n": string(rune('a' + i))}
		d, err := r.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: "orders", Context: pairs})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: d.EDKs, Context: pairs}); err != nil {
			t.Fatal(err)
		}
	}
	m, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: m.Message}); err != nil { // a canary
		t.Fatal(err)
	}
	held := r.Stats().DecryptionKeys
	r.clock.Advance(6 * time.Minute)
	r.backend.intercept(func(call string) error {
		if call == "describe" {
			return denied()
		}
		return nil
	})
	for range 5 {
		_, _ = r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
		time.Sleep(5 * time.Millisecond) // what is asked because of it, by nobody who waits
		r.clock.Advance(2 * time.Second)
	}
	if now := r.Stats().DecryptionKeys; now != held {
		t.Errorf("%d data keys are held, %d were before Describe was denied", now, held)
	}
}

// That a backend does not find a key that it has denied before is no yes.
func TestNotFoundIsNoYes(t *testing.T) {
	p := newPair(t, 1)
	partial := p.partial()
	q := p.again()
	p.b.fail(denied())
	for range 3 {
		_, _ = q.decrypt(partial)
		q.Settle()
		q.clock.Advance(time.Minute)
	}
	p.b.fail(gone())
	for range 5 {
		_, err := q.decrypt(partial)
		wantRefused(t, "denied, then gone", err)
		q.Settle()
		q.clock.Advance(time.Minute)
	}
}

// While a no is remembered of a backend that is away, the other is not asked by everybody.
func TestWithheldKeysAreNotAskedAbout(t *testing.T) {
	p := newPair(t, 1)
	whole, partial := p.must().Message, p.partial()
	if _, err := p.decrypt(whole); err != nil {
		t.Fatal(err)
	}
	p.b.intercept(butDescribe)
	for range 3 {
		p.clock.Advance(6 * time.Minute)
		_, _ = p.encrypt()
		_, _ = p.decrypt(whole)
		p.Settle()
	}
	next := &troubled{Backend: p.b.Backend}
	next.fail(unreachable())
	p.config.Backends["b"] = next
	p.apply()
	for _, use := range []func() error{p.encrypts, p.decrypts(partial), p.decrypts(whole)} {
		wantRefused(t, "before", use())
		p.clock.Advance(2 * time.Second)
		wraps, unwraps := p.a.counts()
		for range 100 {
			wantRefused(t, "while it is away", use())
		}
		p.Settle()
		more, moreUnwraps := p.a.counts()
		if n := more - wraps + moreUnwraps - unwraps; n > 12 { // a turn of the caller's, and a question of the agent's own
			t.Errorf("100 refused requests made %d calls of the other backend", n)
		}
	}
}

// A stream that is under way when its key is evicted is asked about, and goes on where
// upstream says yes.
func TestStreamsOutliveAnEviction(t *testing.T) {
	for name, bound := range map[string]bool{"bound": true, "unbound": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.config.Keys[0].BindContext = bound
			r.apply()
			run, end := context.WithCancel(t.Context())
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				_ = r.Run(run)
			}()
			defer func() { end(); <-ended }()
			ctx, c := t.Context(), caller(t, orders)
			var out bytes.Buffer
			st, err := r.EncryptStream(ctx, c, kms.EncryptStreamRequest{Key: "orders"}, &out)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := st.Write(make([]byte, 1<<20)); err != nil {
				t.Fatal(err)
			}
			if err := st.Close(ctx, nil); err != nil {
				t.Fatal(err)
			}
			pr, pw := io.Pipe()
			go func() { _, err := pw.Write(out.Bytes()); _ = pw.CloseWithError(err) }()
			ds, err := r.DecryptStream(ctx, c, nil, pr)
			if err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 1000)
			if _, err := ds.Read(buf); err != nil {
				t.Fatal(err)
			}
			r.forget()
			time.Sleep(1500 * time.Millisecond) // a sweep, which is once a second
			r.clock.Advance(10 * time.Second)
			if _, err = ds.Read(buf); err != nil {
				t.Errorf("after an eviction: %v", err)
			}
			_ = pr.CloseWithError(io.ErrUnexpectedEOF)
			_ = ds.Close(ctx, err)
		})
	}
}
