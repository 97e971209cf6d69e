package hsm_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// newRemoteRig is newRig with the token at the other end of a wire, and a key there.
func newRemoteRig(t testing.TB, change ...func(*rig, *hsm.Config)) (*rig, *hsmtest.Remote, *hsm.Version) {
	t.Helper()
	var remote *hsmtest.Remote
	r := newRig(t, append(change, func(r *rig, c *hsm.Config) {
		remote = hsmtest.NewRemote(t, r.soft)
		c.Module = remote.Module
	})...)
	return r, remote, r.key("orders", hsm.OAEPSHA1)
}

// attempts returns how often the token could not be attached.
func (r *rig) attempts() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, e := range r.events {
		if !e.Attached {
			n++
		}
	}
	return n
}

// What is in the network can be out of reach for a while: to callers that is an
// outage and nothing else, however many call it makes no storm of connections, and
// when it is over they are served, by the same process.
func TestRemoteOutages(t *testing.T) {
	const patience = 500 * time.Millisecond
	r, remote, v := newRemoteRig(t, func(_ *rig, c *hsm.Config) { c.Patience = patience })
	m := material(32)
	wrapped := r.wrap(v, m)
	for _, c := range []struct {
		name        string
		begin, over func()
	}{
		{"cut and refused", func() { remote.Refuse(true); remote.Cut() }, func() { remote.Refuse(false) }},
		{"no answer is whole", func() {
			remote.CutAnswers(0, 1000)
			_ = r.fails(v, wrapped, hsm.Unavailable) // alone: of several at once p11-kit lets some hang then
		}, func() { remote.CutAnswers(0, 0) }},
		{"the server is gone, and the module shows no slot", remote.Stop, remote.Start},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.opens(v, wrapped, m)
			attached, before := r.attached(), r.attempts()
			_ = remote.Connections()
			gone := time.Now()
			c.begin()
			var callers sync.WaitGroup
			end := gone.Add(800 * time.Millisecond)
			for range 8 {
				callers.Go(func() {
					_ = r.fails(v, wrapped, hsm.Unavailable)
					for known := time.Now(); time.Now().Before(end); time.Sleep(time.Millisecond) {
						_ = r.fails(v, wrapped, hsm.Unavailable)
						if d := time.Since(known); d > patience/2 {
							t.Errorf("Unwrap: waits %v for what is known to be away", d)
							return
						}
						known = time.Now()
						if _, err := r.Key(t.Context(), "orders"); err != nil && hsm.KindOf(err) != hsm.Unavailable {
							t.Errorf("Key: %v, want Unavailable", err)
							return
						}
					}
				})
			}
			callers.Wait()
			// At 100 ms, and then twice as long each time.
			if n := r.attempts() - before; n < 2 || n > 6 {
				t.Errorf("%d attempts", n)
			}
			if n := remote.Connections(); n > 6 {
				t.Errorf("%d connections", n)
			}
			c.over()
			back := time.Now()
			eventually(t, "it is back", func() error {
				_, err := r.Unwrap(t.Context(), v, nil, wrapped, bound)
				return err
			})
			// The pauses double, so they are not much longer than the outage.
			if d := time.Since(back); d > 2*back.Sub(gone)+time.Second {
				t.Errorf("the first answer %v after it is back", d)
			}
			r.opens(v, wrapped, m)
			if n := r.attached() - attached; n != 1 {
				t.Errorf("attached %d times", n)
			}
		})
	}
}

// Where another connection is to be had, those that are lost cost no call.
func TestRemoteInterrupted(t *testing.T) {
	r, remote, v := newRemoteRig(t, func(_ *rig, c *hsm.Config) { c.Patience = 5 * time.Second })
	m := material(32)
	wrapped := r.wrap(v, m)
	for name, lose := range map[string]func(){
		"cut":            remote.Cut,
		"half an answer": func() { remote.CutAnswers(0, 1) },
		"server killed":  func() { remote.Stop(); remote.Start() },
	} {
		t.Run(name, func(t *testing.T) {
			before := r.attached()
			_ = remote.Connections()
			for what, use := range map[string]func(){
				"a wrap":     func() { r.wrap(v, m) },
				"an unwrap":  func() { r.opens(v, wrapped, m) },
				"the health": func() { r.checks() },
				"the catalogue": func() {
					if keys, err := r.Keys(bounded(t)); err != nil || len(keys) != 1 {
						t.Errorf("%d keys, %v: want the one in the catalogue", len(keys), err)
					}
				},
			} {
				lose()
				use()
				if n := remote.Connections(); n != 1 {
					t.Errorf("%s made %d connections, want one", what, n)
				}
			}
			if n := r.attached() - before; n != 4 {
				t.Errorf("attached %d times, want 4", n)
			}
		})
	}
	t.Run("while it connects", func(t *testing.T) { cutWhileItConnects(t, r, remote, v) })
	t.Run("slow", func(t *testing.T) { slow(t, r, remote, v) })
}

