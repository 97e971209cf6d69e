package hsm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
)

// What a token can do is found out by doing it.
func TestProbe(t *testing.T) {
	r := newRig(t)
	p, err := r.Probe(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	if p.Use != hsm.GCM || p.Token.Label != "kms" || !strings.Contains(p.Manufacturer, "SoftHSM") || p.Sessions != 8 {
		t.Errorf("probe: %+v", p)
	}
	if p.Random != nil {
		t.Errorf("random: %v", p.Random)
	}
	works := map[hsm.Suite]bool{}
	for _, trial := range p.Trials {
		works[trial.Suite] = trial.Err == nil
		if trial.Suite == hsm.GCM && (trial.IV != "caller" || trial.Pair <= 0) {
			t.Errorf("GCM: %+v", trial)
		}
	}
	// SoftHSM 2.6 has neither KWP nor OAEP with SHA-256.
	if !works[hsm.GCM] || !works[hsm.CBCHMAC] || !works[hsm.OAEPSHA1] || works[hsm.KWP] {
		t.Errorf("what works: %v", works)
	}
	if keys, err := r.Keys(bounded(t)); err != nil || len(keys) != 0 {
		t.Errorf("the probe left %d keys, %v", len(keys), err)
	}
}

func TestSuites(t *testing.T) {
	for _, suite := range []hsm.Suite{hsm.GCM, hsm.CBCHMAC, hsm.OAEPSHA1} {
		t.Run(suite.String(), func(t *testing.T) {
			r := newRig(t)
			v, other := r.key("orders", suite), r.key("other", suite)
			for _, size := range []int{1, 16, 32, 63, 64, 200, 255, hsm.MaxMaterial} {
				m := material(size)
				wrapped := r.wrap(v, m)
				r.opens(v, wrapped, m)
				if bytes.Contains(wrapped, m) && size > 1 {
					t.Errorf("%d bytes stand in the clear", size)
				}
				_ = r.fails(other, wrapped, hsm.BadCiphertext)
			}
			m := material(32)
			wrapped := r.wrap(v, m)
			if _, err := r.Unwrap(bounded(t), v, nil, wrapped, []byte("another")); hsm.KindOf(err) != hsm.BadCiphertext {
				t.Errorf("with another binding: %v", err)
			}
			for i := range wrapped {
				damaged := bytes.Clone(wrapped)
				damaged[i] ^= 0x10
				_ = r.fails(v, damaged, hsm.BadCiphertext)
			}
			for i := range wrapped {
				_ = r.fails(v, wrapped[:i], hsm.BadCiphertext)
			}
			for _, size := range []int{0, hsm.MaxMaterial + 1} {
				if _, err := r.Wrap(bounded(t), v, nil, make([]byte, size), bound); hsm.KindOf(err) != hsm.Invalid {
					t.Errorf("%d bytes: %v", size, err)
				}
			}
			r.opens(v, wrapped, m)
			if n := r.attached(); n != 1 {
				t.Errorf("attached %d times: what callers send made it reconnect", n)
			}
		})
	}
}

// Versions of a key: wrapped under one, it opens under no other; disabled, it does
// nothing; destroyed, it is gone from the token.
func TestVersions(t *testing.T) {
	r := newRig(t)
	v1 := r.key("orders", 0)
	m := material(32)
	wrapped := r.wrap(v1, m)
	k, err := r.Rotate(bounded(t), "orders", 0)
	if err != nil || k.Current != 2 || len(k.Versions) != 2 {
		t.Fatalf("Rotate: %+v, %v", k, err)
	}
	r.opens(k.Versions[0], wrapped, m)
	_ = r.fails(k.Versions[1], wrapped, hsm.BadCiphertext)
	if _, err := r.Destroy(bounded(t), "orders", 1); hsm.KindOf(err) != hsm.Invalid {
		t.Errorf("destroying an enabled version: %v", err)
	}
	if k, err = r.SetState(bounded(t), "orders", 1, hsm.Disabled); err != nil {
		t.Fatal(err)
	}
	_ = r.fails(k.Versions[0], wrapped, hsm.KeyUnusable)
	if k, err = r.SetState(bounded(t), "orders", 1, hsm.Enabled); err != nil {
		t.Fatal(err)
	}
	r.opens(k.Versions[0], wrapped, m)
	_, err = r.SetState(bounded(t), "orders", 1, hsm.Disabled)
	if err == nil {
		k, err = r.Destroy(bounded(t), "orders", 1)
	}
	if err != nil || k.Versions[0].State != hsm.Destroyed {
		t.Fatalf("Destroy: %+v, %v", k, err)
	}
	_ = r.fails(k.Versions[0], wrapped, hsm.KeyUnusable)
	_ = r.fails(v1, wrapped, hsm.KeyNotFound) // with what was read before
	for name, err := range map[string]error{
		"a second key of the name": second(r.CreateKey(bounded(t), "orders", 0)),
		"no name":                  second(r.CreateKey(bounded(t), "", 0)),
		"a name with a slash":      second(r.CreateKey(bounded(t), "a/b", 0)),
	} {
		if hsm.KindOf(err) != hsm.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := r.Key(bounded(t), "missing"); hsm.KindOf(err) != hsm.KeyNotFound {
		t.Errorf("a key that is not there: %v", err)
	}
}

// A version that is disabled is so on the token, for every program that uses it, and
// the token stays well.
func TestDisabledOnTheToken(t *testing.T) {
	for _, suite := range []hsm.Suite{hsm.GCM, hsm.CBCHMAC, hsm.OAEPSHA1} {
		t.Run(suite.String(), func(t *testing.T) {
			r := newRig(t)
			before := r.key("orders", suite)
			m := material(32)
			wrapped := r.wrap(before, m)
			if _, err := r.SetState(bounded(t), "orders", 1, hsm.Disabled); err != nil {
				t.Fatal(err)
			}
			_ = r.fails(before, wrapped, hsm.KeyUnusable) // with what was read before
			if err := r.Check(bounded(t)); err != nil {
				t.Errorf("Check: %v", err)
			}
			k, err := r.SetState(bounded(t), "orders", 1, hsm.Enabled)
			if err != nil {
				t.Fatal(err)
			}
			r.opens(k.Versions[0], wrapped, m)
			r.opens(k.Versions[0], r.wrap(k.Versions[0], m), m)
			if n := r.attached(); n != 1 {
				t.Errorf("attached %d times, want once", n)
			}
		})
	}
}

func second(_ *hsm.Key, err error) error { return err }

func TestConcurrency(t *testing.T) {
	r := newRig(t, func(_ *rig, c *hsm.Config) { c.Sessions = 3 })
	v := r.key("orders", 0)
	var load sync.WaitGroup
	for range 12 {
		load.Go(func() {
			for range 40 {
				m := material(32)
				wrapped, err := r.Wrap(t.Context(), v, nil, m, bound)
				if err != nil {
					t.Errorf("Wrap: %v", err)
					return
				}
				if got, err := r.Unwrap(t.Context(), v, nil, wrapped, bound); err != nil || !bytes.Equal(got, m) {
					t.Errorf("Unwrap: %v", err)
					return
				}
				_, _ = r.Unwrap(t.Context(), v, nil, wrapped[:len(wrapped)-1], bound) // sessions end and begin
			}
		})
	}
	load.Wait()
}

// The files of the token go away and come back: no restart, and the same keys.
func TestTokenGoneAndBack(t *testing.T) {
	r := newRig(t, func(_ *rig, c *hsm.Config) { c.Patience = 50 * time.Millisecond })
	v := r.key("orders", 0)
	m := material(32)
	wrapped := r.wrap(v, m)
	if err := os.Rename(r.path("tokens"), r.path("away")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(r.path("tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	_ = r.fails(v, wrapped, hsm.Unavailable)
	if err := r.Check(bounded(t)); hsm.KindOf(err) != hsm.Unavailable {
		t.Errorf("Check: %v", err)
	}
	if err := errors.Join(os.Remove(r.path("tokens")), os.Rename(r.path("away"), r.path("tokens"))); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the token is back", func() error {
		_, err := r.Unwrap(t.Context(), v, nil, wrapped, bound)
		return err
	})
	r.opens(v, wrapped, m)
}

// A token that is gone has no keys, which says nothing of them.
func TestTokenGoneIsNoAnswer(t *testing.T) {
	for name, ask := range map[string]func(r *rig) error{
		"one key":   func(r *rig) error { _, err := r.Version(bounded(r.t), "orders", 2); return err },
		"all keys":  func(r *rig) error { _, err := r.Keys(bounded(r.t)); return err },
		"no key":    func(r *rig) error { _, err := r.Key(bounded(r.t), "letters"); return err },
		"to create": func(r *rig) error { _, err := r.CreateKey(bounded(r.t), "letters", 0); return err },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(_ *rig, c *hsm.Config) { c.Patience = 50 * time.Millisecond })
			v := r.key("orders", 0)
			wrapped := r.wrap(v, material(32))
			if err := os.Rename(r.path("tokens"), r.path("away")); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(r.path("tokens"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := ask(r); hsm.KindOf(err) != hsm.Unavailable {
				t.Errorf("%v, want Unavailable", err)
			}
			if err := errors.Join(os.Remove(r.path("tokens")), os.Rename(r.path("away"), r.path("tokens"))); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the token is back", func() error {
				_, err := r.Unwrap(t.Context(), v, nil, wrapped, bound)
				return err
			})
		})
	}
}

