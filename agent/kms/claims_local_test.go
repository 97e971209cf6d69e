package kms_test

import (
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

// Two local backends: version 1 of the first is retired as planned, version 2 is in use. The
// first goes away and its settings are reloaded: the second serves.
func TestLocalBackendsAndARetiredVersion(t *testing.T) {
	for name, c := range map[string]struct{ retired, reload bool }{"control: no reload": {true, false}, "control: nothing retired": {false, true}, "both": {true, true}} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			old := p.must().Message
			if _, err := p.keystore.Rotate("orders"); err != nil {
				t.Fatal(err)
			}
			p.clock.Advance(6 * time.Minute)
			p.must()
			if c.retired {
				if err := p.keystore.Disable("orders", "1"); err != nil {
					t.Fatal(err)
				}
			}
			for range 3 {
				p.clock.Advance(6 * time.Minute)
				_, _ = p.decrypt(old)
				p.Settle()
			}
			fresh := p.must().Message
			if _, err := p.decrypt(fresh); err != nil {
				t.Fatal(err)
			}
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
