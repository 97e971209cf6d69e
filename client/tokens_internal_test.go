package client

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// A Workload API that hangs takes a little of one request's time, and nothing
// of the others', while the token at hand is valid.
func TestRenewalHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fetches := 0
		tk := &tokens{turn: make(chan struct{}, 1), ask: func(ctx context.Context) (*token, error) {
			fetches++
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		tk.current.Store(&token{header: map[string]string{"authorization": "Bearer a"}, renewal: time.Now(), end: time.Now().Add(time.Minute)})
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		began := time.Now()
		for range 100 {
			got, err := tk.GetRequestMetadata(ctx)
			if err != nil || got["authorization"] != "Bearer a" {
				t.Fatalf("got %v, %v, want the token at hand", got, err)
			}
		}
		if took := time.Since(began); took > renewalWait || fetches != 1 {
			t.Errorf("100 requests took %v and asked %d times, want %v at most, and once", took, fetches, renewalWait)
		}
		time.Sleep(renewalPause)
		if _, err := tk.GetRequestMetadata(ctx); err != nil || fetches != 2 {
			t.Errorf("after the pause: %v, asked %d times, want 2", err, fetches)
		}
		// Without a valid token the request waits, for as long as it may.
		time.Sleep(time.Minute)
		ctx, cancel = context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		began = time.Now()
		if got, err := tk.GetRequestMetadata(ctx); err == nil || time.Since(began) != 3*time.Second {
			t.Errorf("expired: got %v, %v after %v", got, errors.Unwrap(err), time.Since(began))
		}
	})
}
