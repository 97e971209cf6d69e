package hsm_test

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/kms-agent/kms-agent/hsm"
)

// Keys are tested by the first who wraps after they were found, once. Who opens needs
// their canary alone.
func TestSelfTestIsForWraps(t *testing.T) {
	for _, suite := range []hsm.Suite{hsm.GCM, hsm.CBCHMAC, hsm.OAEPSHA1} {
		t.Run(suite.String(), func(t *testing.T) {
			r, fault := newFaultyRig(t)
			v := r.key("orders", suite)
			m := material(32)
			wrapped := r.wrap(v, m)
			r.logOut()
			for _, c := range []struct {
				name string
				do   func()
				want int
			}{
				{"opening", func() { r.opens(v, wrapped, m) }, 0},
				{"the first wrap", func() { r.wrap(v, m) }, 3},
				{"another wrap", func() { r.wrap(v, m) }, 1},
				{"opening again", func() { r.opens(v, wrapped, m) }, 0},
			} {
				fault.Calls()
				c.do()
				if n := fault.Calls()["C_Encrypt"]; n != c.want {
					t.Errorf("%s: %d wraps, want %d", c.name, n, c.want)
				}
			}
		})
	}
}

// Whatever a token answers to wraps, it opens what was wrapped, over the same connection;
// and what a test of the keys ends with is never said of what callers sent.
func TestWrapsThatFailAreNoUnwraps(t *testing.T) {
	r, fault := newFaultyRig(t)
	v := r.key("orders", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(v, m)
	for _, rule := range []string{
		"C_EncryptInit rv=0x5", "C_EncryptInit rv=0x6", "C_EncryptInit rv=0x7", "C_EncryptInit rv=0x13", "C_EncryptInit rv=0x21",
		"C_EncryptInit rv=0x68", "C_EncryptInit rv=0x70", "C_EncryptInit rv=0xe2", "C_EncryptInit rv=0x200", "C_Encrypt rv=0x40",
		"C_EncryptInit rv=0x80000017", "C_Encrypt rv=0x30",
	} {
		before := r.attached()
		fault.Set(rule)
		r.logOut()
		r.opens(v, wrapped, m)
		if err := r.Check(bounded(t)); err != nil {
			t.Errorf("%s: Check: %v", rule, err)
		}
		if n := r.attached(); n != before {
			t.Errorf("%s: %d connections for unwraps", rule, n-before)
		}
		if _, err := r.Wrap(bounded(t), v, nil, m, bound); kindOf(err) != hsm.Broken && kindOf(err) != hsm.KeyUnusable && kindOf(err) != hsm.Unavailable {
			t.Errorf("%s: Wrap: %v", rule, err)
		}
		fault.Set()
		eventually(t, rule+": it works again", func() error { return r.Check(t.Context()) })
	}
	r.logOut()
	fault.Set("C_Decrypt rv=0x40 skip=1") // the canary opens, what the test wraps does not
	if _, err := r.Wrap(bounded(t), v, nil, m, bound); kindOf(err) != hsm.Broken {
		t.Errorf("Wrap by a token that does not open it again: %v, want that it is broken", err)
	}
}

// uncountable keeps the counts from being changed, until it is countable.
func (r *rig) uncountable(dir string) (countable func()) {
	r.t.Helper()
	lock := dir + "/wraps.json.lock"
	if err := errors.Join(os.Remove(lock), os.Mkdir(lock, 0o700)); err != nil {
		r.t.Fatal(err)
	}
	return func() {
		r.t.Helper()
		if err := os.Remove(lock); err != nil {
			r.t.Fatal(err)
		}
	}
}

// Keys that could not be tested, as nobody could count that, are tested before they wrap.
func TestKeysThatCouldNotBeTested(t *testing.T) {
	var c *hsm.Counter
	dir := t.TempDir()
	r, fault := newFaultyRig(t, func(_ *rig, cfg *hsm.Config) {
		var err error
		if c, err = hsm.OpenCounter(dir, 1, nil); err != nil {
			t.Fatal(err)
		}
		cfg.Wraps = c
	})
	v := r.key("orders", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(v, m)
	if err := c.Close(); err != nil { // so that more are to be reserved
		t.Fatal(err)
	}
	countable := r.uncountable(dir)
	r.logOut()
	if _, err := r.Wrap(bounded(t), v, nil, m, bound); kindOf(err) != hsm.Unavailable {
		t.Errorf("Wrap: %v, want that it cannot be counted", err)
	}
	if err := r.Verify(bounded(t), v); err != nil {
		t.Errorf("Verify: %v: nothing is wrong with the version", err)
	}
	r.opens(v, wrapped, m)
	countable()
	fault.Set("C_Decrypt rv=0x40")
	if _, err := r.Wrap(bounded(t), v, nil, m, bound); kindOf(err) != hsm.Broken {
		t.Errorf("Wrap by a token that opens nothing: %v, want that it is broken", err)
	}
	fault.Set()
	r.opens(v, r.wrap(v, m), m)
	if n := r.attached(); n != 1 {
		t.Errorf("attached %d times, want once", n)
	}
}

// substitute puts another key in the place of a version's.
func (r *rig) substitute(v *hsm.Version) {
	r.t.Helper()
	id := fmt.Sprintf("%x", v.ID)
	r.tool("--delete-object", "--type", "secrkey", "--id", id)
	r.tool("--keygen", "--key-type", "AES:32", "--id", id, "--label", "kmsagent/orders/v1", "--sensitive", "--private")
}

// A key that is another is not told from one that is ill where it may not wrap: that is an
// outage of its version, and others lose no connection by it. Where it may, it is told.
func TestSubstitutedKeyThatMayNotWrap(t *testing.T) {
	for name, c := range map[string]struct {
		limit uint64
		rule  string
	}{
		"worn":       {8, ""},
		"not let to": {1 << 20, "C_EncryptInit rv=0x68"},
	} {
		t.Run(name, func(t *testing.T) {
			var count *hsm.Counter
			r, fault := newFaultyRig(t, counted(&count, c.limit))
			v, other := r.key("orders", hsm.GCM), r.key("other", hsm.CBCHMAC)
			m := material(32)
			wrapped, sealed := r.wrap(v, m), r.wrap(other, m)
			for range c.limit % 16 {
				_, _ = r.Wrap(bounded(t), v, nil, m, bound)
			}
			r.substitute(v)
			if c.rule != "" {
				fault.Set(c.rule)
			}
			r.logOut()
			for range 3 {
				if err := r.fails(v, wrapped, hsm.Unavailable); !hsm.OfVersion(err) {
					t.Errorf("it is told as an outage of the token: %v", err)
				}
				r.opens(other, sealed, m)
			}
			if n := r.attached(); n != 1 {
				t.Errorf("attached %d times, want once", n)
			}
			if c.rule == "" {
				return
			}
			fault.Set()
			eventually(t, "it is told", func() error {
				_, err := r.Unwrap(t.Context(), v, nil, wrapped, bound)
				if hsm.KindOf(err) == hsm.KeyUnusable {
					return nil
				}
				return fmt.Errorf("want KeyUnusable: %w", err)
			})
		})
	}
}

// A token that says that a canary opens, to something else, lies: no other key can do that.
func TestCanaryThatOpensToSomethingElse(t *testing.T) {
	r, fault := newFaultyRig(t)
	v := r.key("orders", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(v, m)
	fault.Set("lossy")
	r.logOut()
	_ = r.fails(v, wrapped, hsm.Broken)
	fault.Set()
	r.opens(v, wrapped, m)
}

// Logins, keys that may wrap and may not by turns, and callers, all at once: who opens is
// never told that what was wrapped is bad.
func TestTestsAmongCallers(t *testing.T) {
	var c *hsm.Counter
	r, fault := newFaultyRig(t, counted(&c, 1<<20))
	m := material(32)
	done := make(chan struct{})
	var callers sync.WaitGroup
	for _, suite := range []hsm.Suite{hsm.GCM, hsm.OAEPSHA1} {
		v := r.key(suite.String(), suite)
		wrapped := r.wrap(v, m)
		for range 2 {
			callers.Go(func() {
				for {
					select {
					case <-done:
						return
					default:
					}
					if out, err := r.Wrap(t.Context(), v, nil, m, bound); err == nil {
						r.opens(v, out, m)
					} else if k := hsm.KindOf(err); k != hsm.KeyUnusable && k != hsm.Unavailable {
						t.Errorf("Wrap: %v", err)
					}
					r.opens(v, wrapped, m)
				}
			})
		}
	}
	for i := range 20 {
		fault.Set()
		if i%2 == 0 {
			fault.Set("C_EncryptInit rv=0x68")
		}
		r.logOut()
	}
	close(done)
	callers.Wait()
	if n := r.attached(); n != 1 {
		t.Errorf("attached %d times, want once", n)
	}
}

// A counted wrap of a key that was tested takes no memory from the heap.
func TestWrapAllocatesNothing(t *testing.T) {
	for _, suite := range []hsm.Suite{hsm.GCM, hsm.CBCHMAC} {
		var c *hsm.Counter
		r := newRig(t, counted(&c, 1<<32), func(_ *rig, cfg *hsm.Config) { cfg.Stay = true })
		v, m, dst, ctx := r.key(suite.String(), suite), material(32), make([]byte, 0, 256), t.Context()
		wrapped := r.wrap(v, m)
		if n := testing.AllocsPerRun(500, func() { _, _ = r.Wrap(ctx, v, dst, m, bound) }); n != 0 {
			t.Errorf("%v: %v allocations by a wrap", suite, n)
		}
		if n := testing.AllocsPerRun(500, func() { _, _ = r.Unwrap(ctx, v, dst, wrapped, bound) }); n != 0 {
			t.Errorf("%v: %v allocations by an unwrap", suite, n)
		}
	}
}
