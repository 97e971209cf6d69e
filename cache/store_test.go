package cache_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

// TestRestartInAnOutage: who starts while upstream does not answer serves what its grace
// allows, to the nanosecond, however the process before ended, and across boots.
func TestRestartInAnOutage(t *testing.T) {
	for name, end := range map[string]func(*machine){
		"crash": (*machine).crash, "end": (*machine).stop,
		"crash and reboot": func(m *machine) { m.crash(); m.reboot() },
		"end and reboot":   func(m *machine) { m.stop(); m.reboot() },
	} {
		t.Run(name, func(t *testing.T) {
			directions(t, func(m *machine, a cache.Authority, use func() (cache.Freshness, int, error)) {
				m.start()
				_, first, err := use()
				if err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				m.saved()
				age, _ := m.last.Confirmed(a)
				confirmed := time.Now().Add(-age)
				m.up.say(errDown, errDown)
				end(m)
				time.Sleep(time.Until(confirmed.Add(5*time.Minute + grace - 1)))
				r := m.start()
				f, got, err := use()
				r.wantSource("just before the end", f, err, cache.Grace)
				if f.GraceLeft != 1 || f.Age != 5*time.Minute+grace-1 {
					t.Errorf("freshness %+v, want the last nanosecond of grace", f)
				}
				if a == unwraps && got != first {
					t.Errorf("data key of fill %d, want %d", got, first)
				}
				m.crash()
				time.Sleep(time.Nanosecond)
				m.start()
				f, _, err = use()
				m.last.wantRefused("when grace is over", f, err, errDown)
			})
		})
	}
}

// TestRestartContinuesTheOutage: the clock of an outage goes on, so that starting again
// adds no time.
func TestRestartContinuesTheOutage(t *testing.T) {
	directions(t, func(m *machine, a cache.Authority, use func() (cache.Freshness, int, error)) {
		r := m.start()
		_, _, _ = use()
		synctest.Wait()
		m.saved()
		m.up.say(errDown, errDown)
		began := time.Now()
		_ = r.Recheck(a)
		_, err := r.Renew(m.t.Context(), a, lasting(), stale(0)) // the first failed call, long before max_age
		if err == nil {
			t.Fatal("confirmed in an outage")
		}
		m.saved()
		for i := range 4 {
			m.crash()
			if i%2 == 1 {
				m.reboot()
			}
			time.Sleep(10 * time.Minute)
			m.start()
			synctest.Wait()
		}
		time.Sleep(time.Until(began.Add(grace - 1)))
		f, _, err := use()
		m.last.wantSource("at the end", f, err, cache.Grace)
		if f.GraceLeft != 1 {
			t.Errorf("grace left %v, want 1ns: an hour from the first failed call", f.GraceLeft)
		}
		time.Sleep(time.Nanosecond)
		m.crash()
		m.start()
		f, _, err = use()
		m.last.wantRefused("after it", f, err, errDown)
		m.up.say(nil, nil)
		f, _, err = use()
		m.last.wantSource("back", f, err, cache.Upstream)
	})
}

// TestNoThenRestart: what upstream said no to is refused after a crash in the moment in
// which somebody was told so, and until a later yes.
func TestNoThenRestart(t *testing.T) {
	directions(t, func(m *machine, a cache.Authority, use func() (cache.Freshness, int, error)) {
		r := m.start()
		_, _, _ = use()
		synctest.Wait()
		m.saved()
		m.up.say(errDown, errDown)
		time.Sleep(6 * time.Minute)
		if f, _, err := use(); err != nil {
			t.Fatal(f, err) // in the middle of grace
		}
		m.up.say(errNo, errNo)
		r.Observe(a, cache.No, m.Now())
		synctest.Wait()
		refused(t, r.Recheck(a), cache.ErrRevoked)
		m.crash()
		m.up.say(errDown, errDown)
		for range 2 {
			r = m.start()
			if m.restored.DataKeys+m.restored.Spares != 0 || m.restored.Refused != 1 {
				t.Errorf("restored %+v, want a tombstone and no data key", m.restored)
			}
			refused(t, r.Recheck(a), cache.ErrRevoked)
			f, _, err := use()
			r.wantRefused("in the outage", f, err, cache.ErrRevoked)
			time.Sleep(2 * time.Hour) // nobody asks: it is not forgotten either
			m.saved()
			m.crash()
			m.reboot()
		}
		m.start()
		m.up.say(nil, nil)
		time.Sleep(2 * time.Second)
		f, _, err := use()
		m.last.wantSource("after a yes", f, err, cache.Upstream)
		m.saved()
		m.crash()
		r = m.start()
		if err := r.Recheck(a); err != nil {
			t.Errorf("after a restart after the yes: %v", err)
		}
	})
}

// TestSuspendedThenRestart: a no that nobody has made sure of yet is not forgotten.
func TestSuspendedThenRestart(t *testing.T) {
	directions(t, func(m *machine, a cache.Authority, use func() (cache.Freshness, int, error)) {
		r := m.start()
		_, _, _ = use()
		synctest.Wait()
		m.saved()
		m.up.say(errDown, errDown)
		r.Observe(a, cache.No, m.Now())
		m.saved()
		m.crash()
		r = m.start()
		refused(t, r.Recheck(a), cache.ErrSuspended)
		f, _, err := use()
		r.wantRefused("suspended", f, err, cache.ErrSuspended)
		m.up.say(nil, nil)
		stop := r.run()
		time.Sleep(20 * time.Second)
		stop()
		if f, _, err = use(); err != nil {
			t.Errorf("after a yes: %v, %v", f, err)
		}
	})
}

