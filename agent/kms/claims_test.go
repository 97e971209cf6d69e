package kms_test

import (
	"bytes"
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

// manyfold is a backend whose key has versions 1 and 2 (the same key beneath), with states.
type manyfold struct {
	*troubled

	second   atomic.Bool  // version 2 exists, and is current
	disabled atomic.Int64 // bit n: version n is disabled
}

func (m *manyfold) off(version string) bool {
	return m.disabled.Load()&(1<<(version[0]-'0')) != 0
}

func (m *manyfold) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	d, err := m.troubled.Describe(ctx, uri)
	if err != nil {
		return d, err
	}
	d.Versions = append([]plugins.KeyVersion(nil), d.Versions...)
	if m.second.Load() {
		d.Current = "2"
		d.Versions = append(d.Versions, plugins.KeyVersion{Version: "2", State: plugins.Enabled})
	}
	for i := range d.Versions {
		if m.off(d.Versions[i].Version) {
			d.Versions[i].State = plugins.Disabled
		}
	}
	return d, nil
}

// answers is where a call ends that meets something, or nobody.
func (m *manyfold) answers(ctx context.Context, call string) error {
	m.mu.Lock()
	err := m.err
	m.mu.Unlock()
	if err != nil {
		return err
	}
	return m.meets(ctx, call)
}

func (m *manyfold) Wrap(ctx context.Context, key plugins.KeyRef, plaintext []byte, b plugins.Binding) ([]byte, error) {
	if err := m.answers(ctx, "wrap?"); err != nil {
		return nil, err
	}
	if m.off(key.Version) {
		return nil, plugins.Errorf(plugins.KeyUnusable, "disabled")
	}
	key.Version = "1"
	return m.troubled.Wrap(ctx, key, plaintext, b)
}

func (m *manyfold) Unwrap(ctx context.Context, key plugins.KeyRef, c []byte, b plugins.Binding) ([]byte, error) {
	if err := m.answers(ctx, "unwrap?"); err != nil {
		return nil, err
	}
	if m.off(key.Version) {
		return nil, plugins.Errorf(plugins.KeyUnusable, "disabled")
	}
	key.Version = "1"
	return m.troubled.Unwrap(ctx, key, c, b)
}

func (p *pair) manyfold() *manyfold {
	p.t.Helper()
	m := &manyfold{troubled: p.b}
	p.config.Backends["b"] = m
	p.apply()
	return m
}

// claims is an EDK that says another version of itself, and is garbage.
func claims(t *testing.T, edk envelope.EDK, version string) envelope.EDK {
	t.Helper()
	info, err := envelope.ParseProviderInfo(edk.ProviderInfo)
	if err != nil {
		t.Fatal(err)
	}
	info.Version = version
	out := envelope.EDK{ProviderID: edk.ProviderID, Ciphertext: bytes.Repeat([]byte{7}, len(edk.Ciphertext))}
	if out.ProviderInfo, err = info.Marshal(); err != nil {
		t.Fatal(err)
	}
	return out
}

// That a backend whose policy denies everything tells that the old version is disabled, after
// a rotation, is no yes of its policy.
func TestDisablingTheOldVersionIsNoYes(t *testing.T) {
	for name, c := range map[string]struct{ disable, away bool }{
		"control: rotated": {false, false}, "rotated, old one disabled": {true, false},
		"control: rotated, then away": {false, true}, "rotated, old one disabled, then away": {true, true},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			whole, partial := p.must().Message, p.partial()
			q := p.again()
			v := q.manyfold()
			p.b.intercept(butDescribe)
			for range 3 {
				_, _ = q.decrypt(whole)
				_, _ = q.decrypt(partial)
				q.Settle()
				q.clock.Advance(6 * time.Minute)
			}
			wantRefused(t, "partial, before", q.decrypts(partial)())
			v.second.Store(true)
			if c.disable {
				v.disabled.Store(1 << 1)
			}
			for range 3 {
				_, _ = q.decrypt(whole)
				q.Settle()
				_, _ = q.decrypt(partial)
				q.Settle()
				q.clock.Advance(6 * time.Minute)
			}
			if c.away {
				p.b.intercept(nil)
				p.b.fail(unreachable())
			}
			for range 3 {
				q.clock.Advance(time.Minute)
				wantRefused(t, "whole", q.decrypts(whole)())
				wantRefused(t, "partial", q.decrypts(partial)())
			}
		})
	}
}

