package hsm

import (
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
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

// No more sessions are opened than the token says that it has, beside that of the login.
func TestSessionsOfSmallTokens(t *testing.T) {
	for most, want := range map[uint]int{0: 8, 2: 1, 3: 1, 4: 2, 5: 2, 6: 3, 8: 5, 11: 8, 100: 8} {
		token := &Token{start: time.Now()}
		info := cryptoki.Token{MaxSessions: most}
		n, spare := token.sessions(info, true)
		a := newAttachment(token, 0, info, cryptoki.Session{}, n, spare)
		all := 1 + len(a.places)
		for _, spare := range a.spare {
			all += len(spare)
		}
		if n != want || most > 0 && all > int(most) {
			t.Errorf("of %d sessions: %d operations at once, want %d, and %d sessions in all", most, n, want, all)
		}
	}
}
