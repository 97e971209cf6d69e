package kms_test

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/cache/seal"
	"github.com/kms-agent/kms-agent/plugins"
)

// storeRig is a rig whose service is replaced by the next, as by a restart.
type storeRig struct {
	*rig
	dir    string
	sealer seal.Sealer
	file   *seal.Store
	max    int
	wall   time.Time
	boot   string
	took   time.Duration // by the last Restore
}

func newStoreRig(t *testing.T) *storeRig {
	t.Helper()
	r := &storeRig{rig: newRig(t), dir: t.TempDir(), max: 64, wall: time.Now(), boot: "first"}
	sealer, err := seal.OpenFile(filepath.Join(r.dir, "sealer"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(sealer.Close)
	r.sealer = sealer
	for i := range r.config.Keys {
		k := &r.config.Keys[i]
		k.Limits.Store, k.Grace = k.Name != "secret", kms.Grace{Encrypt: time.Hour, Decrypt: time.Hour}
	}
	all := everything()
	all.Keys = append(all.Keys, "secret")
	r.config.Policy = compile(t, all)
	r.config.Upstreams = map[string]string{"local": "one"}
	return r
}

// stop ends the service, in order.
func (r *storeRig) stop() {
	if r.file != nil {
		r.Close()
		r.file.Close()
		r.file = nil
	}
}

// restart ends the service, in order, and begins the next.
func (r *storeRig) restart() cache.Restored {
	r.t.Helper()
	r.stop()
	file, err := seal.OpenStore(filepath.Join(r.dir, "store"), r.sealer)
	if err != nil {
		r.t.Fatal(err)
	}
	r.file = file
	r.Service, err = kms.New(kms.Options{
		Audit: r.audit, Quota: r.quota, MaxEntries: r.max, Now: r.clock.Now, ConfirmTimeout: 5 * time.Second,
		Store: &cache.StoreConfig{File: file, Wall: func() time.Time { return r.wall }, Boot: r.boot},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(r.Close)
	r.apply()
	began := time.Now()
	restored, err := r.Restore()
	r.took = time.Since(began)
	if err != nil {
		r.t.Fatalf("Restore: %v", err)
	}
	return restored
}

func (r *storeRig) encrypt(key string) ([]byte, cache.Source, error) {
	answer, err := r.Encrypt(r.t.Context(), caller(r.t, orders), kms.EncryptRequest{
		Key: key, Plaintext: []byte("text"), Context: map[string]string{"tenant": "a"},
	})
	return answer.Message, answer.KeyUse.Freshness.Source, err
}

func (r *storeRig) decrypt(message []byte) (cache.Source, error) {
	answer, err := r.Decrypt(r.t.Context(), caller(r.t, orders), kms.DecryptRequest{Message: message})
	if err == nil && string(answer.Plaintext) != "text" {
		r.t.Errorf("plaintext %q", answer.Plaintext)
	}
	return answer.KeyUse.Freshness.Source, err
}

// used has both directions of a key in the store.
func (r *storeRig) used(key string) []byte {
	r.t.Helper()
	message, _, err := r.encrypt(key)
	if err == nil {
		_, err = r.decrypt(message)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return message
}

// TestRestartWithoutBackend: both directions, also of a key that binds the context, and
// exactly as long as the key's grace allows.
func TestRestartWithoutBackend(t *testing.T) {
	for _, bound := range []bool{false, true} {
		t.Run(fmt.Sprintf("bind_context=%v", bound), func(t *testing.T) {
			r := newStoreRig(t)
			r.config.Keys[0].BindContext = bound
			r.restart()
			message, kept := r.used("orders"), r.used("secret")
			r.backend.fail(unreachable())
			r.stop()
			r.boot, r.wall = "second", r.wall.Add(time.Hour)
			if got := r.restart(); got.DataKeys != 2 || got.Age != time.Hour {
				t.Errorf("restored %+v, want two data keys from an hour ago", got)
			}
			if _, source, err := r.encrypt("orders"); err != nil || source != cache.Grace {
				t.Errorf("encrypt: %v, %v", source, err)
			}
			if source, err := r.decrypt(message); err != nil || source != cache.Grace {
				t.Errorf("decrypt: %v, %v", source, err)
			}
			_, err := r.decrypt(kept)
			wantReason(t, err, kms.ReasonBackendDown)
			r.clock.Advance(5*time.Minute + 1) // max_age and an hour since the confirmation
			_, _, err = r.encrypt("orders")
			wantReason(t, err, kms.ReasonBackendDown)
			_, err = r.decrypt(message)
			wantReason(t, err, kms.ReasonBackendDown)
		})
	}
}

// TestRevokedBeforeTheRestart is told as before it.
func TestRevokedBeforeTheRestart(t *testing.T) {
	r := newStoreRig(t)
	r.restart()
	message := r.used("orders")
	r.backend.fail(&plugins.Error{Class: plugins.KeyUnusable})
	r.clock.Advance(10 * time.Minute)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		_, _, _ = r.encrypt("orders") // suspended, asked again, revoked
		_, _ = r.decrypt(message)
		if s := r.Stats(); s.EncryptionKeys+s.DecryptionKeys == 0 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("not revoked: %+v", s)
		}
		r.clock.Advance(2 * time.Second)
	}
	r.backend.fail(unreachable())
	if got := r.restart(); got.DataKeys != 0 || got.Refused != 2 {
		t.Errorf("restored %+v, want two tombstones", got)
	}
	_, _, err := r.encrypt("orders")
	wantReason(t, err, kms.ReasonKeyUnusable)
	_, err = r.decrypt(message)
	wantReason(t, err, kms.ReasonKeyUnusable)
	r.backend.fail(nil)
	r.clock.Advance(time.Minute)
	if _, _, err := r.encrypt("orders"); err != nil {
		t.Errorf("after a yes: %v", err)
	}
	if _, err := r.decrypt(message); err != nil {
		t.Errorf("after a yes: %v", err)
	}
}

// TestRestartWithAnotherConfiguration takes in what still fits.
func TestRestartWithAnotherConfiguration(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*storeRig)
		want   int
	}{
		"same":                {func(*storeRig) {}, 4},
		"key gone":            {func(r *storeRig) { r.config.Keys = r.config.Keys[1:] }, 2},
		"opt-out":             {func(r *storeRig) { r.config.Keys[0].Limits.Store = false }, 2},
		"another wrapping":    {func(r *storeRig) { r.config.Keys[0].Wraps[0].WrappingKey = "local:other" }, 2},
		"names are exchanged": {func(r *storeRig) { k := r.config.Keys; k[0].Name, k[1].Name = k[1].Name, k[0].Name }, 0},
		"another upstream":    {func(r *storeRig) { r.config.Upstreams = map[string]string{"local": "two"} }, 0},
		"another backend": {func(r *storeRig) {
			r.config.Backends["other"] = r.backend
			r.config.Keys[0].Wraps[0].Backend = "other"
		}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			r := newStoreRig(t)
			r.restart()
			r.used("orders")
			r.used("archive")
			r.used("secret")
			c.change(r)
			if got := r.restart(); got.DataKeys != c.want {
				t.Errorf("restored %+v, want %d data keys", got, c.want)
			}
		})
	}
}

