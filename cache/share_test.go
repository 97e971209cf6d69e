package cache_test

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

func as(caller string) func(*cache.DecryptRequest) {
	return func(req *cache.DecryptRequest) { req.Caller = caller }
}

// hits uses data keys and tells how many were cached.
func (r *rig) hits(caller string, from, n int) int {
	r.t.Helper()
	before := r.Stats().Hits
	for id := from; id < from+n; id++ {
		f, k, err := r.decrypt(id, as(caller))
		served(r.t, f, k, err)
	}
	return int(r.Stats().Hits - before)
}

// TestFloodsEvictTheirOwn: whatever one caller does, the data keys of another
// that has less stay.
func TestFloodsEvictTheirOwn(t *testing.T) {
	bubble(t, func(r *rig) {
		r.hits("alice", 0, 30)
		r.hits("mallory", 1000, 1000)
		if s := r.Stats(); s.DecryptionKeys != 100 || s.Evictions != 930 {
			t.Errorf("stats = %+v, want 100 data keys after 930 evictions", s)
		}
		if hits := r.hits("alice", 0, 30); hits != 30 {
			t.Errorf("%d of 30 data keys survived another caller's flood", hits)
		}
		if hits := r.hits("mallory", 1930, 70); hits != 70 {
			t.Errorf("%d of the last 70 of the flood are there, want the most recently used", hits)
		}
	})
}

// TestEqualCallers: a full cache is shared evenly, and stays so.
func TestEqualCallers(t *testing.T) {
	bubble(t, func(r *rig) {
		for i := range 300 {
			for c := range 4 {
				f, n, err := r.decrypt(c*1000+i, as(fmt.Sprint(c)))
				served(t, f, n, err)
			}
		}
		for c := range 4 {
			if hits := r.hits(fmt.Sprint(c), c*1000+300-25, 25); hits != 25 {
				t.Errorf("caller %d has %d data keys, want 25", c, hits)
			}
		}
	})
}

// TestLeastRecentlyUsedGoesFirst within a share.
func TestLeastRecentlyUsedGoesFirst(t *testing.T) {
	bubble(t, func(r *rig) {
		r.hits("alice", 0, 3)
		r.hits("alice", 0, 1)
		r.hits("alice", 3, 1)
		if hits := r.hits("alice", 0, 1); hits != 1 {
			t.Error("the data key that was used last is gone")
		}
		if hits := r.hits("alice", 1, 1); hits != 0 {
			t.Error("the data key that was used first is kept")
		}
	}, func(cfg *cache.Config) { cfg.MaxEntries = 3 })
}

// TestOddShares: nobody loses the odd one out to a flood either.
func TestOddShares(t *testing.T) {
	bubble(t, func(r *rig) {
		r.hits("alice", 0, 3)
		r.hits("mallory", 1000, 100)
		if hits := r.hits("alice", 0, 3); hits != 3 {
			t.Errorf("%d of 3 data keys survived", hits)
		}
	}, func(cfg *cache.Config) { cfg.MaxEntries = 5 })
}

// TestANewcomer gets its share from whoever has the most.
func TestANewcomer(t *testing.T) {
	bubble(t, func(r *rig) {
		r.hits("alice", 0, 20)
		r.hits("bob", 1000, 80)
		r.hits("carol", 2000, 30)
		for caller, from := range map[string]int{"alice": 0, "carol": 2000} {
			if hits := r.hits(caller, from, 20); hits != 20 {
				t.Errorf("%s has %d of 20", caller, hits)
			}
		}
	})
}

// TestMoreCallersThanEntries: the newest is served all the same.
func TestMoreCallersThanEntries(t *testing.T) {
	bubble(t, func(r *rig) {
		for i := range 50 {
			r.hits(fmt.Sprint(i), i, 1)
			if hits := r.hits(fmt.Sprint(i), i, 1); hits != 1 {
				t.Errorf("caller %d: %d hits, want 1", i, hits)
			}
		}
		if s := r.Stats(); s.DecryptionKeys != 3 {
			t.Errorf("%d data keys, want 3", s.DecryptionKeys)
		}
	}, func(cfg *cache.Config) { cfg.MaxEntries = 3 })
}

