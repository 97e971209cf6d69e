package hsm_test

import (
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
)

// A key that the token does nothing with, for reasons of its own, is an outage of this key:
// those beside it are served, by the connection that there is.
func TestOneIllKey(t *testing.T) {
	r, fault := newFaultyRig(t)
	bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	wrappedBad, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
	fault.Set("ill /bad/")
	var beside sync.WaitGroup
	stop := make(chan struct{})
	beside.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
			}
			if _, err := r.Unwrap(bounded(t), good, nil, wrappedGood, bound); err != nil {
				t.Errorf("the key beside it: %v", err)
				return
			}
		}
	})
	for range 10 {
		if _, err := r.Unwrap(bounded(t), bad, nil, wrappedBad, bound); hsm.KindOf(err) != hsm.Unavailable {
			t.Errorf("Unwrap of the ill key: %v", err)
		}
		if _, err := r.Wrap(bounded(t), bad, nil, m, bound); hsm.KindOf(err) == hsm.KeyUnusable || err == nil {
			t.Errorf("Wrap with the ill key: %v", err)
		}
	}
	close(stop)
	beside.Wait()
	r.keepsConnection()
	fault.Set()
	eventually(t, "it is well again", func() error {
		_, err := r.Unwrap(t.Context(), bad, nil, wrappedBad, bound)
		return err
	})
	r.opens(bad, wrappedBad, m)
}

// Public keys of strangers, of whatever size and exponent, keep nobody from using the right
// one beside them.
func TestPublicKeysBesideTheRightOne(t *testing.T) {
	t.Setenv("GODEBUG", "rsa1024min=0")
	r := newRig(t)
	v := r.key("orders", hsm.OAEPSHA1)
	m := material(32)
	wrapped, right := r.wrap(v, m), r.publicKey(v)
	r.stranger("--delete-object", "--type", "pubkey", "--id", fmt.Sprintf("%x", v.ID))
	for range 4 {
		small, err := rsa.GenerateKey(rand.Reader, 768)
		if err != nil {
			t.Fatal(err)
		}
		r.plant(v, &small.PublicKey)
	}
	r.plant(v, &rsa.PublicKey{N: right.N, E: 3})
	r.plant(v, right)
	for range 3 {
		r.logOut()
		r.opens(v, r.wrap(v, m), m)
		r.opens(v, wrapped, m)
	}
}

// ofVersion fails a test where an unwrap is not told as an outage of this version alone.
func (r *rig) ofVersion(v *hsm.Version, wrapped []byte) {
	r.t.Helper()
	if err := r.fails(v, wrapped, hsm.Unavailable); !hsm.OfVersion(err) || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), "HSM's own log") {
		r.t.Errorf("Unwrap: %v, want an outage of this version, in one line, with what to do", err)
	}
}

// isWell waits until a version opens again: one that was ill is looked at after a second.
func (r *rig) isWell(v *hsm.Version, wrapped, want []byte) {
	r.t.Helper()
	eventually(r.t, "it is well again", func() error {
		_, err := r.Unwrap(r.t.Context(), v, nil, wrapped, bound)
		return err
	})
	r.opens(v, wrapped, want)
}

// An ill key that is the first to be used of a connection does not end it: others speak
// for the token, whether they are in use or not.
func TestIllKeyFirst(t *testing.T) {
	r, fault := newFaultyRig(t, hasty)
	bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	wrappedBad, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
	fault.Set("dead")
	_ = r.fails(bad, wrappedBad, hsm.Unavailable)
	fault.Set("ill /bad/")
	eventually(t, "the connection is back", func() error {
		_, err := r.Unwrap(t.Context(), bad, nil, wrappedBad, bound)
		if hsm.OfVersion(err) {
			return nil
		}
		return fmt.Errorf("want an outage of this version: %w", err)
	})
	n := r.attached()
	for range 5 {
		r.ofVersion(bad, wrappedBad)
		r.opens(good, wrappedGood, m)
	}
	if got := r.attached(); got != n {
		t.Errorf("%d connections more", got-n)
	}
	fault.Set()
	r.isWell(bad, wrappedBad, m)
}

// However many keys are ill, one that works speaks for the token.
func TestManyIllKeys(t *testing.T) {
	r, fault := newFaultyRig(t)
	m := material(32)
	bad, wrapped := make([]*hsm.Version, 8), make([][]byte, 8)
	for i := range bad {
		bad[i] = r.key(fmt.Sprintf("bad%d", i), hsm.GCM)
		wrapped[i] = r.wrap(bad[i], m)
	}
	good := r.key("good", hsm.GCM)
	wrappedGood := r.wrap(good, m)
	fault.Set("ill /bad")
	for i := range bad {
		r.ofVersion(bad[i], wrapped[i])
		r.opens(good, wrappedGood, m)
	}
	r.keepsConnection()
}

// Reads of an ill key use up none of its wraps, and cost the token next to nothing.
func TestIllKeyIsLeftAlone(t *testing.T) {
	var c *hsm.Counter
	r, fault := newFaultyRig(t, counted(&c, 4096))
	bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	wrappedBad, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
	before, _, err := c.Used(bad)
	if err != nil {
		t.Fatal(err)
	}
	fault.Set("ill /bad/")
	r.logOut()
	r.opens(good, wrappedGood, m)
	fault.Calls()
	began := time.Now()
	for range 100 {
		r.ofVersion(bad, wrappedBad)
	}
	looks := 1 + int(time.Since(began)/time.Second)
	calls := 0
	for _, n := range fault.Calls() {
		calls += n
	}
	if calls > 60*looks {
		t.Errorf("100 reads took %d calls of the module, want those of %d", calls, looks)
	}
	if after, _, err := c.Used(bad); err != nil || after != before {
		t.Errorf("%d wraps are counted, and were %d: %v", after, before, err)
	}
	fault.Set()
	r.isWell(bad, wrappedBad, m)
	r.wrap(bad, m)
}

