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
		wraps  bool
		failed bool
		want   bool
	}{
		{name: "broke at once"},
		{name: "broke soon", age: reconnectMax / 2},
		{name: "served", worked: true, want: true},
		{name: "opened, and broke with the first wrap", worked: true, failed: true},
		{name: "wrapped, and broke with another wrap", worked: true, wraps: true, failed: true, want: true},
		{name: "was there, and nobody asked for it", age: 2 * reconnectMax, want: true},
	} {
		a := &attachment{token: token, since: token.now() - int64(c.age)}
		a.worked.Store(c.worked)
		a.wraps.Store(c.wraps)
		a.failed.Store(c.failed)
		if got := a.proved(); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}