// A key that another application deletes and makes anew, under the same ID and
// label, is not taken for the one it was.
func TestSubstitutedKey(t *testing.T) {
	r := newRig(t)
	v := r.key("orders", 0)
	wrapped := r.wrap(v, material(32))
	id := fmt.Sprintf("%x", v.ID)
	r.tool("--delete-object", "--type", "secrkey", "--id", id)
	_ = r.fails(v, wrapped, hsm.KeyNotFound)
	r.tool("--keygen", "--key-type", "AES:32", "--id", id, "--label", "kmsagent/orders/v1", "--sensitive", "--private")
	if err := r.fails(v, wrapped, hsm.KeyUnusable); !strings.Contains(err.Error(), "canary") {
		t.Errorf("error: %v", err)
	}
	if _, err := r.Wrap(bounded(t), v, nil, material(32), bound); hsm.KindOf(err) != hsm.KeyUnusable {
		t.Errorf("Wrap: %v", err)
	}
	r.tool("--keygen", "--key-type", "AES:32", "--id", id, "--label", "kmsagent/orders/v1", "--sensitive", "--private")
	if err := r.fails(v, wrapped, hsm.KeyUnusable); !strings.Contains(err.Error(), "several keys") {
		t.Errorf("error with two: %v", err)
	}
	if n := r.attached(); n != 1 {
		t.Errorf("attached %d times, want once: nothing of this is cured by another connection", n)
	}
}

