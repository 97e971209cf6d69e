package kms_test

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins/local"
)

// storm is a key with some local backends to which anything happens.
type storm struct {
	*pair

	r        *storeRig
	rnd      *rand.Rand
	parts    []part
	messages [][]byte
	made     []kms.DataKeyResponse
	log      []string
}

// part is a backend of a storm.
type part struct {
	*troubled

	name, key string
	store     *local.Keystore
	current   int
}

func newStorm(t *testing.T, seed uint64, backends int) *storm {
	t.Helper()
	p, r := newStoredPair(t)
	s := &storm{pair: p, r: r, rnd: rand.New(rand.NewPCG(seed, 7))}
	s.parts = []part{{p.a, "local", "orders", p.keystore, 1}}
	wraps := r.config.Keys[0].Wraps[:1]
	for i := 1; i < backends; i++ {
		dir, name := t.TempDir(), "x"+strconv.Itoa(i)
		key := "orders-" + name
		store := newKeystore(t, dir, key)
		b := &troubled{Backend: openLocal(t, dir)}
		s.parts = append(s.parts, part{b, name, key, store, 1})
		r.config.Backends[name], r.config.Upstreams[name] = b, name
		wraps = append(wraps, kms.Wrap{Backend: name, WrappingKey: "local:" + key})
	}
	r.config.Keys[0].Wraps = wraps
	r.restart()
	return s
}

func (s *storm) note(format string, a ...any) { s.log = append(s.log, fmt.Sprintf(format, a...)) }

// replace gives a backend other settings.
func (s *storm) replace(i int) {
	next := &troubled{Backend: s.parts[i].Backend}
	next.fail(s.parts[i].err)
	s.parts[i].troubled, s.r.config.Backends[s.parts[i].name] = next, next
	s.r.apply()
}

// rages lets something happen, so many times.
func (s *storm) rages(times int) {
	full := s.r.config.Keys[0].Wraps
	for range times {
		i := s.rnd.IntN(len(s.parts))
		b := &s.parts[i]
		version := strconv.Itoa(1 + s.rnd.IntN(b.current))
		switch s.rnd.IntN(16) {
		case 0:
			if _, err := b.store.Rotate(b.key); err == nil {
				b.current++
			}
			s.note("rotate %d", i)
		case 1, 2:
			_ = b.store.Disable(b.key, version)
			s.note("disable %s of %d", version, i)
		case 3:
			_ = b.store.Enable(b.key, version)
			s.note("enable %s of %d", version, i)
		case 4:
			b.fail(unreachable())
			s.note("%d is away", i)
		case 5, 6:
			b.fail(nil)
			s.note("%d is back", i)
		case 7:
			s.replace(i)
			s.note("reload of %d", i)
		case 8:
			s.r.restart()
			s.note("restart")
		case 9: // taken out of the key, or brought in
			wraps := full[:1+s.rnd.IntN(len(full))]
			s.r.config.Keys[0].Wraps = wraps
			s.r.apply()
			s.note("%d backends", len(wraps))
		case 10, 11:
			if m, err := s.encrypt(); err == nil {
				s.messages = append(s.messages, m.Message)
			}
			if m, err := s.GenerateDataKey(s.t.Context(), caller(s.t, orders), kms.GenerateDataKeyRequest{Key: "orders"}); err == nil {
				s.made = append(s.made, m)
			}
		default:
			if n := len(s.messages); n > 0 {
				_, _ = s.decrypt(s.messages[s.rnd.IntN(n)])
			}
			if n := len(s.made); n > 0 {
				_ = s.opensKey(s.made[s.rnd.IntN(n)].EDKs[:1], nil)
			}
		}
		if s.rnd.IntN(3) == 0 {
			s.Settle()
		}
		s.clock.Advance(time.Duration(s.rnd.IntN(400)) * time.Second)
	}
	s.r.config.Keys[0].Wraps = full
	s.r.apply()
}

