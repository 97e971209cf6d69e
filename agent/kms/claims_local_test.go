package kms_test

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/envelope"
)

// Two local backends as they are shipped: version 2 of the first is disabled, and heard. Who
// claims that the first has wrapped under version 1, which is enabled, is refused.
func TestLocalBackendsAndAClaim(t *testing.T) {
	for _, gives := range []string{"both", "the second alone", "garbage of 2", "garbage of 1"} {
		for _, op := range []string{"data key", "unwrap"} {
			t.Run(gives+"/"+op, func(t *testing.T) {
				p := newPair(t, 1)
				if _, err := p.keystore.Rotate("orders"); err != nil {
					t.Fatal(err)
				}
				p.clock.Advance(6 * time.Minute)
				made, pairs := p.exported("any")
				edks := made.EDKs
				if op == "unwrap" {
					w, err := p.Wrap(t.Context(), caller(t, orders), kms.WrapRequest{Key: "orders", Plaintext: []byte("x"), Context: pairs})
					if err != nil {
						t.Fatal(err)
					}
					edks = w.EDKs
				}
				opens := func(edks []envelope.EDK) error {
					if op == "unwrap" {
						_, err := p.Unwrap(t.Context(), caller(t, orders), kms.UnwrapRequest{EDKs: edks, Context: pairs})
						return err
					}
					return p.opensKey(edks, pairs)
				}
				if err := opens(edks); err != nil {
					t.Fatal(err)
				}
				if err := p.keystore.Disable("orders", "2"); err != nil {
					t.Fatal(err)
				}
				given := append([]envelope.EDK(nil), edks...)
				switch gives {
				case "the second alone":
					given = given[1:]
				case "garbage of 2":
					given[0] = claims(t, given[0], "2")
				case "garbage of 1":
					given[0] = claims(t, given[0], "1")
				}
				for range 4 {
					p.clock.Advance(6 * time.Minute)
					_ = opens(edks)
					p.Settle()
				}
				wantRefused(t, "whole", opens(edks))
				for range 3 {
					p.clock.Advance(6 * time.Minute)
					wantRefused(t, gives, opens(given))
					p.Settle()
				}
			})
		}
	}
}

// rotated has the first backend rotated, its old version retired or not, which somebody's old
// message has tell, and returns a message under the new one.
func (p *pair) rotated(retired bool) (fresh []byte) {
	p.t.Helper()
	old := p.must().Message
	if _, err := p.keystore.Rotate("orders"); err != nil {
		p.t.Fatal(err)
	}
	p.clock.Advance(6 * time.Minute)
	p.must()
	if retired {
		if err := p.keystore.Disable("orders", "1"); err != nil {
			p.t.Fatal(err)
		}
	}
	for range 3 {
		p.clock.Advance(6 * time.Minute)
		_, _ = p.decrypt(old)
		p.Settle()
	}
	fresh = p.must().Message
	if _, err := p.decrypt(fresh); err != nil {
		p.t.Fatal(err)
	}
	return fresh
}

// Two local backends: version 1 of the first is retired as planned, version 2 is in use. The
// first goes away and its settings are reloaded: the second serves.
func TestLocalBackendsAndARetiredVersion(t *testing.T) {
	for name, c := range map[string]struct{ retired, reload bool }{"control: no reload": {true, false}, "control: nothing retired": {false, true}, "both": {true, true}} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			fresh := p.rotated(c.retired)
			p.a.fail(unreachable())
			if c.reload {
				next := &troubled{Backend: p.a.Backend}
				next.fail(unreachable())
				p.config.Backends["local"] = next
				p.apply()
			}
			p.clock.Advance(10 * time.Minute)
			comesBack(t, p, "encrypt", p.encrypts)
			comesBack(t, p, "data key", p.export)
			comesBack(t, p, "fresh", p.decrypts(fresh))
		})
	}
}