// A key that does not open its canary is another one where that is proven, as by what it
// opens for a test. That it may not wrap, or must not, proves nothing.
func TestOutageIsNoRefusal(t *testing.T) {
	for name, c := range map[string]struct {
		suite   hsm.Suite
		prepare func(r *rig, c *hsm.Counter, v *hsm.Version)
		rule    string // beside what ails it
	}{
		"it may not wrap": {hsm.GCM, func(*rig, *hsm.Counter, *hsm.Version) {}, "C_EncryptInit rv=0x68"},
		"it has made its wraps": {hsm.GCM, func(r *rig, _ *hsm.Counter, v *hsm.Version) {
			for range 16 {
				_, _ = r.Wrap(bounded(r.t), v, nil, material(32), bound)
			}
		}, ""},
		"nobody can count": {hsm.GCM, func(r *rig, c *hsm.Counter, _ *hsm.Version) {
			_ = c.Close() // gives back what is reserved
			if err := os.WriteFile(r.path("wraps.json"), []byte("{"), 0o600); err != nil {
				r.t.Fatal(err)
			}
		}, ""},
		"no public key": {hsm.OAEPSHA1, func(r *rig, _ *hsm.Counter, v *hsm.Version) { r.withoutPublic(v) }, ""},
		"a public key that may not encrypt": {hsm.OAEPSHA1, func(r *rig, _ *hsm.Counter, v *hsm.Version) {
			r.plants(planted{ID: v.ID[:]})
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var count *hsm.Counter
			r, fault := newFaultyRig(t, hasty, func(r *rig, cfg *hsm.Config) {
				var err error
				if count, err = hsm.OpenCounter(r.path(""), (1<<32)/16, nil); err != nil {
					t.Fatal(err)
				}
				cfg.Wraps = count
			})
			bad, good := r.key("bad", c.suite), r.key("good", hsm.CBCHMAC)
			m := material(32)
			wrappedBad, wrappedGood := r.wrap(bad, m), r.wrap(good, m)
			c.prepare(r, count, bad)
			ails := func(rules ...string) {
				if c.rule != "" {
					rules = append(rules, c.rule)
				}
				fault.Set(rules...)
			}
			ails("ill /bad/")
			r.logOut()
			r.opens(good, wrappedGood, m)
			r.ofVersion(bad, wrappedBad)
			ails("C_Decrypt rv=0x05") // and then the token
			eventually(t, "it is told as an outage of the token", func() error {
				if err := r.fails(bad, wrappedBad, hsm.Unavailable); hsm.OfVersion(err) {
					return err
				}
				return nil
			})
			ails()
			r.isWell(bad, wrappedBad, m)
		})
	}
}

// A key that opens and does not wrap, for reasons of its own, is an outage of its wraps:
// its own answers are remembered for a while, and others wrap. Where none does, it is the
// token that is broken.
func TestKeyThatIsTooIllToWrap(t *testing.T) {
	r, fault := newFaultyRig(t)
	bad, good := r.key("bad", hsm.GCM), r.key("good", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(bad, m)
	fault.Set("ill-wraps /bad/")
	r.logOut()
	r.opens(bad, wrapped, m)
	fault.Calls()
	for range 20 {
		if _, err := r.Wrap(bounded(t), bad, nil, m, bound); !hsm.OfVersion(err) || !strings.Contains(err.Error(), "hsm rotate bad") {
			t.Errorf("Wrap: %v, want an outage of this version with its cure", err)
		}
		r.opens(bad, wrapped, m)
	}
	if n := fault.Calls()["C_EncryptInit"]; n > 10 {
		t.Errorf("20 wraps in vain had the token begin %d", n)
	}
	r.wrap(good, m)
	fault.Set() // it is over: that is noticed long before the canary is opened again
	began := time.Now()
	eventually(t, "a wrap by a key that is well again", func() error {
		_, err := r.Wrap(bounded(t), bad, nil, m, bound)
		return err
	})
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
	fault.Set("ill-wraps /v1") // of all keys
	r.logOut()
	r.opens(bad, wrapped, m)
	if _, err := r.Wrap(bounded(t), bad, nil, m, bound); hsm.KindOf(err) != hsm.Broken {
		t.Errorf("Wrap where no key wraps: %v, want that the token is broken", err)
	}
	fault.Set()
	r.logOut()
	r.opens(bad, wrapped, m) // which notices that
	r.opens(bad, r.wrap(bad, m), m)
	r.keepsConnection()
}

// A key that is gone, or may not open any more, is a no at once, ill or not.
func TestRefusalOfAnIllKey(t *testing.T) {
	r, fault := newFaultyRig(t)
	m := material(32)
	var keys [2]*hsm.Version
	var wrapped [2][]byte
	for i, name := range []string{"gone", "disabled"} {
		keys[i] = r.key(name, hsm.GCM)
		wrapped[i] = r.wrap(keys[i], m)
	}
	r.tool("--delete-object", "--type", "secrkey", "--id", fmt.Sprintf("%x", keys[0].ID))
	fault.Set("C_EncryptInit rv=0x80000017", "C_DecryptInit rv=0x68")
	r.logOut()
	_ = r.fails(keys[0], wrapped[0], hsm.KeyNotFound)
	_ = r.fails(keys[1], wrapped[1], hsm.KeyUnusable)
}
