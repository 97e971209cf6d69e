package cache_test

import (
	"errors"
	"strings"
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
		r.Observe(a, cache.No, nil, m.Now())
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

// TestRevokedAgain: that what is revoked is refused once more is no news for the disk, which
// may have been made for few writes.
func TestRevokedAgain(t *testing.T) {
	directions(t, func(m *machine, a cache.Authority, use func() (cache.Freshness, int, error)) {
		r := m.start()
		_, _, _ = use()
		synctest.Wait()
		m.saved()
		m.up.say(errNo, errNo)
		r.Observe(a, cache.No, errNo, m.Now())
		time.Sleep(time.Minute)
		before := m.sealer.advances()
		for range 10 {
			r.Revisit(a)
			time.Sleep(time.Minute)
			refused(t, r.Recheck(a), cache.ErrRevoked)
		}
		if n := m.sealer.advances() - before; n != 0 {
			t.Errorf("saved %d times", n)
		}
	})
}

// TestToldWhenOnDisk: who waits for the answer that revokes is told when a crash cannot
// undo it any more.
func TestToldWhenOnDisk(t *testing.T) {
	directions(t, func(m *machine, a cache.Authority, use func() (cache.Freshness, int, error)) {
		r := m.start()
		_, _, _ = use()
		synctest.Wait()
		m.saved()
		m.up.say(errNo, errNo)
		m.up.takes(time.Second)
		m.sealer.takes(5 * time.Second)
		before := m.sealer.advances()
		r.Observe(a, cache.No, nil, m.Now())
		time.Sleep(time.Second / 2)
		_, _, err := use()
		refused(t, err, errNo)
		if n := m.sealer.advances(); n != before+1 || !errors.Is(r.Recheck(a), cache.ErrRevoked) {
			t.Errorf("told with the counter at %d, want %d (%v)", n, before+1, r.Recheck(a))
		}
		time.Sleep(time.Minute) // no save is under way
	})
}

// TestSuspendedThenRestart: a no that nobody has made sure of yet is not forgotten.
func TestSuspendedThenRestart(t *testing.T) {
	directions(t, func(m *machine, a cache.Authority, use func() (cache.Freshness, int, error)) {
		r := m.start()
		_, _, _ = use()
		synctest.Wait()
		m.saved()
		m.up.takes(8 * time.Second)
		r.Observe(a, cache.No, errNo, m.Now())
		stop := r.run()
		time.Sleep(3 * time.Second) // nobody has made sure yet
		stop()
		m.crash()
		m.up.takes(0)
		m.up.say(errDown, errDown)
		r = m.start()
		r.Observe(a, cache.No, nil, m.Now()) // which does not say why
		refused(t, r.Recheck(a), cache.ErrSuspended)
		if err := r.Recheck(a); !strings.Contains(err.Error(), errNo.Error()) {
			t.Errorf("after a restart: %v, want that it says %q", err, errNo)
		}
		f, _, err := use()
		r.wantRefused("suspended", f, err, cache.ErrSuspended)
		m.up.say(nil, nil)
		stop = r.run()
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
		m.sealer.breaks(errUnplugged, unwritten)
		r.EvictAll()
		if err := r.Flush(m.t.Context()); err == nil {
			t.Error("Flush says that the store was written")
		}
	})
}

// TestEndIsNoOutage: a call that the end of the process cuts short says nothing of
// upstream.
func TestEndIsNoOutage(t *testing.T) {
	directions(t, func(m *machine, a cache.Authority, use func() (cache.Freshness, int, error)) {
		r := m.start()
		_, _, _ = use()
		synctest.Wait()
		time.Sleep(time.Minute)
		m.up.takes(5 * time.Second)
		done := make(chan error)
		go func() {
			_, err := r.Renew(m.t.Context(), a, lasting(), stale(0))
			done <- err
		}()
		time.Sleep(time.Second)
		go m.stop()
		if err := <-done; err == nil {
			t.Error("confirmed")
		}
		synctest.Wait()
		m.start()
		if m.restored.Down != 0 || m.restored.DataKeys == 0 {
			t.Errorf("restored %+v, want no outage", m.restored)
		}
	})
}

// TestNothingIsSavedBeforeRestore: a process that ends before it has looked leaves what
// is there.
func TestNothingIsSavedBeforeRestore(t *testing.T) {
	onMachine(t, func(m *machine) {
		r := m.start()
		_, _, _ = r.encrypt(stored)
		m.stop()
		m.blank = true
		r = m.start()
		_, _, _ = r.decrypt(7, stored2)
		r.EvictAll()
		stop := r.run()
		time.Sleep(time.Minute)
		stop()
		m.stop()
		m.blank = false
		m.start()
		if m.restored.DataKeys != 1 {
			t.Errorf("restored %+v, want the data key of the first process", m.restored)
		}
	})
}

// TestSpareInUseIsNoSpareAfterACrash: its lifetime has begun.
func TestSpareInUseIsNoSpareAfterACrash(t *testing.T) {
	onMachine(t, func(m *machine) {
		r := m.start()
		_, _, _ = r.encrypt(few)
		synctest.Wait()
		m.saved()
		m.up.takes(9 * time.Second) // there is no other spare yet
		for n := 1; n == 1; {
			_, n, _ = r.encrypt(few)
		}
		stop := r.run()
		time.Sleep(3 * time.Second)
		stop()
		m.crash()
		m.start()
		if m.restored.Spares != 0 || m.restored.DataKeys != 1 {
			t.Errorf("restored %+v, want the spare in use", m.restored)
		}
	})
}
