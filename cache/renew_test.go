package cache_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

// TestRenew: a use that lasts asks upstream when the last word is too old.
func TestRenew(t *testing.T) {
	bubble(t, func(r *rig) {
		f, n, err := r.decrypt(1)
		served(r.t, f, n, err)
		renew := func(ctx context.Context, maxAge time.Duration) error {
			_, err := r.Renew(ctx, unwraps, cache.Limits{MaxAge: maxAge}, nil)
			return err
		}
		ask := func() error { return renew(r.t.Context(), 5*time.Minute) }
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
		if err := renew(r.t.Context(), 0); err != nil {
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
		refused(r.t, renew(ended, 0), cache.ErrClosed)
	})
}

// TestRenewWaitsNoLongerThanItsContext: whoever waits may leave.
func TestRenewWaitsNoLongerThanItsContext(t *testing.T) {
	bubble(t, func(r *rig) {
		r.up.takes(5 * time.Second)
		ctx, cancel := context.WithTimeout(r.t.Context(), time.Second)
		defer cancel()
		_, err := r.Renew(ctx, unwraps, cache.Limits{MaxAge: time.Minute}, nil)
		refused(r.t, err, context.DeadlineExceeded)
	})
}

// TestRenewIsPatientForNoLonger: a stream that can go on in grace waits for a confirmation
// as long as a request does.
func TestRenewIsPatientForNoLonger(t *testing.T) {
	bubble(t, func(r *rig) {
		l := limits()
		l.Grace = grace
		if _, err := r.Renew(r.t.Context(), wraps, l, nil); err != nil {
			r.t.Fatal(err)
		}
		time.Sleep(6 * time.Minute)
		r.up.takes(5 * time.Second)
		began := time.Now()
		f, err := r.Renew(r.t.Context(), wraps, l, nil)
		r.wantSource("slow", f, err, cache.Grace)
		if d := time.Since(began); d != time.Second {
			r.t.Errorf("waited %v, want 1s", d)
		}
		time.Sleep(5 * time.Second)
		f, err = r.Renew(r.t.Context(), wraps, l, nil)
		r.wantSource("the answer has come", f, err, cache.Cached)
		time.Sleep(6 * time.Minute)
		r.up.say(nil, errNo)
		_, err = r.Renew(r.t.Context(), wraps, l, nil)
		r.wantSource("a no that takes its time", cache.Freshness{Source: cache.Grace}, err, cache.Grace)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		_, err = r.Renew(r.t.Context(), wraps, l, nil)
		refused(r.t, err, cache.ErrSuspended)
	})
}