// calms has all backends back, with the current versions enabled or all of them.
func (s *storm) calms(all bool) {
	for _, b := range s.parts {
		b.fail(nil)
		for v := 1; v <= b.current; v++ {
			if all || v == b.current {
				_ = b.store.Enable(b.key, strconv.Itoa(v))
			}
		}
	}
	comesBack(s.t.(*testing.T), s.pair, "encrypt", s.encrypts)
	comesBack(s.t.(*testing.T), s.pair, "export", s.export)
}

func inStorms(t *testing.T, seeds, least int, test func(t *testing.T, s *storm)) {
	t.Helper()
	for seed := range uint64(seeds) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			s := newStorm(t, seed, least+int(seed)%2)
			s.rages(40)
			test(t, s)
			if t.Failed() {
				t.Log(s.log)
			}
		})
	}
}

// Whatever happens to some backends: when all answer and allow everything again, all that was
// ever made is opened, and something new is made.
func TestAfterAStorm(t *testing.T) {
	inStorms(t, 20, 2, func(t *testing.T, s *storm) {
		s.calms(true)
		for i, m := range s.messages {
			comesBack(t, s.pair, fmt.Sprint("message ", i), s.decrypts(m))
		}
		for i, m := range s.made {
			comesBack(t, s.pair, fmt.Sprint("data key ", i), func() error { return s.opensKey(m.EDKs, nil) })
			comesBack(t, s.pair, fmt.Sprint("data key by one, ", i), func() error { return s.opensKey(m.EDKs[:1], nil) })
		}
	})
}

// loses has a backend away for a while, in which there may be restarts and reloads.
func (s *storm) loses(i int) {
	s.parts[i].fail(unreachable())
	for range 1 + s.rnd.IntN(2) {
		switch s.rnd.IntN(3) {
		case 0:
			s.r.restart()
			s.note("then: restart")
		case 1:
			s.replace(i)
			s.note("then: reload of %d", i)
		}
		s.clock.Advance(10 * time.Minute)
		s.Settle()
	}
}

// Whatever happened: a backend that allows its current version is lost, and nobody notices.
func TestALossAfterAStorm(t *testing.T) {
	inStorms(t, 20, 2, func(t *testing.T, s *storm) {
		s.calms(false)
		message := s.must().Message
		comesBack(t, s.pair, "a new message", s.decrypts(message))
		s.Settle()
		s.loses(s.rnd.IntN(len(s.parts)))
		comesBack(t, s.pair, "encrypt", s.encrypts)
		comesBack(t, s.pair, "export", s.export)
		comesBack(t, s.pair, "the message", s.decrypts(message))
	})
}

// Whatever happened: a backend whose current version is disabled, which is heard, is lost, and
// nothing is served that it has not allowed, whatever a caller says of it.
func TestARefusalAfterAStorm(t *testing.T) {
	inStorms(t, 20, 2, func(t *testing.T, s *storm) {
		s.calms(false)
		message := s.must().Message
		comesBack(t, s.pair, "a new message", s.decrypts(message))
		made, _ := s.exported("any")
		lost := s.rnd.IntN(len(s.parts))
		b := s.parts[lost]
		if err := b.store.Disable(b.key, strconv.Itoa(b.current)); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			s.clock.Advance(6 * time.Minute)
			_, _ = s.encrypt()
			_, _ = s.decrypt(message)
			s.Settle()
		}
		s.loses(lost)
		for range 3 {
			s.clock.Advance(6 * time.Minute)
			wantRefused(t, "the message", s.decrypts(message)())
			wantRefused(t, "encrypt", s.encrypts())
			for i, edk := range made.EDKs {
				if i == lost {
					continue
				}
				claim := claims(t, made.EDKs[lost], strconv.Itoa(1+s.rnd.IntN(b.current)))
				pairs := map[string]string{"tenant": "any"}
				wantRefused(t, "by another alone", s.opensKey([]envelope.EDK{edk}, pairs))
				wantRefused(t, "by a claim", s.opensKey([]envelope.EDK{edk, claim}, pairs))
			}
			s.Settle()
		}
	})
}
