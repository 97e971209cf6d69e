package kms_test

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/plugins"
)

// attends lets some minutes pass in which no caller asks, with the agent's own looks.
func (r *rig) attends(lasts time.Duration) {
	r.t.Helper()
	for range lasts / time.Second {
		r.clock.Advance(time.Second)
		r.Attend(r.t.Context())
		r.Settle()
	}
}

// wantWell waits until nothing is wrong with the key orders, while no caller asks.
func (r *rig) wantWell(within time.Duration) {
	r.t.Helper()
	r.attends(within)
	await(r.t.(*testing.T), "the key is well again", func() bool { return r.health().Problem == "" })
}

// revoked is a rig whose key was disabled, as two callers have heard.
func revoked(t *testing.T) *warm {
	t.Helper()
	w := newWarm(t)
	if err := w.keystore.Disable("orders", "1"); err != nil {
		t.Fatal(err)
	}
	w.clock.Advance(6 * time.Minute)
	for _, use := range []func() (kms.KeyUse, error){w.encrypt, w.decrypt} {
		if _, err := use(); err == nil {
			t.Fatal("served under a version that is disabled")
		}
	}
	await(t, "both directions are revoked", func() bool { s := w.Stats(); return s.Suspended == 2 && s.EncryptionKeys+s.DecryptionKeys == 0 })
	if h := w.health(); !strings.Contains(h.Problem, "disabled") {
		t.Fatalf("problem = %q, want that the version is disabled", h.Problem)
	}
	return w
}

// A key that was refused and is good again is told to be, though nobody uses it.
func TestARefusedKeyIsWellAgain(t *testing.T) {
	for name, mend := range map[string]func(*warm) error{
		"rotated": func(w *warm) error { _, err := w.keystore.Rotate("orders"); return err },
		"enabled": func(w *warm) error { return w.keystore.Enable("orders", "1") },
	} {
		t.Run(name, func(t *testing.T) {
			w := revoked(t)
			w.attends(5 * time.Minute)
			if h := w.health(); !strings.Contains(h.Problem, "disabled") {
				t.Fatalf("problem = %q, want that it is told as long as it is so", h.Problem)
			}
			if err := mend(w); err != nil {
				t.Fatal(err)
			}
			w.wantWell(time.Minute)
		})
	}
}

// What a backend refused to tell anything of, and tells of again, is well again too, and a
// version that was too old once there is another.
func TestADescriptionIsNews(t *testing.T) {
	t.Run("denied", func(t *testing.T) {
		r := newRig(t)
		r.backend.fail(denied())
		if _, err := r.Encrypt(t.Context(), caller(t, orders), kms.EncryptRequest{Key: "orders"}); err == nil {
			t.Fatal("encrypted, though the key was denied")
		}
		if r.health().Problem == "" {
			t.Fatal("no problem is told")
		}
		r.backend.fail(nil)
		r.wantWell(time.Minute)
	})
	t.Run("too old", func(t *testing.T) {
		r := newRig(t)
		r.config.Keys[0].MaxVersionAge = 500 * time.Millisecond
		r.apply()
		_, _ = r.Encrypt(t.Context(), caller(t, orders), kms.EncryptRequest{Key: "orders"})
		await(t, "the version is too old", func() bool { return r.health().Problem != "" })
		if _, err := r.keystore.Rotate("orders"); err != nil {
			t.Fatal(err)
		}
		r.attends(time.Minute)
		if v := r.health().CurrentVersion; v != "2" {
			t.Errorf("current version %s, want 2", v)
		}
	})
}

// A key that was out alone, and serves nobody any more, is found to be back though nobody
// uses it: the backend was there all the time.
func TestAKeyThatWasOutAloneIsWellAgain(t *testing.T) {
	w := newWarm(t)
	w.backend.intercept(func(call string) error {
		if call == "describe" {
			return nil
		}
		return &plugins.Error{Class: plugins.Unavailable, KeyOnly: true, Detail: "the key is ill"}
	})
	w.clock.Advance(2 * time.Hour)
	for _, use := range []func() (kms.KeyUse, error){w.encrypt, w.decrypt} {
		if _, err := use(); err == nil {
			t.Fatal("served after its grace")
		}
	}
	w.attends(5 * time.Minute)
	if h := w.health(); !strings.Contains(h.Problem, "not served any more") {
		t.Fatalf("problem = %q, want that it is told as long as it is so", h.Problem)
	}
	w.backend.intercept(nil)
	w.wantWell(time.Minute)
}

// What serves in grace is left to its own refresh, and what is well is not asked about.
func TestOnlyWhatIsNotWellIsAttendedTo(t *testing.T) {
	w := newWarm(t)
	calls := 0
	w.backend.intercept(func(string) error { calls++; return nil })
	w.attends(10 * time.Minute)
	if calls != 0 {
		t.Errorf("%d calls for a key that nobody uses", calls)
	}
	w.backend.intercept(func(string) error { return unreachable() })
	w.wantGrace("in the outage")
	w.backend.intercept(func(string) error { calls++; return unreachable() })
	w.attends(10 * time.Minute)
	if calls != 0 {
		t.Errorf("%d calls for a key that serves in grace, want none beside its refresh", calls)
	}
}

// Of a thousand keys that are refused few are asked about at once, and each has its turn.
func TestManyRefusedKeys(t *testing.T) {
	const keys = 1000
	r := newRig(t)
	b := &refusing{asked: map[string]int{}}
	r.config.Backends["local"] = b
	r.config.Keys = nil
	rule := everything()
	rule.Keys = nil
	for i := range keys {
		name := fmt.Sprint("key-", i)
		rule.Keys = append(rule.Keys, name)
		r.config.Keys = append(r.config.Keys, kms.Key{
			Name: name, Wraps: []kms.Wrap{{Backend: "local", WrappingKey: "local:" + name}}, Limits: limits(), Partition: kms.PartitionCaller,
		})
	}
	r.config.Policy = compile(t, rule)
	r.apply()
	for _, k := range r.config.Keys {
		if _, err := r.Encrypt(t.Context(), caller(t, orders), kms.EncryptRequest{Key: k.Name}); err == nil {
			t.Fatal("encrypted, though the key was denied")
		}
	}
	b.reset()
	for range 10 * 60 {
		before := b.total()
		r.clock.Advance(time.Second)
		r.Attend(t.Context())
		if n := b.total() - before; n > 8 {
			t.Fatalf("%d questions at once, want 8 at most", n)
		}
	}
	if b.most > 8 {
		t.Errorf("%d questions under way, want 8 at most", b.most)
	}
	if n := len(b.asked); n < keys*9/10 {
		t.Errorf("%d of %d keys were asked about in ten minutes", n, keys)
	}
}

// refusing is a backend that denies every key, and counts who asks what they are.
type refusing struct {
	plugins.Backend

	mu          sync.Mutex // guards what follows
	asked       map[string]int
	under, most int
}

func (b *refusing) Describe(_ context.Context, uri string) (plugins.Description, error) {
	b.mu.Lock()
	b.asked[uri]++
	b.under++
	b.most = max(b.most, b.under)
	b.mu.Unlock()
	runtime.Gosched()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.under--
	return plugins.Description{}, denied()
}

func (b *refusing) reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.asked)
	b.most = 0
}

func (b *refusing) total() (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, asked := range b.asked {
		n += asked
	}
	return n
}
