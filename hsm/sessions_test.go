package hsm_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
)

// together makes so many wraps at once, each of which takes a while, and returns how long
// all of them took.
func (r *rig) together(v *hsm.Version, n int) time.Duration {
	r.t.Helper()
	began := time.Now()
	var callers sync.WaitGroup
	for range n {
		callers.Go(func() {
			if _, err := r.Wrap(bounded(r.t), v, nil, material(32), bound); err != nil {
				r.t.Errorf("Wrap: %v", err)
			}
		})
	}
	callers.Wait()
	return time.Since(began)
}

// A token whose sessions somebody else has for a moment costs no call, and is used with
// all of them again some seconds later, without another connection.
func TestSessionsOfOthers(t *testing.T) {
	r, fault := newFaultyRig(t)
	v := r.key("orders", hsm.GCM)
	r.wrap(v, material(32))
	fault.Set("C_EncryptInit rv=0xb0 count=1", "C_OpenSession rv=0xb1 count=2") // it is closed, and another is not to be had
	r.wrap(v, material(32))
	fault.Set("C_EncryptInit sleep_ms=100", "C_OpenSession rv=0xb1")
	_ = r.together(v, 4) // with those that there are
	fault.Set("C_EncryptInit sleep_ms=100")
	eventually(t, "eight sessions are used", func() error {
		if d := r.together(v, 8); d > 350*time.Millisecond {
			return fmt.Errorf("eight wraps of 100 ms took %v", d)
		}
		return nil
	})
	if n := r.attached(); n != 1 {
		t.Errorf("attached %d times, want once", n)
	}
}

// A token that has fewer sessions than it says is asked for more now and then, and not by
// each call.
func TestFewerSessionsForLong(t *testing.T) {
	r, fault := newFaultyRig(t)
	v := r.key("orders", hsm.GCM)
	fault.Set("C_EncryptInit sleep_ms=30")
	_ = r.together(v, 3) // which opens three
	fault.Set("C_EncryptInit sleep_ms=10", "C_OpenSession rv=0xb1")
	fault.Calls()
	for range 5 {
		_ = r.together(v, 12)
	}
	if n := fault.Calls()["C_OpenSession"]; n > 8 {
		t.Errorf("the token was asked for %d sessions, want no more than there are places", n)
	}
	if n := r.attached(); n != 1 {
		t.Errorf("attached %d times, want once", n)
	}
}
