package host

import (
	"testing"
	"time"
)

func TestBackoff(t *testing.T) {
	b := backoff{min: time.Second, max: time.Minute}
	want := []int{1, 2, 4, 8, 16, 32, 40, 40, 40}
	for round := range 2 {
		for i, seconds := range want {
			base := time.Duration(seconds) * time.Second
			if got := b.after(time.Second); got < base || got > min(base*3/2, b.max) {
				t.Errorf("round %d, wait %d: got %s, want %s to %s", round, i, got, base, min(base*3/2, b.max))
			}
		}
		if got := b.after(time.Minute); got > 100*time.Millisecond {
			t.Errorf("after a process that was well: %s, want a start almost at once", got)
		}
	}
	for range 3 { // what crashes every few seconds is started again every few seconds
		if got := b.after(5 * time.Second); got > 100*time.Millisecond {
			t.Errorf("after 5 s: %s", got)
		}
	}
	first := b.after(time.Second)
	if got := b.after(wellFor*first - 1); got < 2*time.Second {
		t.Errorf("after less than %d times the wait before: %s", wellFor, got)
	}
	seen := map[time.Duration]bool{}
	for range 20 {
		seen[b.after(0)] = true
	}
	if len(seen) < 2 {
		t.Error("waits do not differ: all agents would start at the same moment")
	}
	same := backoff{min: time.Minute, max: time.Minute}
	for range 3 {
		if got := same.after(0); got != time.Minute {
			t.Errorf("between a minute and a minute: got %s", got)
		}
	}
}