func TestEntriesPerCaller(t *testing.T) {
	for _, limit := range []int{1, 10} {
		bubble(t, func(r *rig) {
			for range 3 {
				r.hits("alice", 0, 30)
				if s := r.Stats(); int(s.DecryptionKeys) != limit {
					t.Errorf("%d data keys, want %d", s.DecryptionKeys, limit)
				}
			}
			r.hits("bob", 1000, 30)
			if s := r.Stats(); int(s.DecryptionKeys) != 2*limit {
				t.Errorf("%d data keys of two callers, want %d", s.DecryptionKeys, 2*limit)
			}
		}, func(cfg *cache.Config) { cfg.MaxEntriesPerCaller = limit })
	}
}

// TestSharedDataKeys: what a caller uses is not lost because another that used
// it first floods its own share.
func TestSharedDataKeys(t *testing.T) {
	bubble(t, func(r *rig) {
		r.hits("mallory", 0, 50)
		r.hits("alice", 0, 10)
		r.hits("mallory", 1000, 1000)
		if hits := r.hits("alice", 0, 10); hits != 10 {
			t.Errorf("%d of 10 shared data keys survived", hits)
		}
	})
}

// TestTakenDataKeys: who uses what another has, and then floods, does not take
// it from the other.
func TestTakenDataKeys(t *testing.T) {
	bubble(t, func(r *rig) {
		r.hits("alice", 0, 40)
		for range 3 {
			r.hits("mallory", 0, 40)
		}
		r.hits("mallory", 1000, 1000)
		if hits := r.hits("alice", 0, 40); hits != 40 {
			t.Errorf("%d of 40 data keys survived their use by another", hits)
		}
	})
}

func TestMisses(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.takes(time.Second)
		var wg sync.WaitGroup
		over := map[string]int{}
		var mu sync.Mutex
		ask := func(caller string, from, n int) {
			for id := from; id < from+n; id++ {
				wg.Go(func() {
					_, _, err := r.decrypt(id, as(caller))
					if err != nil {
						refused(t, err, cache.ErrOverShare)
						mu.Lock()
						over[caller]++
						mu.Unlock()
					}
				})
			}
			synctest.Wait()
		}
		ask("mallory", 0, 20)
		ask("mallory", 0, 4) // joins what is under way
		ask("alice", 100, 3)
		wg.Wait()
		if over["mallory"] < 16 || over["alice"] != 0 {
			t.Errorf("over their share: %v, want 16 or more of mallory's", over)
		}
		r.wantCalls(7, 0)
		clear(over)
		ask("mallory", 500, 4) // the share is free again
		wg.Wait()
		if over["mallory"] != 0 {
			t.Error("misses that ended still count")
		}
	}, func(cfg *cache.Config) { cfg.MaxMisses, cfg.MaxMissesPerCaller = 40, 4 })
}

// TestMissesOfMany: callers that all take what they can leave room for one more.
func TestMissesOfMany(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.takes(time.Second)
		var wg sync.WaitGroup
		for c := range 5 {
			for id := range 40 {
				wg.Go(func() { _, _, _ = r.decrypt(1000*c+id, as(fmt.Sprint(c))) })
			}
			synctest.Wait()
		}
		f, n, err := r.decrypt(9999, as("alice"))
		served(t, f, n, err)
		wg.Wait()
		if fills, _ := r.up.counts(); fills > 40 {
			t.Errorf("%d fills in flight, limit 40", fills)
		}
	}, func(cfg *cache.Config) { cfg.MaxMisses, cfg.MaxMissesPerCaller = 40, 40 })
}

// TestSmallestCache serves any number of callers at once: none is left asking
// again and again because another took its place.
func TestSmallestCache(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.takes(time.Second)
		var wg sync.WaitGroup
		for i := range 64 {
			wg.Go(func() {
				f, n, err := r.decrypt(i, as(fmt.Sprint(i)))
				served(t, f, n, err)
			})
		}
		wg.Wait()
		r.wantCalls(64, 0)
	}, func(cfg *cache.Config) { cfg.MaxEntries, cfg.MaxMisses = 1, 1000 })
}

