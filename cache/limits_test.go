package cache_test

import (
	"errors"
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

// TestLimitsOfTime has each limit just reached and just passed: fills counts
// the data keys that were needed for two uses.
func TestLimitsOfTime(t *testing.T) {
	lifetime := func(l *cache.Limits) { l.MaxLifetime, l.MaxAge = time.Hour, math.MaxInt64 }
	idle := func(l *cache.Limits) { l.MaxIdle, l.MaxAge = time.Hour, math.MaxInt64 }
	none := func(l *cache.Limits) { *l = cache.Limits{MaxAge: math.MaxInt64} }
	cases := []struct {
		name             string
		limit            func(*cache.Limits)
		age              time.Duration
		encrypt, decrypt int
	}{
		{"lifetime left", lifetime, time.Hour - 1, 1, 1},
		{"lifetime over", lifetime, time.Hour, 2, 1}, // for encryption only
		{"idle for max_idle", idle, time.Hour, 1, 1},
		{"idle for longer", idle, time.Hour + 1, 2, 2},
		{"no limits", none, 1000 * time.Hour, 1, 1},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, func(r *rig) {
				for i := range 2 {
					f, n, err := r.encrypt(func(req *cache.EncryptRequest) { tc.limit(&req.Limits) })
					served(t, f, n, err)
					time.Sleep(tc.age * time.Duration(1-i))
				}
				r.wantCalls(tc.encrypt, 0)
				for i := range 2 {
					f, n, err := r.decrypt(1, func(req *cache.DecryptRequest) { tc.limit(&req.Limits) })
					served(t, f, n, err)
					time.Sleep(tc.age * time.Duration(1-i))
				}
				r.wantCalls(tc.encrypt+tc.decrypt, 0)
			})
		})
	}
}

// TestUseKeepsAlive: max_idle runs from the last use.
func TestUseKeepsAlive(t *testing.T) {
	bubble(t, func(r *rig) {
		for range 10 {
			f, n, err := r.decrypt(1, func(req *cache.DecryptRequest) { req.Limits.MaxIdle, req.Limits.MaxAge = time.Hour, 1000*time.Hour })
			served(t, f, n, err)
			time.Sleep(time.Hour)
		}
		r.wantCalls(1, 0)
	})
}

// TestSweepDestroys: what is past its limits is destroyed without being asked
// for, in one round of sweeps, and an authority that covers nothing is
// forgotten in the end.
func TestSweepDestroys(t *testing.T) {
	const n = 3000
	bubble(t, func(r *rig) {
		defer r.run()()
		f, k, err := r.encrypt(func(req *cache.EncryptRequest) { req.Limits.MaxIdle = 24 * time.Hour })
		served(t, f, k, err)
		r.encryptAll(n)
		f, k, err = r.decrypt(1, func(req *cache.DecryptRequest) { req.Limits.MaxIdle = 24 * time.Hour })
		served(t, f, k, err)
		time.Sleep(time.Hour)
		if s := r.Stats(); s.EncryptionKeys != n+1 || s.Evictions != 0 {
			t.Errorf("at their limit: %+v, want all of them", s)
		}
		time.Sleep(time.Minute)
		if s := r.Stats(); s.EncryptionKeys != 1 || s.DecryptionKeys != 1 || s.Evictions != 0 {
			t.Errorf("past it: %+v, want one of each direction and no eviction", s)
		}
		time.Sleep(48 * time.Hour)
		if s := r.Stats(); s.EncryptionKeys+s.DecryptionKeys != 0 || s.Authorities != 0 {
			t.Errorf("two days later: %+v, want nothing", s)
		}
	}, func(cfg *cache.Config) { cfg.MaxEntries = n + 2 })
}

// encryptAll fills n slots whose max_idle is one hour.
func (r *rig) encryptAll(n int) {
	for i := range n {
		f, k, err := r.encrypt(func(req *cache.EncryptRequest) {
			req.Slot.Partition, req.Limits.MaxIdle = string(rune(i)), time.Hour
		})
		served(r.t, f, k, err)
	}
}

// TestUnknownAuthoritiesAreForgotten: failed calls leave nothing behind.
func TestUnknownAuthoritiesAreForgotten(t *testing.T) {
	bubble(t, func(r *rig) {
		defer r.run()()
		r.up.say(errDown, errDown)
		for i := range 100 {
			_, _, err := r.decrypt(i, func(req *cache.DecryptRequest) {
				req.Authority.Version, req.Caller = string(rune(i)), string(rune(i))
			})
			refused(t, err, errDown)
		}
		time.Sleep(2 * time.Second)
		if s := r.Stats(); s.Authorities != 0 {
			t.Errorf("%d authorities are remembered, want 0", s.Authorities)
		}
	})
}

