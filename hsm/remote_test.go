package hsm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// remote is a rig whose token is at the other end of a wire, with a key there.
type remote struct {
	*rig
	*hsmtest.Remote

	v                 *hsm.Version
	material, wrapped []byte
}

// over attaches to the token of soft by a wire of its own.
func over(t testing.TB, soft *hsmtest.SoftHSM, change ...func(*rig, *hsm.Config)) *remote {
	t.Helper()
	r := &remote{Remote: hsmtest.NewRemote(t, soft), material: material(32)}
	change = append(change, func(_ *rig, c *hsm.Config) { c.Module = r.Module })
	r.rig = (&rig{t: t, soft: soft}).open(change...)
	return r
}

// uses takes a version of a key into use.
func (r *remote) uses(v *hsm.Version) {
	r.t.Helper()
	r.v, r.wrapped = v, r.wrap(v, r.material)
}

// beside is another application of the same token and key, with a wire of its own.
func (r *remote) beside(t testing.TB, change ...func(*rig, *hsm.Config)) *remote {
	t.Helper()
	o := over(t, r.soft, change...)
	v, err := o.Version(bounded(t), r.v.Key, r.v.Number)
	if err != nil {
		t.Fatal(err)
	}
	o.uses(v)
	return o
}

func (r *remote) works() {
	r.t.Helper()
	r.opens(r.v, r.wrapped, r.material)
}

func (r *remote) isOut() {
	r.t.Helper()
	_ = r.fails(r.v, r.wrapped, hsm.Unavailable)
}

