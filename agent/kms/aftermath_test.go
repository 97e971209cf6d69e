package kms_test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/plugins"
)

func TestARetiredVersionAndRestarts(t *testing.T) {
	for name, c := range map[string]struct {
		retired, reload bool
		restarts        int
	}{
		"control: nothing retired": {false, true, 1}, "control: no reload": {true, false, 2},
		"control: reload alone":                {true, true, 0},
		"reload, restart":                      {true, true, 1},
		"restarted with other settings, twice": {true, false, -2},
	} {
		t.Run(name, func(t *testing.T) {
			p, r := newStoredPair(t)
			fresh := p.rotated(c.retired)
			p.a.fail(unreachable())
			next := &troubled{Backend: p.a.Backend}
			next.fail(unreachable())
			if c.reload {
				r.config.Backends["local"] = next
				r.config.Upstreams = map[string]string{"local": "one, changed", "b": "two"}
				r.apply()
			}
			p.clock.Advance(10 * time.Minute)
			comesBack(t, p, "encrypt, before", p.encrypts)
			comesBack(t, p, "fresh, before", p.decrypts(fresh))
			p.Settle()
			n := c.restarts
			if n < 0 {
				n = -n
				r.config.Upstreams = map[string]string{"local": "one, changed", "b": "two"}
			}
			for range n {
				p.clock.Advance(time.Minute)
				r.restart()
				p.clock.Advance(10 * time.Minute)
				comesBack(t, p, "encrypt", p.encrypts)
				comesBack(t, p, "data key", p.export)
				comesBack(t, p, "fresh", p.decrypts(fresh))
			}
		})
	}
}

type latecomer struct {
	*manyfold

	hold atomic.Pointer[chan struct{}]
	held chan struct{}
}

func (l *latecomer) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	d, err := l.manyfold.Describe(ctx, uri)
	if gate := l.hold.Swap(nil); gate != nil {
		close(l.held)
		<-*gate
	}
	return d, err
}

// An answer to an older question, which comes late, takes back nothing.
func TestALateDescription(t *testing.T) {
	for name, late := range map[string]bool{"control": false, "late": true} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			l := &latecomer{manyfold: &manyfold{troubled: p.b}, held: make(chan struct{})}
			p.config.Backends["b"] = l
			p.apply()
			partial, whole := p.partial(), p.must().Message
			for _, m := range [][]byte{partial, whole} {
				if _, err := p.decrypt(m); err != nil {
					t.Fatal(err)
				}
			}
			p.Settle()
			p.clock.Advance(6 * time.Minute)
			gate, ended := make(chan struct{}), make(chan struct{})
			if late {
				l.hold.Store(&gate)
				go func() { // asks what B's key is; the answer takes its time
					defer close(ended)
					_, _ = p.encrypt()
				}()
				<-l.held
			}
			// Meanwhile: rotated, and the new version is disabled.
			l.second.Store(true)
			l.disabled.Store(1 << 2)
			p.clock.Advance(time.Second)
			for range 3 {
				_, _ = p.decrypt(partial)
				_, _ = p.decrypt(whole)
				p.clock.Advance(time.Second)
			}
			wantRefused(t, "partial, B answers", p.decrypts(partial)())
			if late {
				close(gate)
				<-ended
				p.Settle()
			}
			p.b.fail(unreachable())
			p.Settle()
			for range 3 {
				p.clock.Advance(6 * time.Minute)
				wantRefused(t, "partial, B away", p.decrypts(partial)())
				p.Settle()
			}
		})
	}
}

func TestOneThatRefusesAndHangs(t *testing.T) {
	for name, disabled := range map[string]bool{"control": false, "withholds": true} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			v := p.manyfold()
			var old [][]byte
			for range 4 {
				old = append(old, p.must().Message)
				p.forget()
			}
			v.second.Store(true)
			p.clock.Advance(6 * time.Minute)
			p.must()
			if disabled {
				v.disabled.Store(1 << 2)
			}
			for range 3 {
				p.clock.Advance(6 * time.Minute)
				_ = p.encrypts()
				_, _ = p.decrypt(old[3])
				p.Settle()
			}
			p.forget()
			p.b.slow(4 * time.Second)
			for _, m := range old[:3] {
				began := time.Now()
				_, _ = p.decrypt(m)
				took := time.Since(began)
				if took > 2*time.Second {
					t.Errorf("took %v", took)
				}
			}
		})
	}
}

