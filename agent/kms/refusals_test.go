package kms_test

import (
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
)

// What one backend has refused stays refused while that backend is away, whatever the
// other says, until it says yes itself.
func TestARevocationOutlastsItsBackend(t *testing.T) {
	for name, no := range map[string]func(p *pair){
		"denied":   func(p *pair) { p.b.fail(denied()) },
		"disabled": func(p *pair) { p.b.intercept(butDescribe) },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			made := p.must()
			if _, err := p.decrypt(made.Message); err != nil {
				t.Fatal(err)
			}
			no(p)
			p.clock.Advance(6 * time.Minute)
			refused := func(when string) {
				t.Helper()
				_, err := p.encrypt()
				_, err2 := p.decrypt(made.Message)
				_, err3 := p.Wrap(t.Context(), caller(t, orders), kms.WrapRequest{Key: "orders", Plaintext: []byte("x")})
				for _, err := range []error{err, err2, err3} {
					if reason := kms.ReasonOf(err); reason != kms.ReasonKeyUnusable && reason != kms.ReasonKeySuspended {
						t.Errorf("%s: %v, want that the key is refused", when, err)
					}
				}
			}
			refused("it says no")
			p.clock.Advance(10 * time.Second)
			refused("it says no still")
			p.b.intercept(nil)
			p.b.fail(unreachable())
			for range 4 {
				p.clock.Advance(10 * time.Second)
				refused("it is away")
			}
			p.b.fail(nil)
			p.clock.Advance(time.Minute)
			p.must()
			if _, err := p.decrypt(made.Message); err != nil {
				t.Errorf("it says yes: %v", err)
			}
		})
	}
}

// butDescribe is what a version says that is disabled.
func butDescribe(call string) error {
	if call == "describe" {
		return nil
	}
	return denied()
}

// A revocation is heard within max_age, also where the other backend opens what is not
// cached, or wraps alone, all the time.
func TestOneRevokesWhileTheOtherIsBusy(t *testing.T) {
	for name, use := range map[string]func(p *pair, message []byte) error{
		"decrypt": func(p *pair, message []byte) error {
			_, err := p.decrypt(message)
			return err
		},
		"export": func(p *pair, _ []byte) error {
			_, err := p.GenerateDataKey(p.t.Context(), caller(p.t, orders), kms.GenerateDataKeyRequest{Key: "orders"})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			var messages [][]byte
			for range 7 {
				messages = append(messages, p.must().Message)
				p.forget()
			}
			if err := use(p, messages[0]); err != nil {
				t.Fatal(err)
			}
			p.b.intercept(butDescribe)
			for _, m := range messages[1:] { // a minute more than max_age
				p.clock.Advance(time.Minute)
				if err := use(p, m); err != nil {
					wantReason(t, err, kms.ReasonKeyUnusable)
					return
				}
			}
			t.Errorf("a key that one backend denies is still used after %d minutes, max_age is %v", len(messages)-1, limits().MaxAge)
		})
	}
}
