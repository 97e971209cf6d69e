package cache_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

// What is noted between the collection of the notes and the snapshot is saved by the next
// save, which comes by itself.
func TestNotesThatChangeInASave(t *testing.T) {
	onMachine(t, func(m *machine) {
		m.every = 10 * time.Second
		note, calls := "allowed", 0
		var r *rig
		r = m.start(func(c *cache.Config) {
			c.Store.Notes = func() []cache.Note {
				calls++
				got := []cache.Note{{Value: []byte(note)}}
				if note == "allowed" && calls > 1 && calls%2 == 1 {
					note = "refused" // another goroutine's, at this moment
					done := make(chan struct{})
					go func() { defer close(done); r.NotesChanged(true) }()
					<-done
				}
				return got
			}
		})
		defer r.run()()
		r.NotesChanged(true)
		time.Sleep(30 * time.Second)
		synctest.Wait()
		r.NotesChanged(false)
		time.Sleep(30 * time.Second)
		synctest.Wait()
		t.Logf("note %q after %d calls", note, calls)
		time.Sleep(time.Hour) // nothing else happens
		synctest.Wait()
		before := calls
		m.crash()
		m.start()
		if len(m.noted) != 1 || string(m.noted[0].Value) != "refused" {
			t.Errorf("restored %q (%d calls), an hour after it was refused", m.noted, before)
		}
	})
}