// TestEvict: by key, by authority, all; while in use.
func TestEvict(t *testing.T) {
	cases := []struct {
		name  string
		evict func(*rig) int
		want  int
	}{
		{"the key", func(r *rig) int { return r.EvictKey("orders") }, 2},
		{"another key", func(r *rig) int { return r.EvictKey("archive") }, 1},
		{"no key", func(r *rig) int { return r.EvictKey("nothing") }, 0},
		{"encryption", func(r *rig) int { return r.EvictAuthority(wraps) }, 2},
		{"decryption", func(r *rig) int { return r.EvictAuthority(unwraps) }, 1},
		{"all", func(r *rig) int { return r.EvictAll() }, 3},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, func(r *rig) {
				f, n, err := r.encrypt(func(req *cache.EncryptRequest) { req.Slot.Key = "archive" })
				served(t, f, n, err)
				inUse, err := r.Encrypt(r.t.Context(), r.encryption())
				if err != nil {
					t.Fatal(err)
				}
				f, n, err = r.decrypt(1)
				served(t, f, n, err)
				if got := tc.evict(r); got != tc.want {
					t.Errorf("evicted %d, want %d", got, tc.want)
				}
				if s := r.Stats(); s.EncryptionKeys+s.DecryptionKeys != uint64(3-tc.want) || s.Evictions != uint64(tc.want) {
					t.Errorf("stats = %+v", s)
				}
				if string(inUse.DataKey()) != string(dataKey(2)) {
					t.Error("a data key in use is gone")
				}
				inUse.Release()
				if got := tc.evict(r); got != 0 {
					t.Errorf("evicted %d again", got)
				}
			})
		})
	}
}

// TestEvictWhileBeingFilled: an answer to a question from before the eviction
// is not kept; whoever waits for it gets a new one.
func TestEvictWhileBeingFilled(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.takes(time.Second)
		var wg sync.WaitGroup
		wg.Go(func() {
			f, n, err := r.encrypt()
			served(t, f, n, err)
			if n != 2 {
				t.Errorf("data key of fill %d, want 2", n)
			}
		})
		synctest.Wait()
		r.EvictKey("orders")
		wg.Wait()
	})
}

// TestNobodyJoinsWhatIsDropped: a question from before an eviction may be one
// to a backend that is not configured any more.
func TestNobodyJoinsWhatIsDropped(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.takes(3 * time.Second)
		var wg sync.WaitGroup
		wg.Go(func() {
			f, n, err := r.encrypt()
			served(t, f, n, err)
		})
		synctest.Wait()
		r.EvictKey("orders")
		r.up.takes(0)
		began := time.Now()
		f, n, err := r.encrypt()
		served(t, f, n, err)
		if waited := time.Since(began); waited != 0 || n != 2 {
			t.Errorf("data key of fill %d after %v, want 2 at once", n, waited)
		}
		wg.Wait()
		if f, n, err = r.encrypt(); n != 2 {
			t.Errorf("data key of fill %d, %v, %v; want 2", n, f, err)
		}
		r.wantCalls(2, 0)
	})
}

// TestMemoryIsBounded: data keys that are evicted while in use hold memory,
// which ends; what is released is there again.
func TestMemoryIsBounded(t *testing.T) {
	bubble(t, func(r *rig) {
		var held []*cache.Use
		var err error
		for i := 0; err == nil; i++ {
			var u *cache.Use
			if u, err = r.Decrypt(r.t.Context(), r.decryption(i)); err == nil {
				held = append(held, u)
			}
			if i > 1_000_000 {
				t.Fatal("there is no end")
			}
		}
		refused(t, err, cache.ErrMemory)
		if len(held) < 1024 {
			t.Errorf("only %d data keys in use", len(held))
		}
		for i, u := range held {
			if string(u.DataKey()) != string(dataKey(i+1)) {
				t.Fatalf("data key %d changed while in use", i)
			}
			u.Release()
		}
		f, n, err := r.decrypt(1_000_000)
		served(t, f, n, err)
	}, func(cfg *cache.Config) { cfg.MaxEntries = 4 })
}

func TestStats(t *testing.T) {
	bubble(t, func(r *rig) {
		for range 3 {
			f, n, err := r.encrypt()
			served(t, f, n, err)
		}
		f, n, err := r.decrypt(1)
		served(t, f, n, err)
		time.Sleep(6 * time.Minute)
		f, n, err = r.decrypt(1)
		served(t, f, n, err)
		got := r.Stats()
		if got.LockedBytes < 32*(100+1024) || got.Memory != "memfd_secret" && got.Memory != "mlock" {
			t.Errorf("memory: %d bytes of %q", got.LockedBytes, got.Memory)
		}
		got.LockedBytes, got.Memory = 0, ""
		want := cache.Stats{
			EncryptionKeys: 1, DecryptionKeys: 1, MaxEntries: 100, Authorities: 2, Hits: 2, Misses: 2, Refreshes: 1,
		}
		if got != want {
			t.Errorf("stats = %+v, want %+v", got, want)
		}
	})
}
