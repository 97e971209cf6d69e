package kms_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

func TestAFailedReEncryptionIsRecordedAsItWas(t *testing.T) {
	r := newRig(t)
	m := r.material()
	ctx, c := t.Context(), caller(t, orders)
	_, err := r.ReEncrypt(ctx, c, kms.ReEncryptRequest{Message: m.message, DestinationKey: "secret"})
	wantReason(t, err, kms.ReasonAccessDenied)
	rec := r.lastRecord()
	if rec.Source == nil || rec.Source.Key != "orders" || rec.Source.KeyVersion != "1" || rec.Source.MessageID == "" || rec.Source.Rule != "orders" {
		t.Errorf("source = %+v; want the message that was opened", rec.Source)
	}
	if rec.Key != "secret" || rec.KeyVersion != "" || rec.MessageID != "" || rec.Freshness.Source != "" || rec.BytesOut != 0 || rec.Rule != "" {
		t.Errorf("record = %+v; it says of the destination what was so of the source", rec)
	}

	c = caller(t, stranger)
	_, err = r.ReEncrypt(ctx, c, kms.ReEncryptRequest{Message: m.message, DestinationKey: "archive"})
	wantReason(t, err, kms.ReasonAccessDenied)
	if rec = r.lastRecord(); rec.Key != "archive" || rec.Source == nil || rec.Source.Key != "orders" || rec.MessageID != "" {
		t.Errorf("record = %+v, source %+v; want both keys where the source was denied", rec, rec.Source)
	}
}

func TestUnknownKeysAreToldApartOnRecordOnly(t *testing.T) {
	r := newRig(t)
	open := everything()
	open.Keys = []string{"*"}
	r.config.Policy = compile(t, open)
	r.apply()
	_, err := r.Encrypt(t.Context(), caller(t, orders), kms.EncryptRequest{Key: "nosuch", Plaintext: []byte("x")})
	wantReason(t, err, kms.ReasonAccessDenied)
	if rec := r.lastRecord(); rec.Rule != "" || !strings.Contains(rec.Detail, "no key of this name") {
		t.Errorf("record: rule %q, detail %q; the rule allows, the key is missing", rec.Rule, rec.Detail)
	}
	if strings.Contains(err.Error(), "no key of this name") {
		t.Errorf("the caller is told: %v", err)
	}
}

func TestALongNameIsNotCutToAKeys(t *testing.T) {
	r := newRig(t)
	name := strings.Repeat("k", 128)
	r.config.Keys[0].Name = name
	rule := everything()
	rule.Keys = []string{name}
	r.config.Policy = compile(t, rule)
	r.apply()
	ctx, c := t.Context(), caller(t, orders)
	if _, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: name, Plaintext: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	_, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: name + "x", Plaintext: []byte("x")})
	wantReason(t, err, kms.ReasonAccessDenied)
}

// failing is a sink that does not take the lines of one write.
type failing struct {
	mu   sync.Mutex // guards what follows
	next bool
	all  bytes.Buffer
}

func (f *failing) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.next {
		f.next = false
		return 0, errors.New("no space left")
	}
	return f.all.Write(p)
}

func (f *failing) Sync() error    { return nil }
func (f *failing) Close() error   { return nil }
func (f *failing) String() string { return "failing" }

func (f *failing) failNext() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.next = true
}

func TestNoStartOnRecordOfWhatNeverStarted(t *testing.T) {
	sink := &failing{}
	r := newRigWithSink(t, sink)
	if _, err := r.Encrypt(t.Context(), caller(t, orders), kms.EncryptRequest{Key: "orders"}); err != nil {
		t.Fatal(err)
	}
	sink.failNext()
	_, err := r.EncryptStream(t.Context(), caller(t, orders), kms.EncryptStreamRequest{Key: "orders"}, &bytes.Buffer{})
	wantReason(t, err, kms.ReasonAuditUnavailable)
	sink.mu.Lock()
	defer sink.mu.Unlock()
	if strings.Contains(sink.all.String(), `"kind":"start"`) {
		t.Errorf("a start is on record:\n%s", sink.all.String())
	}
	if !strings.Contains(sink.all.String(), `"reason":"AUDIT_UNAVAILABLE"`) {
		t.Errorf("no record of the refusal:\n%s", sink.all.String())
	}
}