// TestForgettingDoesNotLoseAFill: a sweep while a data key of an unknown
// authority is on its way must not part the two.
func TestForgettingDoesNotLoseAFill(t *testing.T) {
	bubble(t, func(r *rig) {
		defer r.run()()
		r.up.takes(5 * time.Second)
		f, n, err := r.decrypt(1)
		served(t, f, n, err)
		r.up.takes(0)
		r.up.say(errNo, errNo)
		r.Observe(unwraps, cache.No, nil, r.Now())
		synctest.Wait()
		if s := r.Stats(); s.DecryptionKeys != 0 {
			t.Errorf("%d data keys outlive the revocation of their authority", s.DecryptionKeys)
		}
		_, _, err = r.decrypt(1)
		refused(t, err, errNo)
	})
}

// TestMessagesAndBytes counts how many uses one data key serves.
func TestMessagesAndBytes(t *testing.T) {
	cases := []struct {
		name     string
		messages uint64
		bytes    uint64
		size     uint64
		want     int
	}{
		{"one message", 1, 0, 100, 1},
		{"three messages", 3, 0, 100, 3},
		{"bytes to the last", 0, 500, 100, 5},
		{"bytes with a rest too small", 0, 599, 100, 5},
		{"one that fills it", 0, 100, 100, 1},
		{"messages first", 2, 500, 100, 2},
		{"empty messages count", 2, 500, 0, 2},
		{"no limits", 0, 0, math.MaxUint64 / 16, 15},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, func(r *rig) {
				counts := map[int]int{}
				for range 3*tc.want + 1 {
					f, n, err := r.encrypt(func(req *cache.EncryptRequest) {
						req.Limits.MaxMessages, req.Limits.MaxBytes, req.Bytes = tc.messages, tc.bytes, tc.size
					})
					served(t, f, n, err)
					counts[n]++
				}
				if counts[1] != tc.want && tc.name != "no limits" || counts[1] < tc.want {
					t.Errorf("the first data key served %d messages, want %d", counts[1], tc.want)
				}
			})
		})
	}
}

func TestMessageLargerThanADataKey(t *testing.T) {
	bubble(t, func(r *rig) {
		_, _, err := r.encrypt(func(req *cache.EncryptRequest) { req.Limits.MaxBytes = 99 })
		refused(t, err, cache.ErrTooLarge)
		r.wantCalls(0, 0)
	})
}

// TestLargeMessageInAnOutage: one that the data key has no room for does not
// take it from the small ones.
func TestLargeMessageInAnOutage(t *testing.T) {
	bubble(t, func(r *rig) {
		small := func(req *cache.EncryptRequest) { req.Limits.MaxBytes = 1000 }
		large := func(req *cache.EncryptRequest) { req.Limits.MaxBytes, req.Bytes = 1000, 1000 }
		f, n, err := r.encrypt(small)
		served(t, f, n, err)
		r.up.say(errDown, errDown)
		_, _, err = r.encrypt(large)
		refused(t, err, errDown)
		f, n, err = r.encrypt(small)
		served(t, f, n, err)
		r.up.say(nil, nil)
		f, n, err = r.encrypt(large)
		served(t, f, n, err)
		if s := r.Stats(); s.EncryptionKeys != 1 {
			t.Errorf("%d data keys stand in one slot", s.EncryptionKeys)
		}
	})
}

// TestGiveBack: what is given back may be used again, no more than was
// reserved, and once.
func TestGiveBack(t *testing.T) {
	bubble(t, func(r *rig) {
		take := func(bytes uint64, reserve bool, wantFill int) *cache.Use {
			t.Helper()
			u, err := r.Encrypt(r.t.Context(), r.encryption(func(req *cache.EncryptRequest) {
				req.Limits.MaxBytes, req.Bytes, req.Reserve = 1000, bytes, reserve
			}))
			if err != nil {
				t.Fatal(err)
			}
			defer u.Release()
			if u.Origin() != wantFill {
				t.Errorf("data key of fill %v, want %d", u.Origin(), wantFill)
			}
			return u
		}
		first := take(400, true, 1)
		second := take(600, true, 1)
		r.GiveBack(second, 500)
		r.GiveBack(second, 100) // it has ended
		take(500, false, 1)
		r.GiveBack(first, 1<<63) // 400 at most
		plain := take(400, false, 1)
		r.GiveBack(plain, 400) // nothing was reserved
		third := take(1, true, 2)
		take(999, false, 2)
		fourth := take(1, true, 3)
		r.GiveBack(third, 1) // of a data key that is gone
		r.GiveBack(fourth, 0)
		take(999, false, 3)
		take(1, false, 4)
	})
}