func (r *remote) checks() {
	r.t.Helper()
	if err := r.Check(bounded(r.t)); err != nil {
		r.t.Errorf("Check: %v", err)
	}
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

// What is in the network can be out of reach: to callers that is an outage and nothing
// else, it makes no storm of connections, and when it is over they are served by the
// same process, where the module does not hang.
func TestRemote(t *testing.T) {
	idle := over(t, hsmtest.NewSoftHSM(t))
	idle.uses(idle.key("orders", hsm.OAEPSHA1))
	_ = idle.Connections()
	idle.Cut()
	t.Run("outages", func(t *testing.T) { outages(t, idle) })
	t.Run("asked for", func(t *testing.T) { askedFor(t, idle) })
	t.Run("interrupted", func(t *testing.T) { interrupted(t, idle) })
	t.Run("black hole", func(t *testing.T) { blackHole(t, idle.soft) })
	t.Run("idle", func(t *testing.T) { // it has been, all the time
		eventually(t, "a connection that nobody uses is found lost, and made anew", func() error {
			if n := idle.attached(); n != 2 {
				return fmt.Errorf("attached %d times", n)
			}
			return nil
		})
		if n := idle.Connections(); n != 1 {
			t.Errorf("%d connections, want one", n)
		}
	})
}

// outages last for a while. Callers are told so at once, when they have waited once.
func outages(t *testing.T, first *remote) {
	const patience = 500 * time.Millisecond
	r := first.beside(t, func(_ *rig, c *hsm.Config) { c.Patience = patience })
	for _, c := range []struct {
		name        string
		begin, over func()
	}{
		{"cut and refused", func() { r.Refuse(true); r.Cut() }, func() { r.Refuse(false) }},
		{"no answer is whole", func() {
			r.CutAnswers(0, 1000)
			r.isOut() // alone: of several at once p11-kit lets some hang then
		}, func() { r.CutAnswers(0, 0) }},
		{"the server is gone, and the module shows no slot", r.Stop, r.Start},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.works()
			attached, before := r.attached(), r.attempts()
			_ = r.Connections()
			gone := time.Now()
			c.begin()
			var callers sync.WaitGroup
			end := gone.Add(800 * time.Millisecond)
			for range 8 {
				callers.Go(func() {
					r.isOut()
					for known := time.Now(); time.Now().Before(end); time.Sleep(time.Millisecond) {
						r.isOut()
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
			if n := r.Connections(); n > 6 {
				t.Errorf("%d connections", n)
			}
			c.over()
			back := time.Now()
			eventually(t, "it is back", func() error {
				_, err := r.Unwrap(t.Context(), r.v, nil, r.wrapped, bound)
				return err
			})
			// The pauses double, so they are not much longer than the outage.
			if d := time.Since(back); d > 2*back.Sub(gone)+time.Second {
				t.Errorf("the first answer %v after it is back", d)
			}
			r.works()
			if n := r.attached() - attached; n != 1 {
				t.Errorf("attached %d times", n)
			}
		})
	}
}

// interrupted: where another connection is to be had, those that are lost cost no call.
func interrupted(t *testing.T, first *remote) {
	r := first.beside(t, func(_ *rig, c *hsm.Config) { c.Patience = 5 * time.Second })
	for name, lose := range map[string]func(){
		"cut":            r.Cut,
		"half an answer": func() { r.CutAnswers(0, 1) },
		"server killed":  func() { r.Stop(); r.Start() },
	} {
		t.Run(name, func(t *testing.T) {
			before := r.attached()
			_ = r.Connections()
			for what, use := range map[string]func(){
				"a wrap":     func() { r.wrap(r.v, r.material) },
				"an unwrap":  r.works,
				"the health": r.checks,
				"the catalogue": func() {
					if keys, err := r.Keys(bounded(t)); err != nil || len(keys) != 1 {
						t.Errorf("%d keys, %v: want the one in the catalogue", len(keys), err)
					}
				},
			} {
				lose()
				use()
				if n := r.Connections(); n != 1 {
					t.Errorf("%s made %d connections, want one", what, n)
				}
			}
			if n := r.attached() - before; n != 4 {
				t.Errorf("attached %d times, want 4", n)
			}
		})
	}
	t.Run("while it connects", func(t *testing.T) { cutWhileItConnects(t, r) })
	t.Run("slow", func(t *testing.T) { slow(t, r) })
}

// cutWhileItConnects ends connections in answers to those who make them anew, the
// login's and the canary's too.
func cutWhileItConnects(t *testing.T, r *remote) {
	for answer := 0; answer < 100; answer += 5 {
		_ = r.Connections()
		r.Cut()
		r.CutAnswers(answer, 1)
		r.works()
		r.CutAnswers(0, 0)
		switch n := r.Connections(); n {
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
func slow(t *testing.T, r *remote) {
	_, before := r.Connections(), r.attached()
	r.Silence(true)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := r.Unwrap(ctx, r.v, nil, r.wrapped, bound); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Unwrap: %v, want that the caller's time is over", err)
	}
	late := make(chan error, 1)
	go func() {
		got, err := r.Unwrap(bounded(t), r.v, nil, r.wrapped, bound)
		if err == nil && !bytes.Equal(got, r.material) {
			err = errors.New("it opens to something else")
		}
		late <- err
	}()
	select {
	case err := <-late:
		t.Errorf("Unwrap in silence: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	r.Delay(20 * time.Millisecond)
	r.Silence(false)
	if err := <-late; err != nil {
		t.Errorf("Unwrap after a silence: %v", err)
	}
	r.works()
	r.Delay(0)
	if n := r.Connections(); n != 0 || r.attached() != before {
		t.Errorf("%d more connections, attached %d times more", n, r.attached()-before)
	}
}

// blackHole: who never answers is given up, with the process; while it serves, and
// while a connection is being made.
func blackHole(t *testing.T, soft *hsmtest.SoftHSM) {
	const hang = 400 * time.Millisecond
	for name, cut := range map[string]bool{"in use": false, "while it connects": true} {
		t.Run(name, func(t *testing.T) {
			r := hsmtest.NewRemote(t, soft)
			token, err := hsm.Open(hsm.Config{
				Module: r.Module, Token: hsm.URI{Token: hsmtest.Label}, HangAfter: hang,
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
			r.Silence(true)
			if cut {
				r.Cut()
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
			if n := r.Connections(); n > 2 {
				t.Errorf("%d connections", n)
			}
		})
	}
}

// Who checks whether a token is back is not told of an attempt that was made before it
// was: the pauses between attempts grow, and this does not wait for the end of one.
func askedFor(t *testing.T, first *remote) {
	r := first.beside(t, func(_ *rig, c *hsm.Config) { c.Patience = 10 * time.Second })
	r.works()
	r.Refuse(true)
	r.Cut()
	eventually(t, "the pauses grow", func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if last := r.events[len(r.events)-1]; last.Attached || last.Retry < 3*time.Second {
			return fmt.Errorf("the last one is %v", last.Retry)
		}
		return nil
	})
	r.Refuse(false)
	began := time.Now()
	if err := r.Check(bounded(t)); err != nil {
		t.Errorf("Check: %v", err)
	}
	if took := time.Since(began); took > 2500*time.Millisecond {
		t.Errorf("it took %v to find the token again", took)
	}
	r.works()
}
