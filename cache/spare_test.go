package cache_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

// withSpares asks for spares and grace; two messages use a data key up.
func withSpares(n int) func(*cache.EncryptRequest) {
	return func(q *cache.EncryptRequest) {
		q.Limits.Spares, q.Limits.Grace, q.Limits.MaxMessages = n, grace, 2
	}
}

func (r *rig) wantSpares(ready, wanted int) {
	r.t.Helper()
	synctest.Wait()
	if a, b := r.SparesOf("orders"); a != ready || b != wanted {
		r.t.Errorf("%d of %d spares, want %d of %d", a, b, ready, wanted)
	}
	if s := r.Stats(); s.Spares != uint64(ready) {
		r.t.Errorf("statistics tell of %d spares, want %d", s.Spares, ready)
	}
}

// TestSpares: in an outage Encrypt goes on until the limits of all that was prepared
// are used up, and asks nobody.
func TestSpares(t *testing.T) {
	bubble(t, func(r *rig) {
		f, n, err := r.encrypt(withSpares(2))
		r.wantSource("the first message", f, err, cache.Upstream)
		r.wantSpares(2, 2)
		r.wantCalls(3, 0)
		r.up.say(errDown, errDown)
		keys := map[int]int{n: 1}
		for i := 1; i < 6; i++ {
			f, n, err := r.encrypt(withSpares(2))
			r.wantSource(fmt.Sprintf("message %d", i), f, err, cache.Cached)
			keys[n]++
		}
		if len(keys) != 3 || keys[1] != 2 || keys[2] != 2 || keys[3] != 2 {
			t.Errorf("messages by data key: %v, want two for each of three", keys)
		}
		r.wantSpares(0, 2)
		f, _, err = r.encrypt(withSpares(2))
		r.wantRefused("all limits are used up", f, err, errDown)
		r.up.say(nil, nil)
		f, _, err = r.encrypt(withSpares(2))
		r.wantSource("back", f, err, cache.Upstream)
		r.wantSpares(2, 2)
	})
}

// TestSparesInGrace: what was prepared serves in grace too, and no longer than that.
func TestSparesInGrace(t *testing.T) {
	bubble(t, func(r *rig) {
		_, _, _ = r.encrypt(withSpares(3))
		r.wantSpares(3, 3)
		r.up.say(errDown, errDown)
		time.Sleep(6 * time.Minute)
		for range 3 {
			f, _, err := r.encrypt(withSpares(3))
			r.wantSource("in grace", f, err, cache.Grace)
		}
		r.wantSpares(2, 3)
		time.Sleep(grace)
		f, _, err := r.encrypt(withSpares(3))
		r.wantRefused("after grace", f, err, errDown)
		r.wantSpares(1, 3) // one has taken the place of what was used up
	})
}

// TestSparesWaitForNobody: with a spare at hand a message does not wait for the wrap
// of another data key.
func TestSparesWaitForNobody(t *testing.T) {
	bubble(t, func(r *rig) {
		_, _, _ = r.encrypt(withSpares(1))
		r.wantSpares(1, 1)
		r.up.takes(time.Second)
		began := time.Now()
		for range 3 {
			if _, _, err := r.encrypt(withSpares(1)); err != nil {
				t.Fatal(err)
			}
		}
		if d := time.Since(began); d != 0 {
			t.Errorf("waited %v", d)
		}
		time.Sleep(time.Second)
		r.wantSpares(1, 1)
	})
}

// TestSparesAreRevoked: a confirmed no destroys them like everything else.
func TestSparesAreRevoked(t *testing.T) {
	bubble(t, func(r *rig) {
		_, _, _ = r.encrypt(withSpares(2))
		r.wantSpares(2, 2)
		r.up.say(errNo, errNo)
		r.Observe(wraps, cache.No, nil, r.Now())
		r.wantSpares(0, 2)
		f, _, err := r.encrypt(withSpares(2))
		r.wantRefused("revoked", f, err, errNo)
	})
}

// TestSparesAreEvicted: by name, by version, and with all the rest.
func TestSparesAreEvicted(t *testing.T) {
	for name, evict := range map[string]func(r *rig) int{
		"key":     func(r *rig) int { return r.EvictKey("orders") },
		"version": func(r *rig) int { return r.EvictAuthority(wraps) },
		"all":     func(r *rig) int { return r.EvictAll() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(r *rig) {
				_, _, _ = r.encrypt(withSpares(2))
				r.wantSpares(2, 2)
				if n := evict(r); n != 3 {
					t.Errorf("evicted %d, want 3", n)
				}
				r.wantSpares(0, 2)
			})
		})
	}
}

// TestSparesOfIdlePlaces: who does not encrypt any more needs none, and those that
// wait too long are replaced.
func TestSparesOfIdlePlaces(t *testing.T) {
	bubble(t, func(r *rig) {
		defer r.run()()
		_, _, _ = r.encrypt(withSpares(2))
		r.wantSpares(2, 2)
		time.Sleep(6*time.Hour + 2*time.Second) // max_idle
		synctest.Wait()
		if n := r.Stats(); n.Spares != 0 || n.EncryptionKeys != 0 {
			t.Errorf("%d spares and %d data keys of an idle place", n.Spares, n.EncryptionKeys)
		}
		if ready, wanted := r.SparesOf("orders"); ready+wanted != 0 {
			t.Errorf("%d of %d spares, want that the place is forgotten", ready, wanted)
		}
	})
}