// A backend that refuses its current version is not got around by the claim that it has
// wrapped under another one.
func TestAClaimedVersion(t *testing.T) {
	for name, kind := range map[string]string{"denied, away": "away", "disabled, answers": "disabled", "denied, answers, ciphertext first": "first"} {
		for _, gives := range []string{"both", "the first alone", "garbage of 2", "garbage of 1"} {
			t.Run(name+"/"+gives, func(t *testing.T) {
				p := newPair(t, 1)
				v := p.manyfold()
				v.second.Store(true)
				p.clock.Advance(6 * time.Minute)
				made, pairs := p.exported("any")
				if err := p.opensKey(made.EDKs, pairs); err != nil {
					t.Fatal(err)
				}
				p.Settle()
				edks := append([]envelope.EDK(nil), made.EDKs...)
				switch gives {
				case "the first alone":
					edks = edks[:1]
				case "garbage of 2":
					edks[1] = claims(t, edks[1], "2")
				case "garbage of 1":
					edks[1] = claims(t, edks[1], "1")
				}
				switch kind {
				case "disabled":
					v.disabled.Store(1 << 2)
				case "away":
					p.b.intercept(butDescribe)
				case "first":
					bad := bytes.Repeat([]byte{7}, len(edks[0].Ciphertext))
					p.b.intercept(func(call string) error {
						if call == "wrap" || call == "wrap?" {
							return denied()
						}
						return nil
					})
					p.b.refuse(func(c []byte) error {
						if bytes.Equal(c, bad) || bytes.Count(c, []byte{7}) == len(c) {
							return plugins.Errorf(plugins.BadCiphertext, "no wrap")
						}
						return denied()
					})
				}
				for range 3 {
					p.clock.Advance(6 * time.Minute)
					_ = p.opensKey(made.EDKs, pairs)
					p.Settle()
				}
				wantRefused(t, "whole, before", p.opensKey(made.EDKs, pairs))
				if kind == "away" {
					p.b.intercept(nil)
					p.b.fail(unreachable())
				}
				for range 3 {
					p.clock.Advance(6 * time.Minute)
					wantRefused(t, gives, p.opensKey(edks, pairs))
					p.Settle()
				}
			})
		}
	}
}

// What policy denies under one version it denies under the next, until it says yes to that
// one: also when the backend is away.
func TestRotatedAndAway(t *testing.T) {
	p := newPair(t, 1)
	v := p.manyfold()
	made, pairs := p.exported("any")
	whole := p.must().Message
	if _, err := p.decrypt(whole); err != nil {
		t.Fatal(err)
	}
	p.Settle()
	p.b.intercept(butDescribe)
	for range 3 {
		p.clock.Advance(6 * time.Minute)
		_, _ = p.encrypt()
		_, _ = p.decrypt(whole)
		_ = p.opensKey(made.EDKs, pairs)
		p.Settle()
	}
	wantRefused(t, "encrypt, before", p.encrypts())
	wantRefused(t, "data key, before", p.opensKey(made.EDKs, pairs))
	v.second.Store(true)
	for range 3 { // readers only: what the key is is asked, nothing is wrapped
		p.clock.Advance(2 * time.Minute)
		_, _ = p.decrypt(whole)
		_ = p.opensKey(made.EDKs[:1], pairs)
		p.Settle()
	}
	wantRefused(t, "data key, rotated", p.opensKey(made.EDKs, pairs))
	p.b.intercept(nil)
	p.b.fail(unreachable())
	for range 3 {
		p.clock.Advance(10 * time.Second)
		wantRefused(t, "encrypt", p.encrypts())
		wantRefused(t, "export", p.export())
		wantRefused(t, "data key, whole", p.opensKey(made.EDKs, pairs))
		wantRefused(t, "data key, A alone", p.opensKey(made.EDKs[:1], pairs))
		wantRefused(t, "data key, garbage of 2", p.opensKey([]envelope.EDK{made.EDKs[0], claims(t, made.EDKs[1], "2")}, pairs))
	}
}

