package kms_test

import (
	"context"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

// warm is a rig whose key orders has an hour of grace, one message encrypted, decrypted,
// one data key given away and one key wrapped, all confirmed just now.
type warm struct {
	*rig
	call     kms.Call
	message  []byte
	exported []envelope.EDK
	wrapped  []envelope.EDK
}

func newWarm(t *testing.T) *warm {
	t.Helper()
	w := &warm{rig: newRig(t), call: caller(t, orders)}
	w.grace(time.Hour)
	made, err := w.Encrypt(t.Context(), w.call, kms.EncryptRequest{Key: "orders", Plaintext: []byte("hello")})
	if err != nil {
		t.Fatal(err)
	}
	given, err := w.GenerateDataKey(t.Context(), w.call, kms.GenerateDataKeyRequest{Key: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := w.Wrap(t.Context(), w.call, kms.WrapRequest{Key: "orders", Plaintext: []byte("mine")})
	if err != nil {
		t.Fatal(err)
	}
	w.message, w.exported, w.wrapped = made.Message, given.EDKs, wrapped.EDKs
	if _, err := w.decrypt(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.open(); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *warm) encrypt() (kms.KeyUse, error) {
	made, err := w.Encrypt(w.t.Context(), w.call, kms.EncryptRequest{Key: "orders"})
	return made.KeyUse, err
}

func (w *warm) decrypt() (kms.KeyUse, error) {
	opened, err := w.Decrypt(w.t.Context(), w.call, kms.DecryptRequest{Message: w.message})
	return opened.KeyUse, err
}

func (w *warm) open() (kms.DataKeyResponse, error) {
	return w.DecryptDataKey(w.t.Context(), w.call, kms.DecryptDataKeyRequest{EDKs: w.exported})
}

// Each class of the contract, in the middle of grace: what is an outage goes on to be
// served, what is a no is not, and nothing but a confirmed no destroys anything.
func TestEveryAnswerInGrace(t *testing.T) {
	for name, tc := range map[string]struct {
		err     error
		serves  bool // in grace
		revokes bool
	}{
		"unavailable":            {unreachable(), true, false},
		"our credential expired": {plugins.Errorf(plugins.Unauthenticated, "token expired"), true, false},
		"a broken plugin":        {plugins.Errorf(plugins.Internal, "malformed"), true, false},
		"an unknown error":       {fmt.Errorf("what is this"), true, false},
		"no answer in time":      {context.DeadlineExceeded, true, false},
		"not a ciphertext of it": {plugins.Errorf(plugins.BadCiphertext, "no"), false, false},
		"an invalid request":     {plugins.Errorf(plugins.Invalid, "no"), false, false},
		"denied":                 {denied(), false, true},
		"disabled":               {plugins.Errorf(plugins.KeyUnusable, "disabled"), false, true},
		"gone":                   {gone(), false, true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWarm(t)
			w.backend.fail(unreachable())
			w.clock.Advance(6 * time.Minute)
			w.wantGrace("at first")
			w.backend.fail(tc.err)
			w.clock.Advance(10 * time.Minute)
			bound := time.Duration(0) // somebody wants to know it, so that it is asked
			strict := w.call
			strict.MaxStale = &bound
			for range 2 {
				if _, err := w.Encrypt(t.Context(), strict, kms.EncryptRequest{Key: "orders"}); err == nil {
					t.Error("confirmed without a yes")
				}
				if _, err := w.Decrypt(t.Context(), strict, kms.DecryptRequest{Message: w.message}); err == nil && tc.err != nil {
					t.Error("confirmed without a yes")
				}
				w.clock.Advance(time.Second)
			}
			if tc.revokes {
				if _, err := w.encrypt(); err == nil {
					t.Error("encrypted after a no")
				}
				if _, err := w.decrypt(); err == nil {
					t.Error("decrypted after a no")
				}
				await(t, "all is destroyed", func() bool { s := w.Stats(); return s.EncryptionKeys+s.DecryptionKeys == 0 })
				return
			}
			w.wantGrace("after it")
			if s := w.Stats(); s.Evictions != 0 || s.Suspended != 0 {
				t.Errorf("%d evicted, %d suspended", s.Evictions, s.Suspended)
			}
			w.backend.fail(nil)
			if _, err := w.Encrypt(t.Context(), strict, kms.EncryptRequest{Key: "orders"}); err != nil {
				t.Errorf("back: %v", err)
			}
		})
	}
}

func (w *warm) wantGrace(what string) {
	w.t.Helper()
	for direction, use := range map[string]func() (kms.KeyUse, error){"encrypt": w.encrypt, "decrypt": w.decrypt} {
		if got, err := use(); err != nil || got.Freshness.Source != cache.Grace {
			w.t.Errorf("%s: %s: %+v, %v; want grace", what, direction, got.Freshness, err)
		}
		if r := w.lastRecord(); r.Freshness.Source != "grace" || r.Freshness.GraceLeftMillis <= 0 {
			w.t.Errorf("%s: %s: the record says %+v", what, direction, r.Freshness)
		}
	}
}

// A data key that leaves the agent in grace is for one use, and what policy or the request
// want fresher is not given in grace.
func TestBoundsHoldInGrace(t *testing.T) {
	w := newWarm(t)
	w.backend.fail(unreachable())
	w.clock.Advance(10 * time.Minute)
	got, err := w.open()
	if err != nil || got.KeyUse.Freshness.Source != cache.Grace || time.Until(got.UseUntil) > 0 {
		t.Errorf("data key in grace: %+v, use until %v, %v; want that it is not kept", got.KeyUse.Freshness, got.UseUntil, err)
	}
	if _, err := w.GenerateDataKey(t.Context(), w.call, kms.GenerateDataKeyRequest{Key: "orders"}); kms.ReasonOf(err) != kms.ReasonBackendDown {
		t.Errorf("a new data key for a caller: %v", err)
	}
	bounded := w.call
	for stale, served := range map[time.Duration]bool{0: false, 9 * time.Minute: false, 11 * time.Minute: true} {
		bounded.MaxStale = &stale
		if _, err := w.Decrypt(t.Context(), bounded, kms.DecryptRequest{Message: w.message}); (err == nil) != served {
			t.Errorf("max_stale %v of a request: %v", stale, err)
		}
		rule := everything()
		rule.MaxStale = &stale
		w.config.Policy = compile(t, rule)
		w.apply()
		if _, err := w.decrypt(); (err == nil) != served {
			t.Errorf("max_stale %v of a rule: %v", stale, err)
		}
		w.config.Policy = compile(t, everything())
		w.apply()
	}
}

// A stream that begins before an outage goes on within grace, on record, and ends with it.
func TestStreamsGoIntoGrace(t *testing.T) {
	for name, tc := range map[string]struct {
		lasts time.Duration
		want  kms.Reason
	}{"within": {64 * time.Minute, ""}, "after": {66 * time.Minute, kms.ReasonBackendDown}} {
		t.Run(name, func(t *testing.T) {
			w := newWarm(t)
			enc, err := w.EncryptStream(t.Context(), w.call, kms.EncryptStreamRequest{Key: "orders"}, io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			w.backend.fail(unreachable())
			w.clock.Advance(tc.lasts)
			_, err = enc.Write([]byte("x"))
			wantReason(t, enc.Close(t.Context(), err), tc.want)
			if tc.want != "" {
				return
			}
			if enc.KeyUse().Freshness.Source != cache.Grace {
				t.Errorf("freshness %+v, want grace", enc.KeyUse().Freshness)
			}
			if r := w.lastRecord(); r.Kind != "end" || r.Freshness.Source != "grace" {
				t.Errorf("the record of its end: %s, %+v", r.Kind, r.Freshness)
			}
		})
	}
}

// A stream that wanted a confirmation of its own has no grace.
func TestStrictStreamsHaveNoGrace(t *testing.T) {
	w := newWarm(t)
	strict := w.call
	strict.MaxStale = new(time.Duration(0))
	enc, err := w.EncryptStream(t.Context(), strict, kms.EncryptStreamRequest{Key: "orders"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	w.backend.fail(unreachable())
	w.clock.Advance(6 * time.Minute)
	_, err = enc.Write([]byte("x"))
	wantReason(t, enc.Close(t.Context(), err), kms.ReasonBackendDown)
}