func TestUseUntilEndsWithTheConfirmation(t *testing.T) {
	r := newRig(t)
	r.config.DataKeyUse = time.Hour
	r.apply()
	ctx, c := t.Context(), caller(t, orders)
	made, err := r.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	open := func() kms.DataKeyResponse {
		t.Helper()
		got, err := r.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: made.EDKs})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	open()
	r.clock.Advance(4 * time.Minute)
	got := open()
	if got.KeyUse.Freshness.Source != cache.Cached {
		t.Fatalf("freshness = %+v; want cached", got.KeyUse.Freshness)
	}
	if left := time.Until(got.UseUntil); left > time.Minute {
		t.Errorf("use_until is %v away; upstream's word is 4 minutes old and good for 5", left)
	}
	strict := everything()
	strict.MaxStale = new(time.Duration(0))
	r.config.Policy = compile(t, strict)
	r.apply()
	if got := open(); time.Until(got.UseUntil) > 0 {
		t.Errorf("use_until is %v; policy wants each use confirmed", got.UseUntil)
	}
}

func TestBindContextFromAReloadOn(t *testing.T) {
	r := newRig(t)
	r.config.Keys[0].Partition = kms.PartitionContext
	r.apply()
	ctx, c := t.Context(), caller(t, orders)
	req := kms.EncryptRequest{Key: "orders", Plaintext: []byte("x"), Context: map[string]string{"a": "b"}}
	bound := func() bool {
		t.Helper()
		got, err := r.Encrypt(ctx, c, req)
		if err != nil {
			t.Fatal(err)
		}
		m, err := envelope.Parse(got.Message)
		if err != nil {
			t.Fatal(err)
		}
		info, err := envelope.ParseProviderInfo(m.EDKs[0].ProviderInfo)
		if err != nil {
			t.Fatal(err)
		}
		return info.ContextBound
	}
	if bound() {
		t.Fatal("the context is bound, and nobody asked")
	}
	r.config.Keys[0].BindContext = true
	r.apply()
	if !bound() {
		t.Error("a data key from before the reload is still used: the wrapping key does not bind the context")
	}
}

func TestANoCountsWhateverBecameOfTheCaller(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	if _, err := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: "orders"}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r.backend.intercept(func(call string) error {
		if call == "describe" {
			return nil
		}
		cancel() // the caller leaves while upstream says no
		return plugins.Errorf(plugins.KeyUnusable, "disabled")
	})
	_, err := r.Wrap(ctx, c, kms.WrapRequest{Key: "orders", Plaintext: []byte("k")})
	wantReason(t, err, kms.ReasonCancelled)
	if _, err := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: "orders"}); err == nil {
		t.Error("the cached data key is still used after upstream said no")
	}
}

func TestRefusalsAreBounded(t *testing.T) {
	r := newRig(t)
	refusal := &kms.Error{Reason: kms.ReasonTooLarge, Key: strings.Repeat("k", 1<<20), Message: "too large"}
	err := r.Refuse(t.Context(), caller(t, orders), "encrypt", refusal)
	var told *kms.Error
	if !errors.As(err, &told) || told.Reason != kms.ReasonTooLarge || len(told.Key) > 128 {
		t.Errorf("the caller is told of a key name of %d bytes", len(told.Key))
	}
	if rec := r.lastRecord(); rec.Key == "" || len(rec.Key) > 128 {
		t.Errorf("the record has a key name of %d bytes", len(rec.Key))
	}
}