// Denied for a moment, rotated, and allowed since under the new version: what was served
// because of that is after a restart too, also while the backend is away.
func TestAYesOutlastsARestart(t *testing.T) {
	p, r := newStoredPair(t)
	v := &manyfold{troubled: p.b}
	r.config.Backends["b"] = v
	r.apply()
	partial, old := p.partial(), p.must().Message
	for _, m := range [][]byte{partial, old} {
		if _, err := p.decrypt(m); err != nil {
			t.Fatal(err)
		}
	}
	p.b.intercept(refusesUse)
	p.clock.Advance(6 * time.Minute)
	wantRefused(t, "for a moment", p.decrypts(old)())
	p.Settle()
	v.second.Store(true) // rotated, and allowed
	for range 3 {
		p.clock.Advance(6 * time.Minute)
		_, _ = p.decrypt(partial)
		p.Settle()
	}
	p.b.intercept(nil)
	comesBack(t, p, "encrypt", p.encrypts)
	fresh := p.must().Message
	p.wantWraps("under 2", fresh, 2)
	p.forget()
	comesBack(t, p, "fresh", p.decrypts(fresh))
	comesBack(t, p, "partial", p.decrypts(partial))
	p.Settle()
	p.b.fail(unreachable())
	p.clock.Advance(6 * time.Minute)
	comesBack(t, p, "partial, B away, before the restart", p.decrypts(partial))
	p.clock.Advance(time.Minute)
	r.restart()
	p.clock.Advance(10 * time.Minute)
	comesBack(t, p, "partial, B away, after the restart", p.decrypts(partial))
}

// A backend that does not see contexts any more, after a reload, is taken at its word.
func TestTheCapabilityIsTakenBack(t *testing.T) {
	for name, before := range map[string]bool{"control": false, "had it": true} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			if before {
				p.b.seesContexts()
			}
			made, pairs := p.exported("any")
			if err := p.opensKey(made.EDKs, pairs); err != nil {
				t.Fatal(err)
			}
			next := &troubled{Backend: p.b.Backend}
			p.config.Backends["b"] = next
			p.apply()
			if err := p.opensKey(made.EDKs, pairs); err != nil {
				t.Fatal(err)
			}
			next.intercept(butDescribe)
			for range 3 {
				p.clock.Advance(6 * time.Minute)
				_ = p.opensKey(made.EDKs, pairs)
				p.Settle()
			}
			next.intercept(nil)
			next.fail(unreachable())
			for range 3 {
				p.clock.Advance(time.Minute)
				wantRefused(t, "B denied, and is away", p.opensKey(made.EDKs, pairs))
			}
		})
	}
}

// Garbage does not hide what a backend without contexts refuses from an agent that has a
// canary there, where the other backend sees contexts.
func TestGarbageBesideABackendThatSeesContexts(t *testing.T) {
	for name, sees := range map[string]bool{"control: neither": false, "A sees": true} {
		for _, gives := range []string{"both", "the first alone", "garbage"} {
			t.Run(name+"/"+gives, func(t *testing.T) {
				p := newPair(t, 1)
				if sees {
					p.a.seesContexts()
				}
				made, pairs := p.exported("any")
				p.must()
				p.Settle()
				edks := append([]envelope.EDK(nil), made.EDKs...)
				switch gives {
				case "the first alone":
					edks = edks[:1]
				case "garbage":
					edks[1].Ciphertext = []byte{7}
				}
				if err := p.opensKey(edks, pairs); err != nil {
					t.Fatal(err)
				}
				p.b.intercept(decryptOnly)
				p.b.refuse(func(c []byte) error {
					if len(c) == 1 {
						return plugins.Errorf(plugins.BadCiphertext, "no wrap")
					}
					return denied()
				})
				for range 3 {
					p.clock.Advance(6 * time.Minute)
					_ = p.opensKey(edks, pairs)
					p.Settle()
				}
				wantRefused(t, "18 minutes after B denies", p.opensKey(edks, pairs))
			})
		}
	}
}

// A version that was retired as planned holds nothing back when its backend is away and its
// settings are reloaded.
func TestARetiredVersionAndAReload(t *testing.T) {
	p := newPair(t, 1)
	v := p.manyfold()
	old := p.must().Message
	v.second.Store(true)
	v.disabled.Store(1 << 1)
	p.clock.Advance(6 * time.Minute)
	for range 3 {
		p.clock.Advance(6 * time.Minute)
		wantRefused(t, "what B has retired", p.decrypts(old)())
		p.Settle()
	}
	fresh := p.must().Message
	if _, err := p.decrypt(fresh); err != nil {
		t.Fatal(err)
	}
	partial := p.partial()
	if _, err := p.decrypt(partial); err != nil {
		t.Fatal(err)
	}
	next := &troubled{Backend: p.b.Backend}
	next.fail(unreachable())
	p.config.Backends["b"] = next
	p.apply()
	p.clock.Advance(10 * time.Minute)
	comesBack(t, p, "encrypt", p.encrypts)
	comesBack(t, p, "partial", p.decrypts(partial))
}

var _ = kms.ReasonOf
