package kms_test

import (
	"bytes"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
)

// inBubble runs a test on a pair with time under control.
func inBubble(t *testing.T, test func(p *pair)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(newPair(t, 1)) })
}

// pass lets time pass, for the keys and for those who wait.
func (p *pair) pass(d time.Duration) {
	p.clock.Advance(d)
	time.Sleep(d)
	synctest.Wait()
}

// within fails the test unless act ends in time.
func (p *pair) within(what string, most time.Duration, act func() error) {
	p.t.Helper()
	began := time.Now()
	if err := act(); err != nil {
		p.t.Errorf("%s: %v", what, err)
	}
	if d := time.Since(began); d > most {
		p.t.Errorf("%s took %v, want %v at most", what, d, most)
	}
}

func (p *pair) export() error {
	_, err := p.GenerateDataKey(p.t.Context(), caller(p.t, orders), kms.GenerateDataKeyRequest{Key: "orders"})
	return err
}

// refusesUse has a backend tell of its key as before, and refuse to use it.
func refusesUse(call string) error {
	if call == "describe" {
		return nil
	}
	return denied()
}

// A no of one backend is heard within max_age, however often another says yes: what is
// wrapped or opened by one alone is no confirmation of the other.
func TestANoIsHeardBesideTraffic(t *testing.T) {
	const each = time.Minute
	t.Run("data keys for callers", func(t *testing.T) {
		inBubble(t, func(p *pair) {
			p.must()
			p.b.intercept(refusesUse)
			p.refusedWithin(6*time.Minute, each, p.export)
		})
	})
	t.Run("wrapped keys", func(t *testing.T) {
		inBubble(t, func(p *pair) {
			p.must()
			c := caller(p.t, orders)
			made, err := p.Wrap(p.t.Context(), c, kms.WrapRequest{Key: "orders", Plaintext: []byte("key material")})
			if err != nil {
				t.Fatal(err)
			}
			p.must()
			p.clock.Advance(6 * time.Minute)
			p.must() // there is a canary of each now
			p.b.intercept(refusesUse)
			p.refusedWithin(6*time.Minute, each, func() error {
				_, err := p.Unwrap(p.t.Context(), c, kms.UnwrapRequest{EDKs: made.EDKs})
				return err
			})
		})
	})
	t.Run("messages", func(t *testing.T) {
		inBubble(t, func(p *pair) {
			var messages [][]byte
			for range 8 {
				messages = append(messages, p.must().Message)
				p.forget()
			}
			if _, err := p.decrypt(messages[0]); err != nil {
				t.Fatal(err)
			}
			p.b.intercept(refusesUse)
			next := 0
			p.refusedWithin(6*time.Minute, each, func() error {
				next++
				_, err := p.decrypt(messages[next])
				return err
			})
		})
	})
}

// refusedWithin does something again and again until it is refused.
func (p *pair) refusedWithin(most, each time.Duration, act func() error) {
	p.t.Helper()
	for d := time.Duration(0); d <= most; d += each {
		if act() != nil {
			return
		}
		p.pass(each)
	}
	p.t.Errorf("not refused for %v after a backend has said no", most)
}

// What one backend has refused, the yes of another does not restore while the one that
// refused it cannot be asked: who can cut a backend off could undo a revocation.
func TestAYesOfAnotherLiftsNothing(t *testing.T) {
	for name, refusal := range map[string]func(string) error{
		"its use": refusesUse,
		"all":     func(string) error { return denied() },
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(p *pair) {
				made := p.must()
				if _, err := p.decrypt(made.Message); err != nil {
					t.Fatal(err)
				}
				p.b.intercept(refusal)
				p.pass(6 * time.Minute)
				_, _ = p.encrypt()
				_, _ = p.decrypt(made.Message)
				synctest.Wait()
				p.b.intercept(nil)
				for what, away := range map[string]func(){
					"away":  func() { p.b.slow(0); p.b.fail(unreachable()) },
					"hangs": func() { p.b.fail(nil); p.b.slow(forever) },
				} {
					away()
					for range 10 {
						p.pass(time.Minute)
						if _, err := p.encrypt(); err == nil {
							t.Fatalf("%s: encrypted after a no", what)
						}
						if _, err := p.decrypt(made.Message); err == nil {
							t.Fatalf("%s: decrypted after a no", what)
						}
						if err := p.export(); err == nil {
							t.Fatalf("%s: a data key is given away after a no", what)
						}
					}
				}
				p.b.slow(0)
				p.b.fail(nil)
				p.pass(time.Minute)
				p.must()
				p.pass(time.Second)
				if _, err := p.decrypt(made.Message); err != nil {
					t.Errorf("it says yes again: %v", err)
				}
			})
		})
	}
}

// A no that comes late, when another has said yes long since, counts all the same.
func TestALateNo(t *testing.T) {
	inBubble(t, func(p *pair) {
		made := p.must()
		if _, err := p.decrypt(made.Message); err != nil {
			t.Fatal(err)
		}
		p.b.slow(1500 * time.Millisecond)
		p.b.intercept(refusesUse)
		p.pass(6 * time.Minute)
		_, _ = p.encrypt()
		_, _ = p.decrypt(made.Message)
		for range 10 { // the no, the canary's no
			p.pass(2 * time.Second)
		}
		if _, err := p.encrypt(); err == nil {
			t.Error("encrypted with a key that one backend denies")
		}
		if _, err := p.decrypt(made.Message); err == nil {
			t.Error("decrypted with a key that one backend denies")
		}
		if s := p.Stats(); s.EncryptionKeys+s.DecryptionKeys != 0 {
			t.Errorf("%d data keys survived the revocation", s.EncryptionKeys+s.DecryptionKeys)
		}
	})
}