// TestOptOutByReload takes data keys off the disk, and leaves them in memory.
func TestOptOutByReload(t *testing.T) {
	r := newStoreRig(t)
	r.restart()
	r.used("orders")
	r.config.Keys[0].Limits.Store = false
	r.apply()
	if _, source, err := r.encrypt("orders"); err != nil || source != cache.Cached {
		t.Errorf("encrypt: %v, %v; want it cached", source, err)
	}
	if _, _, err := r.Evict("archive"); err != nil { // waits for the disk
		t.Fatal(err)
	}
	r.file.Close() // a crash
	r.config.Keys[0].Limits.Store = true
	if got := r.restart(); got.DataKeys != 0 {
		t.Errorf("restored %+v, want nothing", got)
	}
}

// TestEvictIsDurable: what an administrator evicts is not there after a crash.
func TestEvictIsDurable(t *testing.T) {
	r := newStoreRig(t)
	r.restart()
	r.used("orders")
	r.used("archive")
	if got := r.restart(); got.DataKeys != 4 {
		t.Fatalf("restored %+v", got)
	}
	if n, known, err := r.Evict("orders"); n != 2 || !known || err != nil {
		t.Errorf("Evict = %d, %v, %v", n, known, err)
	}
	r.file.Close() // a crash: nothing is saved any more
	if got := r.restart(); got.DataKeys != 2 {
		t.Errorf("restored %+v, want the two of the other key", got)
	}
	r.file.Close()
	if _, _, err := r.Evict("archive"); err == nil {
		t.Error("an eviction that is not on disk is no error")
	}
}