func TestLocalBackendsAndTheCache(t *testing.T) {
	for name, c := range map[string]struct{ encrypts, lost bool }{"control": {false, false}, "callers encrypt": {true, false}, "and then it is lost": {true, true}} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			dir := t.TempDir()
			second := newKeystore(t, dir, "orders-b")
			p := &pair{rig: r, a: r.backend, b: &troubled{Backend: openLocal(t, dir)}}
			r.config.Backends["b"] = p.b
			r.config.Keys[0].Wraps = append(r.config.Keys[0].Wraps, kms.Wrap{Backend: "b", WrappingKey: "local:orders-b"})
			r.config.Keys[0].Grace = kms.Grace{Encrypt: time.Hour, Decrypt: time.Hour}
			r.apply()
			var old [][]byte
			for range 10 {
				old = append(old, p.must().Message)
				p.forget()
			}
			if _, err := second.Rotate("orders-b"); err != nil {
				t.Fatal(err)
			}
			p.clock.Advance(6 * time.Minute)
			p.must()
			if err := second.Disable("orders-b", "2"); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				p.clock.Advance(6 * time.Minute)
				_ = p.encrypts()
				p.Settle()
			}
			wantRefused(t, "encrypt", p.encrypts())
			p.Settle()
			all := func() {
				t.Helper()
				for _, m := range old {
					if _, err := p.decrypt(m); err != nil {
						t.Fatalf("under version 1: %v", err)
					}
				}
			}
			all()
			_, a0 := p.a.counts()
			_, b0 := p.b.counts()
			for range 10 {
				p.clock.Advance(2 * time.Second)
				if c.encrypts {
					_ = p.encrypts()
					p.Settle()
				}
				all()
			}
			_, a1 := p.a.counts()
			_, b1 := p.b.counts()
			t.Logf("in 20 s: %d unwraps at A, %d at B", a1-a0, b1-b0)
			if n := a1 - a0 + b1 - b0; n > 30 {
				t.Errorf("%d unwraps in 20 s of 10 messages that are cached", n)
			}
			if c.lost {
				p.clock.Advance(2 * time.Second)
				_ = p.encrypts()
				p.Settle()
				p.b.fail(unreachable())
				all() // B opened each of them two seconds ago
			}
		})
	}
}

func TestLocalBackendsAndARestart(t *testing.T) {
	for name, reload := range map[string]bool{"control: settings as before": false, "settings changed": true} {
		t.Run(name, func(t *testing.T) {
			p, r := newStoredPair(t)
			p.must()
			if err := p.keystore.Disable("orders", "1"); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				p.clock.Advance(6 * time.Minute)
				_ = p.encrypts()
				p.Settle()
			}
			wantRefused(t, "disabled", p.encrypts())
			if _, err := p.keystore.Rotate("orders"); err != nil {
				t.Fatal(err)
			}
			comesBack(t, p, "rotated", p.encrypts)
			fresh := p.must().Message
			p.wantWraps("rotated", fresh, 2)
			if _, err := p.decrypt(fresh); err != nil {
				t.Fatal(err)
			}
			p.Settle()
			next := &troubled{Backend: p.a.Backend}
			next.fail(unreachable())
			p.a.fail(unreachable())
			if reload {
				r.config.Backends["local"] = next
				r.config.Upstreams = map[string]string{"local": "one, changed", "b": "two"}
				r.apply()
			}
			p.clock.Advance(10 * time.Minute)
			comesBack(t, p, "encrypt, A lost", p.encrypts)
			comesBack(t, p, "fresh, A lost", p.decrypts(fresh))
			r.restart()
			p.clock.Advance(10 * time.Minute)
			comesBack(t, p, "encrypt, A lost, restarted", p.encrypts)
			comesBack(t, p, "export, A lost, restarted", p.export)
			comesBack(t, p, "fresh, A lost, restarted", p.decrypts(fresh))
		})
	}
}

func TestLocalBackendsAndAClaimThatIsCached(t *testing.T) {
	for _, version := range []string{"none", "1"} {
		t.Run(version, func(t *testing.T) {
			p := newPair(t, 1)
			first, pairs := p.exported("any")
			if err := p.opensKey(first.EDKs, pairs); err != nil {
				t.Fatal(err)
			}
			if _, err := p.keystore.Rotate("orders"); err != nil {
				t.Fatal(err)
			}
			p.clock.Advance(6 * time.Minute)
			made, _ := p.exported("any")
			other, _ := p.exported("any")
			given := made.EDKs[1:]
			if version == "1" {
				given = append(given[:0:0], claims(t, made.EDKs[0], "1"), made.EDKs[1])
			}
			if err := p.opensKey(given, pairs); err != nil {
				t.Fatal(err)
			}
			p.Settle()
			if err := p.keystore.Disable("orders", "2"); err != nil {
				t.Fatal(err)
			}
			var calls atomic.Int64
			p.a.intercept(func(call string) error {
				if calls.Add(1) > 1 {
					return unreachable()
				}
				return nil
			})
			err := p.opensKey(other.EDKs, pairs)
			wantRefused(t, "heard", err)
			p.Settle()
			for range 4 {
				wantRefused(t, "afterwards", p.opensKey(given, pairs))
				p.Settle()
				p.clock.Advance(6 * time.Minute)
			}
		})
	}
}