func (r *rig) checks() {
	r.t.Helper()
	if err := r.Check(bounded(r.t)); err != nil {
		r.t.Errorf("Check: %v", err)
	}
}

// cutWhileItConnects ends connections in answers to those who make them anew, the
// login's and the canary's too.
func cutWhileItConnects(t *testing.T, r *rig, remote *hsmtest.Remote, v *hsm.Version) {
	m := material(32)
	wrapped := r.wrap(v, m)
	for answer := 0; answer < 100; answer += 5 {
		_ = remote.Connections()
		remote.Cut()
		remote.CutAnswers(answer, 1)
		r.opens(v, wrapped, m)
		remote.CutAnswers(0, 0)
		switch n := remote.Connections(); n {
		case 1: // all of them arrived
			if answer < 10 {
				t.Errorf("%d answers are enough", answer)
			}
			return
		case 2:
		default:
			t.Errorf("cut in answer %d: %d connections, want another one", answer, n)
		}
	}
	t.Error("100 answers are not enough")
}

// slow lets answers be late: callers leave when their time is over, the connection
// stays.
func slow(t *testing.T, r *rig, remote *hsmtest.Remote, v *hsm.Version) {
	m := material(32)
	wrapped := r.wrap(v, m)
	_, before := remote.Connections(), r.attached()
	remote.Silence(true)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := r.Unwrap(ctx, v, nil, wrapped, bound); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Unwrap: %v, want that the caller's time is over", err)
	}
	late := make(chan error, 1)
	go func() {
		got, err := r.Unwrap(bounded(t), v, nil, wrapped, bound)
		if err == nil && !bytes.Equal(got, m) {
			err = errors.New("it opens to something else")
		}
		late <- err
	}()
	select {
	case err := <-late:
		t.Errorf("Unwrap in silence: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	remote.Delay(20 * time.Millisecond)
	remote.Silence(false)
	if err := <-late; err != nil {
		t.Errorf("Unwrap after a silence: %v", err)
	}
	r.opens(v, wrapped, m)
	remote.Delay(0)
	if n := remote.Connections(); n != 0 || r.attached() != before {
		t.Errorf("%d more connections, attached %d times more", n, r.attached()-before)
	}
}

// Who never answers is given up, with the process: while it serves, and while a
// connection is being made.
func TestRemoteBlackHole(t *testing.T) {
	const hang = 400 * time.Millisecond
	for name, cut := range map[string]bool{"in use": false, "while it connects": true} {
		t.Run(name, func(t *testing.T) {
			soft := hsmtest.NewSoftHSM(t)
			remote := hsmtest.NewRemote(t, soft)
			token, err := hsm.Open(hsm.Config{
				Module: remote.Module, Token: hsm.URI{Token: hsmtest.Label}, HangAfter: hang,
				Login: &hsm.Ledger{Path: soft.Path("logins"), PIN: hsm.PINSource{File: soft.PINFile()}},
			})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := token.Close(); hsm.KindOf(err) != hsm.Unavailable {
					t.Errorf("Close: %v, want why the token is dead", err)
				}
			}()
			eventually(t, "the token is attached", func() error { return token.Check(t.Context()) })
			remote.Silence(true)
			if cut {
				remote.Cut()
			}
			began := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), hang/4)
			defer cancel()
			if err := token.Check(ctx); err == nil || ctx.Err() == nil {
				t.Errorf("Check: %v, want that the caller's time is over", err)
			}
			select {
			case <-token.Dead():
			case <-time.After(10 * time.Second):
				t.Fatal("nobody gives up")
			}
			if err := token.Check(bounded(t)); hsm.KindOf(err) != hsm.Unavailable || !errors.Is(err, token.Err()) {
				t.Errorf("Check: %v, want Unavailable, at once", err)
			}
			if d := time.Since(began); d < hang || d > 2*time.Second {
				t.Errorf("given up after %v, want %v", d, hang)
			}
			if n := remote.Connections(); n > 2 {
				t.Errorf("%d connections", n)
			}
		})
	}
}
