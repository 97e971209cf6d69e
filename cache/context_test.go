package cache_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

// in gives a decryption a context.
func in(name string) func(*cache.DecryptRequest) {
	return func(r *cache.DecryptRequest) { r.Authority.Context = name }
}

func unwrapsIn(name string) cache.Authority {
	a := unwraps
	a.Context = name
	return a
}

// A no to one context is none to another, nor to what has none.
func TestContextsAreIndependent(t *testing.T) {
	bubble(t, func(r *rig) {
		for i, name := range []string{"a", "b", ""} {
			f, n, err := r.decrypt(i, in(name))
			served(r.t, f, n, err)
		}
		r.up.say(errNo, errNo)
		r.Observe(unwrapsIn("a"), cache.No, nil, r.Now())
		synctest.Wait()
		r.up.say(nil, nil)
		for name, want := range map[string]error{"a": cache.ErrRevoked, "b": nil, "": nil} {
			if err := r.Recheck(unwrapsIn(name)); want != nil {
				refused(r.t, err, want)
			} else if err != nil {
				r.t.Errorf("context %q: %v", name, err)
			}
		}
		if s := r.Stats(); s.DecryptionKeys != 2 || s.Evictions != 1 {
			r.t.Errorf("%+v: want that one data key is destroyed", s)
		}
	})
}

// Whoever makes contexts up is not remembered without bound, and takes nothing from others.
func TestContextsAreBounded(t *testing.T) {
	bubble(t, func(r *rig) {
		f, n, err := r.decrypt(0, in("good"))
		served(r.t, f, n, err)
		r.up.say(errNo, errNo)
		for i := range 10000 {
			_, _, err := r.decrypt(i+1, in(fmt.Sprint("bad", i)))
			refused(r.t, err, errNo)
			synctest.Wait()
		}
		if s := r.Stats(); s.Authorities > 5000 || s.DecryptionKeys != 1 {
			r.t.Errorf("%d authorities are remembered, and %d data keys", s.Authorities, s.DecryptionKeys)
		}
		f, n, err = r.decrypt(0, in("good"))
		served(r.t, f, n, err)
	})
}

// What calls past the cache say of a context that it knows nothing of is not remembered, but
// that upstream answers is.
func TestPastTheCacheInAContext(t *testing.T) {
	bubble(t, func(r *rig) {
		f, n, err := r.decrypt(0)
		served(r.t, f, n, err)
		r.Observe(unwraps, cache.Unreachable, nil, r.Now())
		time.Sleep(time.Second)
		r.Observe(unwrapsIn("a"), cache.No, nil, r.Now())
		if s := r.Stats(); s.Authorities != 1 || len(r.Outages()) != 0 {
			r.t.Errorf("%d authorities, outages %+v; want one, and none", s.Authorities, r.Outages())
		}
		// What it may mean for others is asked, once in a while.
		for range 10 {
			r.Ask(unwraps)
			synctest.Wait()
		}
		r.wantCalls(1, 1)
		r.Ask(unwrapsIn("a"))
		r.wantCalls(1, 1)
	})
}

// Who asks past the cache about what is refused does so once a second, and takes nobody
// else's turn.
func TestTurns(t *testing.T) {
	bubble(t, func(r *rig) {
		for range 2 {
			if !r.Turn(unwraps, "a") {
				r.t.Error("of what is not refused everybody may ask")
			}
		}
		r.up.say(nil, errNo)
		r.Observe(unwraps, cache.No, nil, r.Now())
		synctest.Wait()
		for range 3 {
			for _, caller := range []string{"a", "b"} {
				if !r.Turn(unwraps, caller) || r.Turn(unwraps, caller) {
					r.t.Errorf("%s may not ask once", caller)
				}
			}
			time.Sleep(time.Second)
		}
	})
}

// Of all contexts that are in use, the one that lasts the shortest stands for them.
func TestStandingOfContexts(t *testing.T) {
	bubble(t, func(r *rig) {
		for i, name := range []string{"a", "b"} {
			f, n, err := r.decrypt(i, in(name))
			served(r.t, f, n, err)
			time.Sleep(time.Minute)
		}
		if s := r.Standing(unwraps, limits()); !s.Confirmed || s.Age != 2*time.Minute || s.DataKeys != 1 {
			r.t.Errorf("%+v, want the older one", s)
		}
	})
}
