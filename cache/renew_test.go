package cache_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

// TestRenew: a use that lasts asks upstream when the last word is too old.
func TestRenew(t *testing.T) {
	bubble(t, func(r *rig) {
		f, n, err := r.decrypt(1)
		served(r.t, f, n, err)
		ask := func() error { return r.Renew(r.t.Context(), unwraps, 5*time.Minute) }
		if err := ask(); err != nil {
			r.t.Errorf("within max_age: %v", err)
		}
		r.wantCalls(1, 0)
		time.Sleep(6 * time.Minute)
		if err := ask(); err != nil {
			r.t.Errorf("after max_age: %v", err)
		}
		r.wantCalls(1, 1)
		time.Sleep(time.Second)
		if err := r.Renew(r.t.Context(), unwraps, 0); err != nil {
			r.t.Errorf("with no age allowed: %v", err)
		}
		r.wantCalls(1, 2)
		time.Sleep(6 * time.Minute)
		r.up.say(nil, errDown)
		refused(r.t, ask(), errDown)
		r.up.say(nil, errNo)
		refused(r.t, ask(), errNo)
		// Until the second no has come it is suspended, and revoked then.
		if err := ask(); !errors.Is(err, cache.ErrSuspended) && !errors.Is(err, cache.ErrRevoked) {
			r.t.Errorf("after a no: %v, want a refusal", err)
		}
		ended, cancel := context.WithCancel(r.t.Context())
		cancel()
		r.Close()
		refused(r.t, r.Renew(ended, unwraps, 0), cache.ErrClosed)
	})
}

// TestRenewWaitsNoLongerThanItsContext: whoever waits may leave.
func TestRenewWaitsNoLongerThanItsContext(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.takes(5 * time.Second)
		ctx, cancel := context.WithTimeout(r.t.Context(), time.Second)
		defer cancel()
		refused(r.t, r.Renew(ctx, unwraps, time.Minute), context.DeadlineExceeded)
	})
}