// TestEvictedIsGoneFromDisk, with what Flush promises.
func TestEvictedIsGoneFromDisk(t *testing.T) {
	for name, evict := range map[string]func(*rig){
		"key":     func(r *rig) { r.EvictKey("orders") },
		"version": func(r *rig) { r.EvictAuthority(wraps); r.EvictAuthority(unwraps) },
		"all":     func(r *rig) { r.EvictAll() },
		"opt-out": func(r *rig) { r.Unstore("orders") },
	} {
		t.Run(name, func(t *testing.T) {
			directions(t, func(m *machine, _ cache.Authority, use func() (cache.Freshness, int, error)) {
				r := m.start()
				_, _, _ = use()
				synctest.Wait()
				m.saved()
				evict(r)
				if err := r.Flush(m.t.Context()); err != nil {
					t.Fatalf("Flush: %v", err)
				}
				m.crash()
				m.start()
				if n := m.restored.DataKeys + m.restored.Spares; n != 0 {
					t.Errorf("%d data keys are on disk after the eviction", n)
				}
			})
		})
	}
	onMachine(t, func(m *machine) {
		r := m.start()
		_, _, _ = r.encrypt(stored)
		m.saved()
		m.sealer.(*sealer).broken = errors.New("unplugged")
		r.EvictAll()
		if err := r.Flush(m.t.Context()); err == nil {
			t.Error("Flush says that the store was written")
		}
	})
}

// TestClockBehind: when nobody knows how long the host was off, nothing serves that
// upstream has not confirmed since.
func TestClockBehind(t *testing.T) {
	directions(t, func(m *machine, a cache.Authority, use func() (cache.Freshness, int, error)) {
		m.start()
		_, first, _ := use()
		synctest.Wait()
		m.saved()
		m.crash()
		m.reboot()
		m.skew = -time.Hour
		m.up.say(errDown, errDown)
		r := m.start()
		if !m.restored.ClockBehind {
			t.Errorf("restored %+v, want a clock that is behind", m.restored)
		}
		f, _, err := use()
		r.wantRefused("with a clock set back", f, err, errDown)
		m.up.say(nil, nil)
		f, n, err := use()
		r.wantSource("confirmed", f, err, cache.Upstream)
		if a == unwraps && n != first {
			t.Errorf("data key %d, want that of the store (%d)", n, first)
		}
		// The mark stays: another start with that clock knows no more.
		m.saved()
		m.crash()
		m.reboot()
		m.up.say(errDown, errDown)
		m.start()
		f, _, err = use()
		m.last.wantRefused("again", f, err, errDown)
		// In the same boot the boot clock tells, whatever the time of day.
		m.up.say(nil, nil)
		_, _, _ = use()
		m.saved()
		m.crash()
		m.up.say(errDown, errDown)
		m.skew = -24 * time.Hour
		m.start()
		f, _, err = use()
		m.last.wantSource("in the same boot", f, err, cache.Cached)
	})
}

// TestOldStoreAcrossBoots: time that the host was off counts.
func TestOldStoreAcrossBoots(t *testing.T) {
	onMachine(t, func(m *machine) {
		r := m.start()
		_, _, _ = r.encrypt(stored)
		_, _, _ = r.decrypt(1, stored2)
		m.stop()
		time.Sleep(6*time.Hour + time.Minute)
		m.reboot()
		m.start()
		if m.restored.Age != 6*time.Hour+time.Minute || m.restored.DataKeys != 0 || m.restored.Dropped != 2 {
			t.Errorf("restored %+v, want both dropped: idle for longer than max_idle", m.restored)
		}
	})
}

// TestRestoreFitsTheConfiguration: what belongs to another key now, or to none, stays out.
func TestRestoreFitsTheConfiguration(t *testing.T) {
	for name, accept := range map[string]cache.Accept{
		"gone":    func(cache.Authority) (string, cache.Limits, bool) { return "", cache.Limits{}, false },
		"renamed": func(cache.Authority) (string, cache.Limits, bool) { return "archive", lasting(), true },
		"opt-out": func(cache.Authority) (string, cache.Limits, bool) { return "orders", limits(), true },
	} {
		t.Run(name, func(t *testing.T) {
			directions(t, func(m *machine, _ cache.Authority, use func() (cache.Freshness, int, error)) {
				m.start()
				_, _, _ = use()
				synctest.Wait()
				m.stop()
				m.accept = accept
				m.start()
				if m.restored.DataKeys+m.restored.Spares != 0 || m.restored.Dropped == 0 {
					t.Errorf("restored %+v, want everything dropped", m.restored)
				}
			})
		})
	}
}

// TestNotesComeBack, from when they were.
func TestNotesComeBack(t *testing.T) {
	onMachine(t, func(m *machine) {
		m.notes = []cache.Note{{Value: []byte("version 1"), At: m.Now() - time.Minute}}
		r := m.start()
		_, _, _ = r.encrypt(stored)
		m.stop()
		time.Sleep(time.Hour)
		m.reboot()
		m.start()
		if len(m.noted) != 1 || string(m.noted[0].Value) != "version 1" || m.Now()-m.noted[0].At != time.Hour+time.Minute {
			t.Errorf("notes %v now %v, want one of an hour and a minute ago", m.noted, m.Now())
		}
	})
}

// TestNotStored: nothing of who has not asked for it is on disk.
func TestNotStored(t *testing.T) {
	onMachine(t, func(m *machine) {
		r := m.start()
		_, _, _ = r.encrypt()
		_, _, _ = r.decrypt(1)
		m.stop()
		m.start()
		if m.restored != (cache.Restored{Age: m.restored.Age}) {
			t.Errorf("restored %+v, want nothing", m.restored)
		}
	})
}
