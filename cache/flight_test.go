package cache_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

// given is a Fill that gives this.
func given(material []byte, err error) cache.Fill {
	return func(context.Context) (cache.Material, error) { return cache.Material{DataKey: material}, err }
}

func TestSingleFlight(t *testing.T) {
	for _, say := range []error{nil, errDown, errOther, errNo} {
		bubble(t, func(r *rig) {
			r.up.takes(time.Second)
			r.up.say(say, nil)
			var wg sync.WaitGroup
			for range 50 {
				wg.Go(func() {
					f, _, err := r.decrypt(1)
					if say == nil && (err != nil || f.Source != cache.Upstream) {
						t.Errorf("freshness %v, error %v; want upstream", f, err)
					}
					if say != nil {
						refused(t, err, say)
					}
				})
			}
			wg.Wait()
			if fills, _ := r.up.counts(); fills != 1 {
				t.Errorf("%d fills, want 1", fills)
			}
		})
	}
}

// TestSingleConfirmation: everybody under one authority waits for one call.
func TestSingleConfirmation(t *testing.T) {
	for _, say := range []error{nil, errDown} {
		bubble(t, func(r *rig) {
			for id := range 20 {
				f, n, err := r.decrypt(id)
				served(t, f, n, err)
			}
			time.Sleep(6 * time.Minute)
			r.up.takes(time.Second)
			r.up.say(say, say)
			var wg sync.WaitGroup
			for id := range 20 {
				wg.Go(func() {
					_, _, err := r.decrypt(id)
					refused(t, err, say)
				})
			}
			wg.Wait()
			r.wantCalls(20, 1)
		})
	}
}

// TestCancelledLeader: the caller that began a call is not missed.
func TestCancelledLeader(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.takes(time.Second)
		ctx, cancel := context.WithCancel(r.t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			began := time.Now()
			_, err := r.Encrypt(ctx, r.encryption())
			refused(t, err, context.Canceled)
			if waited := time.Since(began); waited != 100*time.Millisecond {
				t.Errorf("the leader waited %v after it was cancelled", waited)
			}
		})
		synctest.Wait()
		wg.Go(func() {
			f, n, err := r.encrypt()
			served(t, f, n, err)
		})
		time.Sleep(100 * time.Millisecond)
		cancel()
		wg.Wait()
		r.wantCalls(1, 0)
	})
}

// TestAnothersError: what upstream says to the caller that asked first, and
// means that caller only, is not what the others hear.
func TestAnothersError(t *testing.T) {
	slow := func(err error) cache.Fill {
		return func(context.Context) (cache.Material, error) {
			time.Sleep(time.Second)
			return cache.Material{}, err
		}
	}
	for _, tc := range []struct {
		say   error // to mallory
		alice error // what alice hears
		fills int
	}{{errOther, nil, 3}, {errDown, errDown, 0}} {
		bubble(t, func(r *rig) {
			var wg sync.WaitGroup
			wg.Go(func() {
				_, _, err := r.decrypt(1, as("mallory"), func(req *cache.DecryptRequest) { req.Fill = slow(tc.say) })
				refused(t, err, tc.say)
			})
			synctest.Wait()
			for _, caller := range []string{"alice", "alice", "bob"} {
				wg.Go(func() {
					_, _, err := r.decrypt(1, as(caller))
					refused(t, err, tc.alice)
				})
			}
			wg.Wait()
			if fills, _ := r.up.counts(); fills > tc.fills || tc.fills > 0 && fills == 0 {
				t.Errorf("%d fills, want %d at most", fills, tc.fills)
			}
			if s := r.Stats(); tc.alice == nil && s.DecryptionKeys != 1 {
				t.Errorf("%d data keys in one place", s.DecryptionKeys)
			}
		})
	}
}

// TestOwnErrorAfterAnothers: nobody asks for ever.
func TestOwnErrorAfterAnothers(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.takes(time.Second)
		r.up.say(errOther, nil)
		var wg sync.WaitGroup
		for c := range 10 {
			wg.Go(func() {
				_, _, err := r.decrypt(1, as(fmt.Sprint(c)))
				refused(t, err, errOther)
			})
		}
		wg.Wait()
		if fills, _ := r.up.counts(); fills > 10 {
			t.Errorf("%d fills for 10 callers", fills)
		}
	})
}

// TestOwnDeadlines: everybody waits as long as they want to.
func TestOwnDeadlines(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.takes(time.Second)
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() {
				limit := time.Duration(i+1) * 300 * time.Millisecond
				ctx, cancel := context.WithTimeout(r.t.Context(), limit)
				defer cancel()
				began := time.Now()
				u, err := r.Encrypt(ctx, r.encryption())
				want := error(nil)
				if limit < time.Second {
					want = context.DeadlineExceeded
				}
				_, _, err = r.finish(u, err)
				refused(t, err, want)
				if waited := time.Since(began); waited != min(limit, time.Second) {
					t.Errorf("waited %v with a deadline of %v", waited, limit)
				}
			})
		}
		wg.Wait()
		r.wantCalls(1, 0)
	})
}

