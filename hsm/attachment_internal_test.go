package hsm

import (
	"testing"
	"time"
)

// What makes a lost connection a new outage, and not the one before going on.
func TestProved(t *testing.T) {
	token := &Token{start: time.Now().Add(-time.Hour)}
	for _, c := range []struct {
		name   string
		age    time.Duration
		worked bool
		want   bool
	}{
		{"broke at once", 0, false, false},
		{"broke soon", reconnectMax / 2, false, false},
		{"served", 0, true, true},
		{"was there, and nobody asked for it", 2 * reconnectMax, false, true},
	} {
		a := &attachment{token: token, since: token.now() - int64(c.age)}
		a.worked.Store(c.worked)
		if got := a.proved(); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}