// TestLargeStore comes back in well under a second.
func TestLargeStore(t *testing.T) {
	const entries = 10_000
	r := newStoreRig(t)
	r.max = entries
	r.config.Keys[0].Partition = kms.PartitionContext
	r.restart()
	for i := range entries {
		_, err := r.Encrypt(context.Background(), caller(t, orders), kms.EncryptRequest{
			Key: "orders", Context: map[string]string{"tenant": fmt.Sprint(i)},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	r.stop()
	r.backend.fail(unreachable())
	quickest := time.Hour
	for range 3 { // the machine may have others to serve
		got := r.restart()
		if got.DataKeys != entries {
			t.Errorf("restored %+v, want %d", got, entries)
		}
		quickest = min(quickest, r.took)
	}
	t.Logf("%d data keys in %v", entries, quickest)
	if quickest > time.Second {
		t.Errorf("%d data keys took %v, want under a second", entries, quickest)
	}
}

// TestRestartWithTwoBackends brings data keys back with all their wraps, and drops those
// of which one backend is another now.
func TestRestartWithTwoBackends(t *testing.T) {
	r := newStoreRig(t)
	dir := t.TempDir()
	newKeystore(t, dir, "orders-b")
	b := &troubled{Backend: openLocal(t, dir)}
	r.config.Backends["b"] = b
	r.config.Keys[0].Wraps = append(r.config.Keys[0].Wraps, kms.Wrap{Backend: "b", WrappingKey: "local:orders-b"})
	r.config.Upstreams["b"] = "two"
	r.restart()
	message := r.used("orders")
	r.backend.fail(unreachable())
	b.fail(unreachable())
	if got := r.restart(); got.DataKeys != 2 {
		t.Fatalf("restored %+v, want a data key of each direction", got)
	}
	if _, err := r.decrypt(message); err != nil {
		t.Errorf("decrypt in an outage: %v", err)
	}
	again, _, err := r.encrypt("orders")
	if err != nil {
		t.Fatalf("encrypt in an outage: %v", err)
	}
	if got := wrapsOf(t, again); len(got) != 2 {
		t.Errorf("wrapped by %v, want both", got)
	}
	r.backend.fail(nil)
	if _, err := r.decrypt(again); err != nil {
		t.Errorf("one is back: %v", err)
	}
	r.config.Upstreams = map[string]string{"local": "one", "b": "three"}
	r.backend.fail(unreachable())
	if got := r.restart(); got.DataKeys != 0 {
		t.Errorf("restored %+v, want nothing: one backend is another", got)
	}
}

// TestOneOfTwoRevokedBeforeTheRestart: the yes of the other lifts nothing, as before it.
func TestOneOfTwoRevokedBeforeTheRestart(t *testing.T) {
	r := newStoreRig(t)
	dir := t.TempDir()
	newKeystore(t, dir, "orders-b")
	b := &troubled{Backend: openLocal(t, dir)}
	r.config.Backends["b"] = b
	r.config.Keys[0].Wraps = append(r.config.Keys[0].Wraps, kms.Wrap{Backend: "b", WrappingKey: "local:orders-b"})
	r.config.Upstreams["b"] = "two"
	r.restart()
	message := r.used("orders")
	b.intercept(butDescribe)
	r.clock.Advance(6 * time.Minute)
	refused := func(when string) {
		t.Helper()
		for range 5 {
			r.clock.Advance(10 * time.Second)
			_, _, err := r.encrypt("orders")
			_, err2 := r.decrypt(message)
			for _, err := range []error{err, err2} {
				if reason := kms.ReasonOf(err); reason != kms.ReasonKeyUnusable && reason != kms.ReasonKeySuspended {
					t.Errorf("%s: %v, want that the key is refused", when, err)
				}
			}
		}
	}
	refused("it says no")
	b.intercept(nil)
	b.fail(unreachable())
	r.restart()
	refused("it is away after a restart")
	b.fail(nil)
	r.clock.Advance(time.Minute)
	if _, _, err := r.encrypt("orders"); err != nil {
		t.Errorf("it says yes: %v", err)
	}
	if _, err := r.decrypt(message); err != nil {
		t.Errorf("it says yes: %v", err)
	}
}