// A token that is made anew has none of the keys.
func TestTokenMadeAnew(t *testing.T) {
	r := newRig(t)
	v := r.key("orders", 0)
	wrapped := r.wrap(v, material(32))
	r.run("softhsm2-util", "--init-token", "--token", "kms", "--label", "kms", "--so-pin", "officer-1", "--pin", userPIN)
	eventually(t, "the key is not found", func() error {
		if _, err := r.Unwrap(t.Context(), v, nil, wrapped, bound); hsm.KindOf(err) != hsm.KeyNotFound {
			return fmt.Errorf("got %w", err)
		}
		return nil
	})
}

// A PIN that is changed does not end what runs. The next login fails, once, and
// works when the file has the new one.
func TestPINChanged(t *testing.T) {
	r := newRig(t, func(_ *rig, c *hsm.Config) { c.Patience = 2 * time.Second })
	v := r.key("orders", 0)
	m := material(32)
	wrapped := r.wrap(v, m)
	r.tool("--change-pin", "--new-pin", "user-5678")
	r.opens(v, wrapped, m)
	// The connection is lost.
	if err := os.Rename(r.path("tokens"), r.path("away")); err != nil {
		t.Fatal(err)
	}
	_ = r.fails(v, wrapped, hsm.Unavailable)
	if err := os.Rename(r.path("away"), r.path("tokens")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the PIN is refused", func() error {
		if _, err := r.Unwrap(t.Context(), v, nil, wrapped, bound); hsm.KindOf(err) != hsm.Unauthenticated {
			return fmt.Errorf("got %w", err)
		}
		return nil
	})
	r.write("pin.new", "user-5678\n")
	if err := os.Rename(r.path("pin.new"), r.path("pin")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new PIN is taken", func() error {
		_, err := r.Unwrap(t.Context(), v, nil, wrapped, bound)
		return err
	})
	r.opens(v, wrapped, m)
}

func TestCallersTime(t *testing.T) {
	r := newRig(t)
	v := r.key("orders", 0)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 20 {
		if _, err := r.Wrap(ctx, v, nil, material(32), bound); err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("Wrap: %v", err)
		}
	}
	r.wrap(v, material(32))
}

func TestOpenRefuses(t *testing.T) {
	for name, module := range map[string]string{"no such file": "/nowhere.so", "absolute": "softhsm.so", "no PKCS#11 module": "/lib/x86_64-linux-gnu/libc.so.6"} {
		if _, err := hsm.Open(hsm.Config{Module: module, Login: &hsm.Ledger{}}); err == nil || !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(name)) {
			t.Errorf("%s: %v, want %q", module, err, name)
		}
	}
}
