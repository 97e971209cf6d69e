package cache

import "testing"

// TestMostMessages: whatever the configuration says, the bound of the format
// holds; nobody can wait for a test that uses it up.
func TestMostMessages(t *testing.T) {
	for given, want := range map[uint64]uint64{0: MaxMessages, 1: 1, MaxMessages: MaxMessages, MaxMessages + 1: MaxMessages, ^uint64(0): MaxMessages} {
		if got := (Limits{MaxMessages: given}).messages(); got != want {
			t.Errorf("max_messages %d: %d, want %d", given, got, want)
		}
	}
}
