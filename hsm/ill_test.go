package hsm_test

import (
	"crypto/rand"
	"crypto/rsa"
	"fmt"
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
	if n := r.attached(); n != 1 {
		t.Errorf("it took %d connections, want 1", n)
	}
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