// TestNobodyWaits: a call that everybody has left goes on, and what it brings
// is there for the next. No message is counted for those who left.
func TestNobodyWaits(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.takes(time.Second)
		once := func(req *cache.EncryptRequest) { req.Limits.MaxMessages = 1 }
		for range 3 {
			ctx, cancel := context.WithTimeout(r.t.Context(), 100*time.Millisecond)
			_, err := r.Encrypt(ctx, r.encryption(once))
			cancel()
			refused(t, err, context.DeadlineExceeded)
		}
		time.Sleep(time.Second)
		f, n, err := r.encrypt(once)
		if f = served(t, f, n, err); f.Source != cache.Cached || n != 1 {
			t.Errorf("source = %v of fill %d, want cached of 1", f.Source, n)
		}
		r.wantCalls(1, 0)
	})
}

// TestTimeout: a call that hangs ends by itself, and the next one is a new one.
func TestTimeout(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.takes(time.Hour)
		began := time.Now()
		_, _, err := r.encrypt()
		refused(t, err, context.DeadlineExceeded)
		if waited := time.Since(began); waited != 3*time.Second {
			t.Errorf("gave up after %v, want ConfirmTimeout", waited)
		}
		r.up.takes(0)
		f, n, err := r.encrypt()
		served(t, f, n, err)
		time.Sleep(6 * time.Minute)
		r.up.takes(time.Hour)
		_, _, err = r.encrypt()
		refused(t, err, context.DeadlineExceeded)
		r.wantCalls(2, 1)
	}, func(cfg *cache.Config) { cfg.ConfirmTimeout = 3 * time.Second })
}

// TestCallsCarryValues: the values of the first caller's context reach
// upstream; its end does not.
func TestCallsCarryValues(t *testing.T) {
	type name struct{}
	bubble(t, func(r *rig) {
		ctx, cancel := context.WithCancel(context.WithValue(r.t.Context(), name{}, "alice"))
		req := r.encryption()
		req.Fill = func(inner context.Context) (cache.Material, error) {
			cancel()
			if got := inner.Value(name{}); got != "alice" {
				t.Errorf("value = %v, want alice", got)
			}
			if err := inner.Err(); err != nil {
				t.Errorf("the call ended with its caller: %v", err)
			}
			if _, ok := inner.Deadline(); !ok {
				t.Error("the call has no deadline")
			}
			return r.up.Fill(inner)
		}
		if u, err := r.Encrypt(ctx, req); err == nil {
			u.Release()
		}
		synctest.Wait()
		if s := r.Stats(); s.EncryptionKeys != 1 {
			t.Errorf("%d data keys, want 1", s.EncryptionKeys)
		}
	})
}

func TestFillClearsMaterial(t *testing.T) {
	for _, say := range []error{nil, errDown, errNo} {
		bubble(t, func(r *rig) {
			material := dataKey(1)
			_, err := r.Encrypt(r.t.Context(), r.encryption(func(req *cache.EncryptRequest) { req.Fill = given(material, say) }))
			refused(t, err, say)
			synctest.Wait()
			wantZero(t, material)
		})
	}
}

func TestClose(t *testing.T) {
	t.Run("in use", func(t *testing.T) {
		bubble(t, func(r *rig) {
			u, err := r.Encrypt(r.t.Context(), r.encryption())
			if err != nil {
				t.Fatal(err)
			}
			r.Close()
			r.Close()
			if string(u.DataKey()) != string(dataKey(1)) {
				t.Error("a data key in use is gone")
			}
			if _, _, err := r.encrypt(); err == nil {
				t.Error("a closed cache serves")
			}
			u.Release()
			u.Release()
			_, _, err = r.decrypt(1)
			refused(t, err, cache.ErrClosed)
			r.Observe(wraps, cache.No, nil, r.Now())
			if s := r.Stats(); s.EncryptionKeys+s.DecryptionKeys != 0 || s.LockedBytes == 0 {
				t.Errorf("stats = %+v", s)
			}
			r.EvictAll()
			r.wantCalls(1, 0)
		})
	})
	t.Run("calls under way", func(t *testing.T) {
		for _, say := range []error{nil, errNo, errDown} {
			bubble(t, func(r *rig) {
				stop := r.run()
				f, n, err := r.encrypt()
				served(t, f, n, err)
				time.Sleep(time.Hour)
				r.up.takes(time.Second)
				r.up.say(say, say)
				var wg sync.WaitGroup
				wg.Go(func() {
					_, _, err := r.encrypt()
					refused(t, err, cache.ErrClosed)
				})
				wg.Go(func() {
					_, _, err := r.decrypt(1)
					refused(t, err, cache.ErrClosed)
				})
				synctest.Wait()
				began := time.Now()
				r.Close()
				if waited := time.Since(began); waited != 0 {
					t.Errorf("Close waited %v for calls that it can cancel", waited)
				}
				wg.Wait()
				stop()
			})
		}
	})
	t.Run("a call that cannot be cancelled", func(t *testing.T) {
		for _, say := range []error{nil, errNo} {
			bubble(t, func(r *rig) {
				r.up.takes(time.Second)
				material := dataKey(1)
				go func() {
					_, err := r.Encrypt(r.t.Context(), r.encryption(func(req *cache.EncryptRequest) {
						req.Fill = func(context.Context) (cache.Material, error) {
							time.Sleep(time.Second)
							return cache.Material{DataKey: material}, say
						}
					}))
					refused(t, err, cache.ErrClosed)
				}()
				synctest.Wait()
				began := time.Now()
				r.Close()
				if waited := time.Since(began); waited != time.Second {
					t.Errorf("Close waited %v, want for the call", waited)
				}
				wantZero(t, material)
				r.wantCalls(0, 0) // a closed cache makes sure of nothing
			})
		}
	})
}
