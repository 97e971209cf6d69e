package cache

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
)

// TestMostMessages: whatever the configuration says, the bound of the format
// holds; nobody can wait for a test that uses it up.
func TestMostMessages(t *testing.T) {
	for given, want := range map[uint64]uint64{0: MaxMessages, 1: 1, MaxMessages: MaxMessages, MaxMessages + 1: MaxMessages, ^uint64(0): MaxMessages} {
		if got := (Limits{MaxMessages: given}).messages(); got != want {
			t.Errorf("max_messages %d: %d, want %d", given, got, want)
		}
	}
}

// TestCallersAreForgotten: callers that have nothing leave nothing.
func TestCallersAreForgotten(t *testing.T) {
	now := time.Hour
	c, err := New(Config{
		Now: func() time.Duration { return now }, MaxEntries: 10, Classify: func(error) Verdict { return No },
		Confirm: func(context.Context, Authority, any) error { return errors.New("no") },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i := range 100 {
		_, err := c.Decrypt(t.Context(), DecryptRequest{
			Caller: fmt.Sprint(i), ID: DecryptID{byte(i)}, Authority: Authority{Direction: Decrypt},
			Fill: func(context.Context) (Material, error) { return Material{}, errors.New("no") },
		})
		if err == nil {
			t.Fatal("served")
		}
	}
	now += 2 * probePause
	c.sweep()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.callers) != 0 {
		t.Errorf("%d callers are remembered, want none", len(c.callers))
	}
}