// TestReservedInAnOutage: a reservation keeps the data key from others as long
// as it lasts, and does not destroy it.
func TestReservedInAnOutage(t *testing.T) {
	bubble(t, func(r *rig) {
		defer r.run()()
		whole := func(req *cache.EncryptRequest) { req.Limits.MaxBytes, req.Bytes, req.Reserve = 1000, 1000, true }
		small := func(req *cache.EncryptRequest) { req.Limits.MaxBytes = 1000 }
		u, err := r.Encrypt(r.t.Context(), r.encryption(whole))
		if err != nil {
			t.Fatal(err)
		}
		defer u.Release()
		r.up.say(errDown, errDown)
		_, _, err = r.encrypt(small)
		refused(t, err, errDown)
		time.Sleep(3 * time.Second)
		r.GiveBack(u, 900)
		f, n, err := r.encrypt(small)
		served(t, f, n, err)
		if n != 1 {
			t.Errorf("data key of fill %d, want 1", n)
		}
	})
}

// TestSpentDataKeysAreDestroyed: one that may encrypt nothing more does not
// wait for the next message to go.
func TestSpentDataKeysAreDestroyed(t *testing.T) {
	for _, limit := range []cache.Limits{{MaxMessages: 1}, {MaxBytes: 100}} {
		bubble(t, func(r *rig) {
			defer r.run()()
			f, n, err := r.encrypt(func(req *cache.EncryptRequest) {
				req.Limits.MaxMessages, req.Limits.MaxBytes = limit.MaxMessages, limit.MaxBytes
			})
			served(t, f, n, err)
			time.Sleep(2 * time.Second)
			if s := r.Stats(); s.EncryptionKeys != 0 {
				t.Errorf("%+v: a spent data key is kept", limit)
			}
		})
	}
}

// TestLimitsUnderConcurrency: no data key serves one message or one byte more,
// however many ask for it at once, and all are served.
func TestLimitsUnderConcurrency(t *testing.T) {
	for _, tc := range []struct{ messages, bytes uint64 }{{7, 0}, {0, 700}, {1, 0}, {1000, 99 * 100}} {
		bubble(t, func(r *rig) {
			const callers, each = 40, 10
			r.up.takes(time.Millisecond)
			var mu sync.Mutex
			uses := map[int]uint64{}
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					for range each {
						_, n, err := r.encrypt(func(req *cache.EncryptRequest) {
							req.Limits.MaxMessages, req.Limits.MaxBytes = tc.messages, tc.bytes
						})
						if err != nil {
							t.Errorf("refused: %v", err)
							return
						}
						mu.Lock()
						uses[n]++
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			most := tc.messages
			if tc.bytes != 0 && tc.bytes/100 < most || most == 0 {
				most = tc.bytes / 100
			}
			var total uint64
			for n, count := range uses {
				total += count
				if count > most {
					t.Errorf("data key %d served %d messages, limit %d", n, count, most)
				}
			}
			if total != callers*each {
				t.Errorf("%d served, want %d", total, callers*each)
			}
		})
	}
}

// TestNewLimitsApplyAtOnce: a reload that makes limits smaller is obeyed by
// the data keys that are there.
func TestNewLimitsApplyAtOnce(t *testing.T) {
	cases := map[string]func(*cache.Limits){
		"lifetime": func(l *cache.Limits) { l.MaxLifetime = time.Minute },
		"idle":     func(l *cache.Limits) { l.MaxIdle = 30 * time.Second },
		"messages": func(l *cache.Limits) { l.MaxMessages = 1 },
		"bytes":    func(l *cache.Limits) { l.MaxBytes = 150 },
	}
	for name, change := range cases {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(r *rig) {
				f, n, err := r.encrypt()
				served(t, f, n, err)
				time.Sleep(time.Minute)
				f, n, err = r.encrypt(func(req *cache.EncryptRequest) { change(&req.Limits) })
				served(t, f, n, err)
				r.wantCalls(2, 0)
			})
		})
	}
}

func TestWrongLength(t *testing.T) {
	for _, size := range []int{0, 16, 31, 33, 64} {
		bubble(t, func(r *rig) {
			material := make([]byte, size)
			for i := range material {
				material[i] = 7
			}
			_, _, err := r.decrypt(1, func(req *cache.DecryptRequest) {
				req.Fill = func() cache.Fill { return given(material, nil) }()
			})
			if err == nil || errors.Is(err, cache.ErrMemory) {
				t.Errorf("%d bytes: error = %v", size, err)
			}
			synctest.Wait()
			wantZero(t, material)
			if _, ok := r.Confirmed(unwraps); ok {
				t.Errorf("%d bytes count as a confirmation", size)
			}
			if s := r.Stats(); s.DecryptionKeys != 0 {
				t.Errorf("%d bytes are cached", size)
			}
		})
	}
}

func wantZero(t *testing.T, b []byte) {
	t.Helper()
	for _, x := range b {
		if x != 0 {
			t.Errorf("not cleared: %x", b)
			return
		}
	}
}
