package cache_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

// What began before a confirmation was made worthless confirms nothing, however long it
// takes and whatever is swept meanwhile.
func TestUnconfirm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now().Add(-time.Hour)
		now := func() time.Duration { return time.Since(start) }
		c, err := cache.New(cache.Config{
			Now: now, MaxEntries: 8, Classify: func(error) cache.Verdict { return cache.Other },
			Confirm: func(context.Context, cache.Authority, any) error { return nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		a := cache.Authority{Backend: "b", WrappingKey: "k", Version: "1", Direction: cache.Decrypt}
		c.Observe(a, cache.Yes, nil, now())
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = c.Run(ctx)
		}()
		began := now()
		time.Sleep(time.Second)
		c.Unconfirm(func(cache.Authority) bool { return true })
		if _, ok := c.Confirmed(a); ok {
			t.Error("it is confirmed still")
		}
		time.Sleep(5 * time.Second)
		c.Observe(a, cache.Yes, nil, began)
		if age, ok := c.Confirmed(a); ok {
			t.Errorf("confirmed %v ago by a call that began before", age)
		}
		c.Observe(a, cache.Yes, nil, now())
		if _, ok := c.Confirmed(a); !ok {
			t.Error("not confirmed by a call that began since")
		}
		cancel()
		<-ended
		c.Close()
	})
}