func TestEverythingAtOnce(t *testing.T) {
	p, r := newStoredPair(t)
	m := p.must().Message
	made, err := p.GenerateDataKey(t.Context(), caller(t, orders), kms.GenerateDataKeyRequest{Key: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.keystore.Rotate("orders"); err != nil {
		t.Fatal(err)
	}
	end := time.Now().Add(2 * time.Second)
	var all sync.WaitGroup
	loop := func(pause time.Duration, act func(i int)) {
		all.Go(func() {
			for i := 0; time.Now().Before(end); i++ {
				act(i)
				time.Sleep(pause)
			}
		})
	}
	for range 3 {
		loop(0, func(int) { _ = p.encrypts(); _ = p.decrypts(m)(); _ = p.opensKey(made.EDKs, nil) })
		loop(0, func(i int) { _ = p.opensKey(made.EDKs[i%2:i%2+1], nil) })
	}
	loop(time.Millisecond, func(int) { p.clock.Advance(20 * time.Second) })
	loop(30*time.Millisecond, func(i int) {
		if i%2 == 0 {
			_ = p.keystore.Disable("orders", "2")
		} else {
			_ = p.keystore.Enable("orders", "2")
		}
	})
	loop(20*time.Millisecond, func(i int) {
		if p.a.fail(nil); i%3 == 0 {
			p.a.fail(unreachable())
		}
	})
	loop(100*time.Millisecond, func(i int) {
		c := r.config
		c.Keys = append([]kms.Key(nil), c.Keys...)
		c.Keys[0].MinWraps = 1 + i%2
		_ = r.Apply(c)
	})
	loop(50*time.Millisecond, func(int) { _, _, _ = r.Evict("orders") })
	all.Wait()
	p.a.fail(nil)
	_ = p.keystore.Enable("orders", "2")
	comesBack(t, p, "encrypt", p.encrypts)
	comesBack(t, p, "decrypt", p.decrypts(m))
	comesBack(t, p, "first", func() error { return p.opensKey(made.EDKs[:1], nil) })
	comesBack(t, p, "second", func() error { return p.opensKey(made.EDKs[1:], nil) })
}

// A backend that is slow, and refuses its current version, is not taken for one that hangs: it
// opens what it allows.
func TestASlowOneThatRefuses(t *testing.T) {
	for _, takes := range []time.Duration{200 * time.Millisecond, 1200 * time.Millisecond} {
		t.Run(takes.String(), func(t *testing.T) {
			t.Parallel()
			p := newPair(t, 1)
			v := p.manyfold()
			var old [][]byte
			for range 4 {
				old = append(old, p.must().Message)
				p.forget()
			}
			v.second.Store(true)
			p.clock.Advance(6 * time.Minute)
			p.must()
			v.disabled.Store(1 << 2)
			for range 3 {
				p.clock.Advance(6 * time.Minute)
				_ = p.encrypts()
				p.Settle()
			}
			p.forget()
			p.b.slow(takes)
			for i, m := range old {
				if _, err := p.decrypt(m); err != nil && i > 0 { // how slow it is may be news
					t.Errorf("message %d: %v", i, err)
				}
				p.Settle()
			}
		})
	}
}

// What a backend has opened itself stays cached while it refuses its current version, over a
// restart too.
func TestWhatWasOpenedOutlastsARestart(t *testing.T) {
	for name, restart := range map[string]bool{"control": false, "restart": true} {
		t.Run(name, func(t *testing.T) {
			p, r := newStoredPair(t)
			var old [][]byte
			for range 3 {
				old = append(old, p.must().Message)
				p.forget()
			}
			if _, err := p.keystore.Rotate("orders"); err != nil {
				t.Fatal(err)
			}
			p.clock.Advance(6 * time.Minute)
			p.must()
			p.b.fail(unreachable()) // so that A opens them, which refuses later
			for _, m := range old {
				if _, err := p.decrypt(m); err != nil {
					t.Fatal(err)
				}
			}
			p.b.fail(nil)
			p.Settle()
			if restart {
				p.clock.Advance(time.Minute)
				r.restart()
			}
			if err := p.keystore.Disable("orders", "2"); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				p.clock.Advance(6 * time.Minute)
				_ = p.encrypts()
				p.Settle()
			}
			wantRefused(t, "encrypt", p.encrypts())
			p.Settle()
			comesBack(t, p, "old", p.decrypts(old[0]))
			p.a.fail(unreachable())
			for _, m := range old {
				if _, err := p.decrypt(m); err != nil {
					t.Errorf("once A is away: %v", err)
				}
			}
		})
	}
}