// TestSparesAreBounded: preparing ahead takes from nobody what is in use.
func TestSparesAreBounded(t *testing.T) {
	bubble(t, func(r *rig) {
		for i := range 60 {
			where := func(q *cache.EncryptRequest) {
				q.Slot.Partition, q.Caller = fmt.Sprint(i), fmt.Sprint(i%3)
			}
			if _, _, err := r.encrypt(withSpares(4), where); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		s := r.Stats()
		if s.Spares > 50 || s.Spares+s.EncryptionKeys > 100 {
			t.Errorf("%d spares beside %d data keys, want half of 100 at most", s.Spares, s.EncryptionKeys)
		}
		if s.EncryptionKeys < 40 {
			t.Errorf("%d data keys in use, of 60", s.EncryptionKeys)
		}
	})
}

// TestSparesOutliveTheDataKey: a spare is as old as the data key that it stands behind, and
// must be there when that one's lifetime ends, whether the outage is known by then or not.
func TestSparesOutliveTheDataKey(t *testing.T) {
	for name, known := range map[string]bool{"the outage is known": true, "the outage is not known yet": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(r *rig) {
				stop := r.run()
				defer func() { stop() }()
				hour := func(q *cache.EncryptRequest) {
					q.Limits.Spares, q.Limits.Grace, q.Limits.MaxLifetime = 2, grace, time.Hour
				}
				began := time.Now()
				for time.Since(began) < 59*time.Minute {
					_, _, _ = r.encrypt(hour)
					time.Sleep(time.Minute)
				}
				r.up.say(errDown, errDown)
				if known {
					r.Observe(wraps, cache.Unreachable, nil, r.Now())
				}
				for time.Since(began) < time.Hour+50*time.Minute {
					if _, _, err := r.encrypt(hour); err != nil {
						t.Fatalf("after %v: %v", time.Since(began), err)
					}
					time.Sleep(time.Minute)
				}
				r.wantSpares(1, 2)
			})
		})
	}
}

// TestOldSparesAreReplaced: one that has waited for as long as a data key lives gives way
// to a new one, and not before that one is there.
func TestOldSparesAreReplaced(t *testing.T) {
	bubble(t, func(r *rig) {
		defer r.run()()
		hour := func(q *cache.EncryptRequest) { q.Limits.Spares, q.Limits.MaxLifetime = 2, time.Hour }
		_, _, _ = r.encrypt(hour)
		r.wantSpares(2, 2)
		for range 70 {
			time.Sleep(time.Minute)
			_, _, _ = r.encrypt(hour)
			r.wantSpares(2, 2)
		}
		if fills, _ := r.up.counts(); fills != 5 { // three, a spare for the one that was used, one for the old one
			t.Errorf("%d data keys were made, want 5", fills)
		}
	})
}

// TestFewerSpares: a reload that asks for fewer has the rest destroyed.
func TestFewerSpares(t *testing.T) {
	bubble(t, func(r *rig) {
		many := func(q *cache.EncryptRequest) { q.Limits.Spares = 4 }
		few := func(q *cache.EncryptRequest) { q.Limits.Spares = 1 }
		none := func(q *cache.EncryptRequest) { q.Limits.Spares = 0 }
		for _, step := range []struct {
			change func(*cache.EncryptRequest)
			want   int
		}{{many, 4}, {few, 1}, {none, 0}, {few, 1}} {
			_, _, _ = r.encrypt(step.change)
			r.wantSpares(step.want, step.want)
		}
	})
}

// TestSpareFailures: one that cannot be made is not asked for again and again.
func TestSpareFailures(t *testing.T) {
	bubble(t, func(r *rig) {
		many := func(q *cache.EncryptRequest) { q.Limits.Spares = 1 }
		_, _, _ = r.encrypt(many)
		r.wantSpares(1, 1)
		r.EvictAll()
		_, _, _ = r.encrypt()
		r.up.say(errOther, nil)
		before, _ := r.up.counts()
		for range 100 {
			_, _, _ = r.encrypt(many)
			synctest.Wait()
			time.Sleep(100 * time.Millisecond)
		}
		after, _ := r.up.counts()
		if n := after - before; n < 1 || n > 2 {
			t.Errorf("asked %d times in 10 s", n)
		}
	})
}

// TestSparesRace: many use data keys up while others evict; nothing is used beyond
// its limit.
func TestSparesRace(t *testing.T) {
	r := newRig(t)
	defer r.Close()
	var mu sync.Mutex
	used := map[int]int{}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 300 {
				u, err := r.Encrypt(t.Context(), r.encryption(withSpares(3)))
				if errors.Is(err, cache.ErrOverShare) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				n, _ := u.Origin().(int)
				u.Release()
				mu.Lock()
				used[n]++
				mu.Unlock()
			}
		})
	}
	wg.Go(func() {
		for range 50 {
			r.EvictKey("orders")
			time.Sleep(time.Millisecond)
		}
	})
	wg.Wait()
	for n, times := range used {
		if times > 2 {
			t.Errorf("data key %d encrypted %d messages, want 2 at most", n, times)
		}
	}
}
