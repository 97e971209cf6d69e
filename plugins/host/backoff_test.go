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
			ran := time.Second // less than a stable process
			if i == 0 && round > 0 {
				ran = time.Minute
			}
			if got := b.after(ran); got < base || got > min(base*3/2, b.max) {
				t.Errorf("round %d, wait %d: got %s, want %s to %s", round, i, got, base, min(base*3/2, b.max))
			}
		}
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