// A backend that hangs is not waited for where another answers, is not taken for an
// outage of the key, and does not hide the other's no.
func TestOneHangs(t *testing.T) {
	for name, grace := range map[string]time.Duration{"with grace": time.Hour, "without": 0} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(p *pair) {
				p.config.Keys[0].Grace = kms.Grace{Encrypt: grace, Decrypt: grace}
				p.apply()
				made := p.must()
				p.opens("before", made.Message)
				p.b.slow(forever)
				for i := range 4 {
					p.pass(6 * time.Minute)
					most := 200 * time.Millisecond
					if i == 0 {
						most = 2500 * time.Millisecond // nobody knows yet
					}
					p.within("encrypt", most, func() error {
						made, err := p.encrypt()
						p.wantNoGrace(made.KeyUse)
						return err
					})
					p.within("decrypt", most, func() error {
						opened, err := p.decrypt(made.Message)
						p.wantNoGrace(opened.KeyUse)
						return err
					})
					p.within("data key", most, p.export)
				}
				if o := p.Outages(); len(o) != 0 {
					t.Errorf("outages %+v", o)
				}
				p.a.fail(denied())
				p.pass(6 * time.Minute)
				p.within("a no", 200*time.Millisecond, func() error {
					if _, err := p.encrypt(); err == nil {
						return errors.New("encrypted")
					}
					return nil
				})
			})
		})
	}
}

func (p *pair) wantNoGrace(use kms.KeyUse) {
	p.t.Helper()
	if use.Freshness.Source == cache.Grace {
		p.t.Error("served in grace, though one backend answers")
	}
}

// The first of several hangs from the start of the agent on: what the other can do is done.
func TestOneHangsFromTheStart(t *testing.T) {
	inBubble(t, func(p *pair) {
		made := p.must()
		for _, hangs := range []*troubled{p.a, p.b} {
			q := p.again()
			hangs.slow(forever)
			q.within("the first", 2500*time.Millisecond, func() error { _, err := q.encrypt(); return err })
			for range 3 {
				q.pass(100 * time.Millisecond)
				q.within("encrypt", 200*time.Millisecond, func() error { _, err := q.encrypt(); return err })
				q.within("data key", 200*time.Millisecond, q.export)
				q.forget()
				q.within("decrypt", 400*time.Millisecond, func() error {
					opened, err := q.decrypt(made.Message)
					if !bytes.Equal(opened.Plaintext, []byte("hello")) {
						q.t.Errorf("decrypted %q", opened.Plaintext)
					}
					return err
				})
				q.forget()
				q.within("a new data key", 400*time.Millisecond, func() error { _, err := q.encrypt(); return err })
			}
			hangs.slow(0)
		}
	})
}

// again is another agent of the same configuration, which knows nothing yet.
func (p *pair) again() *pair {
	p.t.Helper()
	r := newRig(p.t)
	r.config = p.config
	r.apply()
	return &pair{rig: r, a: p.a, b: p.b}
}

// An encrypted data key that somebody forged, and that another backend's stood in for, is
// no proof of anything: neither a no to it nor that it does not open.
func TestForgedSamplesProveNothing(t *testing.T) {
	for name, answer := range map[string]error{"refused": denied(), "does not open": nil} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(p *pair) {
				var genuine [][]byte
				for range 2 {
					genuine = append(genuine, p.must().Message)
					p.forget()
				}
				q := p.again() // it has never encrypted: there is no canary
				forged, forgery := p.forge(genuine[0])
				p.b.refuse(func(ciphertext []byte) error {
					if bytes.Equal(ciphertext, forgery) {
						return answer
					}
					return nil
				})
				if _, err := q.decrypt(genuine[1]); err != nil {
					t.Fatal(err)
				}
				if _, err := q.decrypt(forged); err == nil {
					t.Error("a forgery was decrypted")
				}
				q.pass(6 * time.Minute)
				if o := q.Outages(); len(o) != 0 {
					t.Errorf("a forgery began outages %+v", o)
				}
				opened, err := q.decrypt(genuine[1])
				if err != nil {
					t.Errorf("after somebody else's forgery: %v", err)
				}
				q.wantNoGrace(opened.KeyUse)
				synctest.Wait()
				if s := q.Stats(); s.Evictions != 0 {
					t.Errorf("%d evicted by a forgery", s.Evictions)
				}
				if alarms := q.alarmed(); len(alarms) != 0 {
					t.Errorf("alarms: %q", alarms)
				}
			})
		})
	}
}

// forge returns a message with the first encrypted data key of another and, in the place
// of the second, one that was made up and binds a context, which it returns too.
func (p *pair) forge(message []byte) (forged, forgery []byte) {
	p.t.Helper()
	m, err := envelope.Parse(message)
	if err != nil {
		p.t.Fatal(err)
	}
	info, err := envelope.ParseProviderInfo(m.EDKs[1].ProviderInfo)
	if err != nil {
		p.t.Fatal(err)
	}
	info.ContextBound = true
	edk := envelope.EDK{ProviderID: envelope.ProviderID, Ciphertext: bytes.Repeat([]byte{7}, len(m.EDKs[1].Ciphertext))}
	if edk.ProviderInfo, err = info.Marshal(); err != nil {
		p.t.Fatal(err)
	}
	forged, err = envelope.Seal(nil, make([]byte, envelope.DataKeySize), []envelope.EDK{m.EDKs[0], edk}, nil, []byte("x"))
	if err != nil {
		p.t.Fatal(err)
	}
	return forged, edk.Ciphertext
}
