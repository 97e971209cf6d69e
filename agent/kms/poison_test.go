package kms_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

// The second backend has revoked the key before this agent (a reader without a store)
// began: it tells that the version is disabled, and refuses to open anything. Who gives the
// whole data key is refused, and who leaves out the second's part too. Who puts bytes in its
// place that never get as far as the key (hsm.parseWrapped, a plugin's own length check, the
// agent's own plugins.checkCiphertext) is served by the first backend for ever.
func TestGarbageHidesNoRevocation(t *testing.T) {
	{
		for _, gives := range []string{"both", "the first alone", "garbage for the second", "nothing for the second"} {
			t.Run(gives, func(t *testing.T) {
				p := newPair(t, 1)
				made, pairs := p.exported("any")
				edks := append([]envelope.EDK(nil), made.EDKs...)
				short := []byte{7}
				switch gives {
				case "the first alone":
					edks = edks[:1]
				case "garbage for the second":
					edks[1].Ciphertext = short
				case "nothing for the second":
					edks[1].Ciphertext = nil
				}
				q := p.again()
				v := &stated{troubled: p.b}
				v.state.Store(int64(plugins.Disabled))
				q.config.Backends["b"] = v
				q.apply()
				p.b.intercept(func(call string) error {
					if call == "wrap" {
						return plugins.Errorf(plugins.KeyUnusable, "disabled")
					}
					return nil
				})
				p.b.refuse(func(ciphertext []byte) error {
					if bytes.Equal(ciphertext, short) {
						return plugins.Errorf(plugins.BadCiphertext, "no wrapped key material")
					}
					return plugins.Errorf(plugins.KeyUnusable, "disabled")
				})
				var err error
				for range 6 {
					q.clock.Advance(6 * time.Minute)
					err = q.opensKey(edks, pairs)
					q.Settle()
				}
				wantRefused(t, "36 minutes after the agent began", err)
			})
		}
	}
}

// A caller whose context the second backend denies keeps all others of a
// decrypt-only agent from being confirmed: each of its requests has another ciphertext, so
// that what is tainted is never what is asked with.
func TestManyDeniedContextsKeepNobodyOut(t *testing.T) {
	p := newPair(t, 1)
	p.b.seesContexts()
	bad, evil := p.exported("evil")
	good, honest := p.exported("good")
	q := p.again()
	q.lets(stranger)
	p.b.intercept(decryptOnly)
	p.b.refuse(func(ciphertext []byte) error {
		if !bytes.Equal(ciphertext, good.EDKs[1].Ciphertext) {
			return denied() // the context is denied, whatever the ciphertext
		}
		return nil
	})
	n := byte(0)
	attack := func(fresh bool) {
		if fresh {
			n++
		}
		edk := bad.EDKs[1]
		edk.Ciphertext = bytes.Repeat([]byte{n}, len(edk.Ciphertext))
		_, _ = q.DecryptDataKey(t.Context(), caller(t, stranger), kms.DecryptDataKeyRequest{EDKs: []envelope.EDK{bad.EDKs[0], edk}, Context: evil})
		q.Settle()
	}
	attack(true)
	attack(false) // tainted now: the first backend's yes confirms
	for range 5 {
		attack(false)
		q.clock.Advance(time.Second)
	}
	if err := q.opensKey(good.EDKs, honest); err != nil {
		t.Fatal(err)
	}
	q.clock.Advance(6 * time.Minute)
	attack(true)
	attack(false)
	served := 0
	var last error
	for range 120 {
		attack(true) // another ciphertext; confirmed just now, so that it is not asked about
		call, now := caller(t, orders), time.Duration(0)
		call.MaxStale = &now
		_, err := q.DecryptDataKey(t.Context(), call, kms.DecryptDataKeyRequest{EDKs: good.EDKs, Context: honest})
		if err == nil {
			served++
		} else {
			last = err
		}
		q.Settle()
		q.clock.Advance(time.Second)
	}
	if served < 100 {
		t.Errorf("who wants fresh answers was served %d times of 120, by one request of an attacker before each; last: %v", served, last)
	}
}

// What a caller forges while a backend refuses for a moment is kept as what it is to be
// asked with (what is genuine and comes later does not replace it), and when that turns out
// to be none there is nothing else: the no stays for ever.
func TestForgeryFirst(t *testing.T) {
	for name, also := range map[string]bool{"forgery alone": false, "and a genuine one afterwards": true} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			whole, partial := p.must().Message, p.partial()
			q := p.again()
			p.b.intercept(decryptOnly)
			if _, err := q.decrypt(partial); err != nil {
				t.Fatal(err)
			}
			q.clock.Advance(6 * time.Minute)
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
			p.b.intercept(butDescribe) // for a moment
			_, _ = q.decrypt(forged)
			if also {
				p.a.fail(unreachable()) // so that the second is asked
				_, err = q.decrypt(whole)
				wantRefused(t, "whole", err)
				p.a.fail(nil)
			}
			q.Settle()
			p.b.intercept(decryptOnly) // well again
			comesBack(t, q, "what the second has not wrapped", q.decrypts(partial))
		})
	}
}

// No attacker: one backend, an agent that may only decrypt, and a tenant whose data
// keys were the first and the last that it opened loses its permission. The data keys of the
// others, which are cached, are not to be had any more, for as long as they are used.
func TestATenantLosesPermission(t *testing.T) {
	for name, two := range map[string]bool{"one backend": false, "two": true} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			p.b.seesContexts()
			if !two {
				p.config.Keys[0].Wraps = p.config.Keys[0].Wraps[1:]
				p.apply()
			}
			first, evil := p.exported("evil")
			good, honest := p.exported("good")
			last, _ := p.exported("evil")
			n := len(good.EDKs) - 1
			q := p.again()
			p.b.intercept(decryptOnly)
			for _, d := range []struct {
				edks  []envelope.EDK
				pairs map[string]string
			}{{first.EDKs, evil}, {good.EDKs, honest}, {last.EDKs, evil}} {
				if err := q.opensKey(d.edks[n:], d.pairs); err != nil {
					t.Fatal(err)
				}
			}
			p.b.refuse(func(ciphertext []byte) error {
				if !bytes.Equal(ciphertext, good.EDKs[n].Ciphertext) {
					return denied()
				}
				return nil
			})
			q.clock.Advance(6 * time.Minute) // the confirmation is too old
			comesBack(t, q, "the other tenant's, which upstream opens", func() error { return q.opensKey(good.EDKs[n:], honest) })
		})
	}
}
