package kms_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/plugins"
)

// picky denies what is wrapped, or opened, with the context of a tenant.
type picky struct{ *troubled }

func (u *picky) Wrap(ctx context.Context, key plugins.KeyRef, plaintext []byte, b plugins.Binding) ([]byte, error) {
	if b.Context["tenant"] == "evil" {
		if err := u.meets(ctx, "wrap"); err != nil {
			return nil, err
		}
		return nil, denied()
	}
	return u.troubled.Wrap(ctx, key, plaintext, b)
}

// crowd returns another agent with so many callers, who have a message each.
func (p *pair) crowd(many int) (q *pair, ids []string, messages [][]byte) {
	p.t.Helper()
	for i := range many {
		messages = append(messages, p.must().Message)
		p.forget()
		ids = append(ids, fmt.Sprintf("spiffe://example.org/ns/shop/sa/w%d", i))
	}
	q = p.again()
	q.lets(ids...)
	return q, ids, messages
}

// A caller asks for data keys in a context that one backend denies, a few times at
// once: each no is newer than the question whose yes would undo the one before. Nobody else
// encrypts with the key any more, though its data key is cached and was confirmed just now.
func TestADeniedContextSuspendsNobodyElse(t *testing.T) {
	for name, two := range map[string]bool{"two backends": true, "one": false} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(p *pair) {
				p.config.Backends["b"] = &picky{p.b}
				p.b.seesContexts()
				if !two {
					p.config.Keys[0].Wraps = p.config.Keys[0].Wraps[1:]
				}
				p.lets(stranger)
				p.must()
				p.a.slow(50 * time.Millisecond)
				p.b.slow(50 * time.Millisecond)
				run, end := context.WithCancel(p.t.Context())
				var under sync.WaitGroup
				for i := range 3 {
					under.Go(func() {
						time.Sleep(time.Duration(i) * 17 * time.Millisecond)
						for run.Err() == nil {
							_, _ = p.GenerateDataKey(run, caller(p.t, stranger), kms.GenerateDataKeyRequest{Key: "orders", Context: map[string]string{"tenant": "evil"}})
							time.Sleep(time.Millisecond)
						}
					})
				}
				var served, refused int
				var last error
				under.Go(func() {
					time.Sleep(time.Second)
					for range 300 {
						if err := p.encrypts(); err == nil {
							served++
						} else {
							refused++
							last = err
						}
						time.Sleep(100 * time.Millisecond)
					}
					end()
				})
				for run.Err() == nil {
					p.clock.Advance(5 * time.Millisecond)
					time.Sleep(5 * time.Millisecond)
				}
				under.Wait()
				p.t.Logf("served %d, refused %d: %v", served, refused, last)
				if refused > served {
					p.t.Errorf("beside three requests at a time of another caller, %d requests were served and %d refused; last: %v", served, refused, last)
				}
			})
		})
	}
}

// After a no that is over, many callers, each once a second, whose turn it is not
// (surePause): each is told the old no, which the cache takes for a new one, so that the yes
// to whoever asks is always older than the last no. The key, which both backends allow
// again, is refused for as long as they go on.
func TestAYesIsNotOutrun(t *testing.T) {
	for name, many := range map[string]int{"few callers": 2, "a dozen": 12, "many": 40} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(p *pair) {
				q, ids, messages := p.crowd(many)
				run, end := context.WithCancel(p.t.Context())
				var under sync.WaitGroup
				under.Go(func() { _ = q.Run(run) })
				p.a.slow(100 * time.Millisecond)
				p.b.slow(100 * time.Millisecond)
				p.b.intercept(butDescribe)
				var mu sync.Mutex
				counting, served, refused := false, 0, 0
				var last error
				for i, id := range ids {
					under.Go(func() {
						each := 1100 * time.Millisecond
						time.Sleep(time.Duration(i) * each / time.Duration(many))
						beats := time.NewTicker(each)
						defer beats.Stop()
						for run.Err() == nil {
							_, err := q.Decrypt(run, caller(p.t, id), kms.DecryptRequest{Message: messages[i]})
							mu.Lock()
							switch {
							case !counting:
							case err == nil:
								served++
							default:
								refused++
								last = err
							}
							mu.Unlock()
							<-beats.C
						}
					})
				}
				tick := func(d time.Duration) { // the clock of the keys goes with that of those who wait
					for range d / (5 * time.Millisecond) {
						p.clock.Advance(0)
						q.clock.Advance(5 * time.Millisecond)
						time.Sleep(5 * time.Millisecond)
						synctest.Wait()
					}
				}
				tick(5 * time.Second)
				p.b.intercept(nil) // it allows the key again
				tick(10 * time.Second)
				mu.Lock()
				counting = true
				mu.Unlock()
				tick(30 * time.Second)
				end()
				tick(2 * time.Second)
				under.Wait()
				p.t.Logf("served %d, refused %d: %v", served, refused, last)
				if refused > served {
					p.t.Errorf("10 to 40 s after both backends allow the key again %d requests were served, %d refused; last: %v", served, refused, last)
				}
			})
		})
	}
}

// What who may not ask is told wraps what the one before was told, and is kept as the
// reason of the suspension: while the backend that has refused is away, the reason grows with
// each request, in memory (all of them are kept: the square of their number) and in the
// audit record.
func TestReasonsDoNotGrow(t *testing.T) {
	const callers, rounds = 20, 60
	p := newPair(t, 1)
	q, ids, messages := p.crowd(callers)
	longest := 0
	round := func() {
		for i, id := range ids {
			_, err := q.Decrypt(t.Context(), caller(t, id), kms.DecryptRequest{Message: messages[i]})
			var e *kms.Error
			if errors.As(err, &e) && e.Cause != nil {
				longest = max(longest, len(e.Cause.Error()))
			}
		}
		q.Settle()
		q.clock.Advance(1100 * time.Millisecond)
	}
	p.b.intercept(butDescribe)
	for range 3 {
		round()
	}
	p.b.fail(unreachable())
	p.b.intercept(nil)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for range rounds {
		round()
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	grown := int64(after.HeapAlloc) - int64(before.HeapAlloc)
	if longest > 4096 || grown > 8<<20 {
		t.Errorf("after %d refused requests in a minute the reason has %d bytes, and %d more bytes of memory are held", callers*rounds, longest, grown)
	}
}

// Who may not ask, as somebody has just now, begins an outage of the key, though the
// first backend answers: an answer of the agent's own is none. Here: after a restart.
func TestAPausedQuestionIsNoOutage(t *testing.T) {
	p, r := newStoredPair(t)
	p.lets(stranger)
	made := p.must().Message
	p.forget()
	other := p.must().Message
	if _, err := p.decrypt(made); err != nil {
		t.Fatal(err)
	}
	p.b.intercept(butDescribe)
	for range 3 {
		p.clock.Advance(6 * time.Minute)
		_, _ = p.decrypt(made)
		p.Settle()
	}
	p.b.intercept(nil)
	p.b.fail(unreachable())
	r.restart()
	p.clock.Advance(5 * time.Second)
	for range 3 {
		for _, use := range []func() error{p.decrypts(made), func() error {
			_, err := p.Decrypt(t.Context(), caller(t, stranger), kms.DecryptRequest{Message: other})
			return err
		}} {
			wantRefused(t, "after a restart", use())
			p.Settle()
			if o := p.Outages(); len(o) > 0 {
				t.Fatalf("the first backend answers, and there is an outage of the key: %+v", o)
			}
		}
		p.clock.Advance(1100 * time.Millisecond)
	}
}
