package cache_test

import (
	"errors"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

var errUnplugged = errors.New("unplugged")

// few are limits that are soon used up.
func few(r *cache.EncryptRequest) {
	r.Limits = lasting()
	r.Limits.MaxMessages, r.Limits.MaxBytes, r.Limits.Spares = 200, 20_000, 1
}

// usage counts what each data key, by the number of its fill, was used for.
type usage map[int]*struct{ messages, bytes, lives uint64 }

func (u usage) count(n int, bytes uint64) {
	if u[n] == nil {
		u[n] = &struct{ messages, bytes, lives uint64 }{}
	}
	u[n].messages++
	u[n].bytes += bytes
}

// TestLimitsAcrossCrashes: wherever a process ends, and whatever the sealer does, no data
// key is used for more than its limits, counted over all its lives.
func TestLimitsAcrossCrashes(t *testing.T) {
	onMachine(t, func(m *machine) {
		m.accept = func(cache.Authority) (string, cache.Limits, bool) {
			var r cache.EncryptRequest
			few(&r)
			return "orders", r.Limits, true
		}
		chance := rand.New(rand.NewPCG(7, 7))
		used := usage{}
		for range 150 {
			m.live(chance, used)
		}
		lived := 0
		for n, u := range used {
			if u.messages > 200 || u.bytes > 20_000 {
				t.Errorf("data key %d: %d messages, %d bytes; its limits are 200 and 20000", n, u.messages, u.bytes)
			}
			if u.lives > 1 {
				lived++
			}
		}
		if lived < 20 {
			t.Errorf("only %d of %d data keys were used in several processes: the test shows nothing", lived, len(used))
		}
	})
}

// live is one process: it encrypts for a while, perhaps with a sealer that fails, and ends
// somehow.
func (m *machine) live(chance *rand.Rand, used usage) {
	m.start()
	r := m.last
	stop := r.run()
	seen := map[int]bool{}
	for range chance.IntN(12) {
		m.sealer.breaks([]error{nil, nil, errUnplugged}[chance.IntN(3)], stage(chance.IntN(3)))
		for range chance.IntN(40) {
			bytes := uint64(chance.IntN(100))
			kept := uint64(chance.IntN(int(bytes) + 1))
			stream := chance.IntN(4) == 0
			u, err := r.Encrypt(m.t.Context(), r.encryption(few, func(q *cache.EncryptRequest) { q.Bytes, q.Reserve = bytes, stream }))
			if err != nil {
				m.t.Fatalf("encrypt: %v", err)
			}
			n, _ := u.Origin().(int)
			if stream && chance.IntN(2) == 0 {
				r.GiveBack(u, bytes-kept)
				bytes = kept
			}
			u.Release()
			used.count(n, bytes)
			if !seen[n] {
				seen[n] = true
				used[n].lives++
			}
		}
		time.Sleep(time.Duration(chance.Int64N(int64(8 * time.Second))))
	}
	stop()
	if chance.IntN(4) == 0 {
		m.stop()
	} else {
		m.crash()
	}
	m.sealer.breaks(nil, 0)
	if chance.IntN(5) == 0 {
		m.reboot()
	}
}

// TestOrderlyEndGivesBack what was reserved and not used: a data key reaches its limit
// exactly, through any number of restarts.
func TestOrderlyEndGivesBack(t *testing.T) {
	onMachine(t, func(m *machine) {
		limit := func(q *cache.EncryptRequest) { q.Limits = lasting(); q.Limits.MaxMessages = 200 }
		used := usage{}
		for range 20 {
			r := m.start()
			if synctest.Wait(); m.restored.DataKeys > 0 && r.StoreStats().Saves == 0 {
				t.Error("nothing is reserved before the first request")
			}
			for range 10 {
				_, n, err := r.encrypt(limit)
				if err != nil {
					t.Fatal(err)
				}
				used.count(n, 100)
			}
			m.stop()
		}
		if used[1].messages != 200 || len(used) != 1 {
			t.Errorf("%d messages under the first data key of %d, want 200 of one", used[1].messages, len(used))
		}
		m.start()
		if _, n, err := m.last.encrypt(limit); err != nil || n != 2 {
			t.Errorf("message 201 under data key %d, %v; want another", n, err)
		}
	})
}

// TestStoreThatCannotBeWritten: a stored data key is used as far as disk says, and not
// for one message more; who comes then gets another, which only the process knows.
func TestStoreThatCannotBeWritten(t *testing.T) {
	for name, at := range map[string]stage{"not written": unwritten, "not counted": uncounted, "counted": counted} {
		t.Run(name, func(t *testing.T) {
			onMachine(t, func(m *machine) {
				r := m.start()
				_, _, _ = r.encrypt(few)
				m.saved()
				m.sealer.breaks(errUnplugged, at)
				used := usage{1: {messages: 1, bytes: 100}}
				for range 500 {
					f, n, err := r.encrypt(few)
					if err != nil {
						t.Fatal(f, err)
					}
					used.count(n, 100)
				}
				if used[1].messages < 2 || used[1].messages >= 100 {
					t.Errorf("%d messages under the first data key, want what was reserved", used[1].messages)
				}
				if r.StoreStats().Err == nil {
					t.Error("nobody is told")
				}
				m.crash()
				m.sealer.breaks(nil, 0)
				r = m.start()
				for n := 1; n == 1; {
					var err error
					if _, n, err = r.encrypt(few); err != nil {
						t.Fatal(err)
					}
					used.count(n, 100)
				}
				if used[1].messages > 200 || used[1].bytes > 20_000 {
					t.Errorf("the first data key was used for %+v, more than its limits", used[1])
				}
			})
		})
	}
	// In an outage there is no other, and so no answer.
	onMachine(t, func(m *machine) {
		none := func(q *cache.EncryptRequest) { few(q); q.Limits.Spares = 0 }
		r := m.start()
		_, _, _ = r.encrypt(none)
		m.saved()
		m.sealer.breaks(errUnplugged, unwritten)
		m.up.say(errDown, errDown)
		served := 0
		var err error
		for ; err == nil; served++ {
			_, _, err = r.encrypt(none)
		}
		if served < 2 || served > 100 {
			t.Errorf("%d messages were served, want what was reserved", served)
		}
		refused(t, err, errDown)
		m.sealer.breaks(nil, 0)
		time.Sleep(time.Minute)
		if _, n, err := r.encrypt(none); err != nil || n != 1 {
			t.Errorf("when the store can be written again: data key %d, %v", n, err)
		}
	})
}

// TestReservedAhead: who encrypts never waits for the disk while it keeps up.
func TestReservedAhead(t *testing.T) {
	onMachine(t, func(m *machine) {
		r := m.start()
		big := func(q *cache.EncryptRequest) { q.Limits = lasting() } // a million messages: blocks of 1024
		_, _, _ = r.encrypt(big)
		m.saved()
		for i := range 100_000 {
			if i%100 == 0 {
				synctest.Wait() // the disk keeps up
			}
			before := r.Stats().Hits
			if _, _, err := r.encrypt(big); err != nil {
				t.Fatal(err)
			}
			if r.Stats().Hits != before+1 {
				t.Fatalf("message %d waited for the disk", i)
			}
		}
		if n := r.StoreStats().Saves; n < 5 || n > 20 {
			t.Errorf("%d saves for 100000 messages, want some: each reserves as many as were used", n)
		}
	})
}

// TestWear: a sealer that wears is not worn out by callers who use up many data keys.
func TestWear(t *testing.T) {
	onMachine(t, func(m *machine) {
		m.every, m.wears = 10*time.Minute, true
		r := m.start()
		stop := r.run()
		began := time.Now()
		for time.Since(began) < 6*time.Hour {
			for range 50 {
				if _, _, err := r.encrypt(few); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(5 * time.Second)
		}
		stop()
		// 36 saves at intervals, and the credit: one a minute.
		if n := m.sealer.advances(); n > 36+6*60+50 {
			t.Errorf("the counter was moved %d times in six hours", n)
		}
	})
	// A revocation does not wait for credit.
	onMachine(t, func(m *machine) {
		m.every, m.wears = 10*time.Minute, true
		r := m.start()
		_, _, _ = r.encrypt(stored)
		m.saved()
		before := m.sealer.advances()
		m.up.say(errNo, errNo)
		r.Observe(wraps, cache.No, nil, m.Now())
		synctest.Wait()
		if n := m.sealer.advances(); n != before+1 {
			t.Errorf("the counter moved by %d, want 1 at once", n-before)
		}
	})
}
