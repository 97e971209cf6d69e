package kms_test

import (
	"bytes"
	"io"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

// Callers read each cure that an unusable version may have: which it needs, only the
// backend knows.
func TestUnusableNamesTheCures(t *testing.T) {
	r := newRig(t)
	r.backend.intercept(func(string) error { return plugins.Errorf(plugins.KeyUnusable, "it is worn") })
	r.clock.Advance(6 * time.Minute)
	_, err := r.Encrypt(t.Context(), caller(t, orders), kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
	wantReason(t, err, kms.ReasonKeyUnusable)
	for _, cure := range []string{"enable or restore it", "must be rotated"} {
		if err == nil || !strings.Contains(err.Error(), cure) {
			t.Errorf("%v has no %q", err, cure)
		}
	}
}

// A single no, to the question which versions there are, must be made sure of
// by another question: it destroys nothing by itself.
func TestOneNoIsNotARevocation(t *testing.T) {
	r := newRig(t)
	ctx, c := t.Context(), caller(t, orders)
	m := r.material()
	r.clock.Advance(6 * time.Minute) // the versions are asked for again
	var asked atomic.Int32
	r.backend.intercept(func(call string) error {
		if call == "describe" && asked.Add(1) == 1 {
			return plugins.Errorf(plugins.KeyNotFound, "a slip")
		}
		return nil
	})
	_, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
	wantReason(t, err, kms.ReasonKeyUnusable)
	// Of decryption there is nothing at hand to ask with.
	await(t, "the suspension of encryption ends", func() bool { return r.Stats().Suspended <= 1 })
	if got := r.Stats(); got.Evictions != 0 {
		t.Errorf("%d data keys were destroyed for a single no", got.Evictions)
	}
	r.clock.Advance(time.Second)
	if _, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")}); err != nil {
		t.Errorf("after the slip: %v", err)
	}
	if _, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: m.message}); err != nil {
		t.Errorf("after the slip: %v", err)
	}
	if asked.Load() < 2 {
		t.Error("the no was not made sure of")
	}
}

// await waits, for ten seconds at most, for what happens beside the test.
func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still waiting: %s", what)
		}
	}
}

// A caller who makes messages of several names must not learn which names exist.
func TestMessagesTellNothingOfOtherKeys(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	mine := r.material().direct
	named := func(name string) envelope.EDK {
		return changed(t, mine, func(i *envelope.ProviderInfo) { i.Key, i.URI = name, "local:"+name })
	}
	nobody := envelope.EDK{ProviderID: "aws-kms", ProviderInfo: []byte("arn"), Ciphertext: []byte("x")}
	for name, edks := range map[string]func(other string) []envelope.EDK{
		"after mine":        func(other string) []envelope.EDK { return []envelope.EDK{mine, named(other)} },
		"before mine":       func(other string) []envelope.EDK { return []envelope.EDK{named(other), mine} },
		"alone":             func(other string) []envelope.EDK { return []envelope.EDK{nobody, named(other)} },
		"before an unknown": func(other string) []envelope.EDK { return []envelope.EDK{named(other), named("none-such")} },
		"after an unknown":  func(other string) []envelope.EDK { return []envelope.EDK{named("none-such"), named(other)} },
	} {
		t.Run(name, func(t *testing.T) {
			ask := func(other string) kms.Error {
				message, err := envelope.Seal(nil, bytes.Repeat([]byte{1}, 32), edks(other), nil, []byte("x"))
				if err != nil {
					t.Fatal(err)
				}
				_, err = r.Decrypt(t.Context(), c, kms.DecryptRequest{Message: message})
				e, ok := err.(*kms.Error) //nolint:errorlint // exactly this type is the contract
				if !ok {
					t.Fatalf("error %T: %v", err, err)
				}
				told := *e
				told.Cause = nil // stays on the host
				if told.Key == other {
					told.Key = "other"
				}
				return told
			}
			if diff := cmp.Diff(ask("secret"), ask("no-such")); diff != "" {
				t.Errorf("a forbidden and an unknown key differ (-forbidden +unknown):\n%s", diff)
			}
		})
	}
}

// What a caller sends must not fill the disk under the audit log.
func TestNoHugeContextOnRecord(t *testing.T) {
	r := newRig(t)
	m := r.material()
	huge := map[string]string{}
	for i := range 10_000 {
		huge[strconv.Itoa(i)] = strings.Repeat("x", 50)
	}
	for _, who := range []string{orders, stranger} {
		c := caller(t, who)
		for name, do := range map[string]func() error{
			"encrypt": func() error {
				_, err := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: "orders", Context: huge})
				return err
			},
			"encrypt stream": func() error {
				_, err := r.EncryptStream(t.Context(), c, kms.EncryptStreamRequest{Key: "orders", Context: huge}, io.Discard)
				return err
			},
			"reencrypt": func() error {
				_, err := r.ReEncrypt(t.Context(), c, kms.ReEncryptRequest{Message: m.message, DestinationContext: huge, ReplaceContext: true})
				return err
			},
			"generate data key": func() error {
				_, err := r.GenerateDataKey(t.Context(), c, kms.GenerateDataKeyRequest{Key: "orders", Context: huge})
				return err
			},
			"decrypt data key": func() error {
				_, err := r.DecryptDataKey(t.Context(), c, kms.DecryptDataKeyRequest{EDKs: []envelope.EDK{m.exported}, Context: huge})
				return err
			},
			"wrap": func() error {
				_, err := r.Wrap(t.Context(), c, kms.WrapRequest{Key: "orders", Plaintext: []byte("x"), Context: huge})
				return err
			},
			"unwrap": func() error {
				_, err := r.Unwrap(t.Context(), c, kms.UnwrapRequest{EDKs: []envelope.EDK{m.wrapped}, Context: huge})
				return err
			},
		} {
			want := kms.ReasonInvalidRequest
			if who == stranger {
				want = kms.ReasonAccessDenied
			}
			wantReason(t, do(), want)
			if got := r.lastRecord(); len(got.Context) > envelope.MaxContextPairs || got.Reason != string(want) {
				t.Errorf("%s: record of %d pairs, %s", name, len(got.Context), got.Reason)
			}
		}
	}
}

