package kms_test

import (
	"strings"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/plugins"
)

// once has the next call of a kind fail, and all that follow find nobody.
func (b *troubled) once(kind string, err error) {
	heard := false
	b.intercept(func(call string) error {
		b.mu.Lock()
		defer b.mu.Unlock()
		switch {
		case heard:
			return unreachable()
		case call != kind:
			return nil
		}
		heard = true
		return err
	})
}

// What a backend said of a key that it refused stands in the status, whoever heard it, for
// as long as nobody hears more.
func TestHealthSaysWhyAKeyIsRefused(t *testing.T) {
	const why = "the token has no key with the ID 2a"
	for name, hears := range map[string]func(*warm) error{
		"wrap": func(w *warm) error {
			_, err := w.GenerateDataKey(w.t.Context(), w.call, kms.GenerateDataKeyRequest{Key: "orders"})
			return err
		},
		"unwrap": func(w *warm) error {
			_, err := w.Unwrap(w.t.Context(), w.call, kms.UnwrapRequest{EDKs: w.wrapped})
			return err
		},
		"describe": func(w *warm) error {
			w.clock.Advance(6 * time.Minute)
			_, err := w.encrypt()
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWarm(t)
			w.backend.once(name, plugins.Errorf(plugins.KeyNotFound, "%s", why))
			if err := hears(w); err == nil {
				t.Fatal("served, though the backend refused it")
			}
			for range 32 {
				if got := w.health().Problem; !strings.Contains(got, why) {
					t.Fatalf("problem = %q, want it to say %q", got, why)
				}
			}
		})
	}
}

// What a backend says is shown so that it harms no terminal and fills no log.
func TestHealthIsPrintable(t *testing.T) {
	w := newWarm(t)
	w.backend.once("wrap", plugins.Errorf(plugins.KeyNotFound, "gone\x1b[2J%s", strings.Repeat("x", 1<<20)))
	_, _ = w.GenerateDataKey(t.Context(), w.call, kms.GenerateDataKeyRequest{Key: "orders"})
	got := w.health().Problem
	if !strings.Contains(got, "gone") || strings.Contains(got, "\x1b") || len(got) > 2048 {
		t.Errorf("problem = %.100q of %d bytes, want a printable one", got, len(got))
	}
}
