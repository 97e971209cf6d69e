package cache_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

// held asks for a data key as the agent itself does, to have it ready.
func held(q *cache.DecryptRequest) { q.Caller, q.Hold = "", true }

// TestHeldDataKeysStay: no caller's flood takes them, nor does their own number count
// against anybody.
func TestHeldDataKeysStay(t *testing.T) {
	bubble(t, func(r *rig) {
		for id := range 10 {
			if _, _, err := r.decrypt(id, held); err != nil {
				t.Fatal(err)
			}
		}
		for id := range 500 {
			flood := func(q *cache.DecryptRequest) { q.Caller = fmt.Sprint("caller", id%3) }
			if _, _, err := r.decrypt(1000+id, flood); err != nil {
				t.Fatal(err)
			}
		}
		r.up.say(errDown, errDown)
		for id := range 10 {
			f, _, err := r.decrypt(id, graceful2)
			r.wantSource(fmt.Sprint("held ", id), f, err, cache.Cached)
		}
	})
}

// TestWhatIsInUseCanBeHeld: a data key that a caller has had becomes the agent's.
func TestWhatIsInUseCanBeHeld(t *testing.T) {
	bubble(t, func(r *rig) {
		few := func(q *cache.DecryptRequest) { q.Caller = "alice" }
		_, _, _ = r.decrypt(1, few)
		f, _, err := r.decrypt(1, held)
		r.wantSource("held", f, err, cache.Cached)
		for id := range 50 {
			_, _, _ = r.decrypt(100+id, few)
		}
		r.up.say(errDown, errDown)
		f, _, err = r.decrypt(1, few)
		r.wantSource("after a flood of its first owner's", f, err, cache.Cached)
	}, func(c *cache.Config) { c.MaxEntriesPerCaller = 5 })
}

// TestHeldByItself: a cache that is full of what is held serves others all the same,
// and forgets what nobody asks to hold any more.
func TestHeldByItself(t *testing.T) {
	bubble(t, func(r *rig) {
		defer r.run()()
		for id := range 20 {
			if _, _, err := r.decrypt(id, held); err != nil {
				t.Fatal(err)
			}
		}
		if f, _, err := r.decrypt(100); err != nil {
			t.Errorf("a caller: %v, %v", f, err)
		}
		time.Sleep(6*time.Hour + time.Minute)
		if s := r.Stats(); s.DecryptionKeys != 0 {
			t.Errorf("%d data keys are left, want that idle ones go", s.DecryptionKeys)
		}
	}, func(c *cache.Config) { c.MaxEntries = 10 })
}