// A data key that was asked for under the old configuration does not survive
// the new one, which may have taken the key away or given it another backend. The
// operation begins anew, and the new one decides; a rule
// for one call at a time does not refuse it because of its first beginning.
func TestNothingOfAnOldConfigurationIsKept(t *testing.T) {
	other := &troubled{}
	for name, tc := range map[string]struct {
		change func(*rig)
		want   kms.Reason
		cached uint64
	}{
		"key removed": {func(r *rig) { r.config.Keys = r.config.Keys[1:] }, kms.ReasonAccessDenied, 0},
		"backend replaced": {func(r *rig) {
			other.Backend = r.backend.Backend
			r.config.Backends = map[string]plugins.Backend{"local": other}
		}, "", 1},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.limit(policy.Limits{Concurrency: number(1), PerDay: number(1)})
			var once atomic.Bool
			r.backend.intercept(func(call string) error {
				// The operation holds the old state; its data key is not asked for yet.
				if call == "describe" && once.CompareAndSwap(false, true) {
					tc.change(r)
					r.apply()
				}
				return nil
			})
			_, err := r.Encrypt(t.Context(), caller(t, orders), kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
			wantReason(t, err, tc.want)
			if got := r.Stats(); got.EncryptionKeys != tc.cached {
				t.Errorf("%d data keys are cached, want %d", got.EncryptionKeys, tc.cached)
			}
		})
	}
}

// A stream that lasts is no way around max_age: revocations reach it, and an
// outage ends it when the last confirmation is too old.
func TestLongStreamsNeedConfirmation(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*rig)
		want   kms.Reason
	}{
		"all is well": {func(*rig) {}, ""},
		"revoked": {func(r *rig) {
			if err := r.keystore.Disable("orders", "1"); err != nil {
				r.t.Fatal(err)
			}
		}, kms.ReasonKeyUnusable},
		"unreachable": {func(r *rig) { r.backend.fail(unreachable()) }, kms.ReasonBackendDown},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			c := caller(t, orders)
			message := encryptStream(t, r, c, []byte("plaintext"))
			if _, err := r.keystore.Rotate("orders"); err != nil { // a current version cannot be disabled
				t.Fatal(err)
			}
			enc, err := r.EncryptStream(t.Context(), c, kms.EncryptStreamRequest{Key: "orders"}, io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			dec, err := r.DecryptStream(t.Context(), c, nil, bytes.NewReader(message))
			if err != nil {
				t.Fatal(err)
			}
			tc.change(r)
			r.clock.Advance(6 * time.Minute)
			_, err = enc.Write([]byte("x"))
			wantReason(t, enc.Close(t.Context(), err), tc.want)
			got, err := io.ReadAll(dec)
			wantReason(t, dec.Close(t.Context(), err), tc.want)
			if tc.want != "" && len(got) != 0 {
				t.Errorf("%d bytes of plaintext came out", len(got))
			}
		})
	}
}

// slowly advances the clock while a stream waits for the rest of a message.
type slowly struct {
	io.Reader
	wait func()
}

func (s slowly) Read(p []byte) (int, error) {
	s.wait()
	return s.Reader.Read(p)
}

// What is decided before a stream waits is not what counts after.
func TestStreamsAreCheckedAfterWaiting(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	message := encryptStream(t, r, c, []byte("plaintext"))
	withdraw := func() {}
	some := int64(len(message) - 20)
	source := io.MultiReader(io.LimitReader(bytes.NewReader(message), some), slowly{bytes.NewReader(message[some:]), func() { withdraw() }})
	dec, err := r.DecryptStream(t.Context(), c, nil, source)
	if err != nil {
		t.Fatal(err)
	}
	enc, err := r.EncryptStream(t.Context(), c, kms.EncryptStreamRequest{Key: "orders"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	withdraw = func() {
		r.config.Policy = compile(t)
		r.apply()
		r.clock.Advance(time.Minute)
	}
	got, err := io.ReadAll(dec)
	wantReason(t, dec.Close(t.Context(), err), kms.ReasonAccessDenied)
	if len(got) != 0 {
		t.Errorf("%d bytes of plaintext came out after the permission was gone", len(got))
	}
	wantReason(t, enc.Close(t.Context(), nil), kms.ReasonAccessDenied)
}
