package cache_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

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
		if a == wraps && (m.restored.Dropped != 1 || m.restored.DataKeys != 0) {
			t.Errorf("restored %+v, want no data key that has encrypted for nobody knows how long", m.restored)
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
