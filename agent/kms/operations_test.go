package kms_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

// material is what the operations below are tried on: made once, by the caller
// who may.
type material struct {
	message                   []byte
	exported, wrapped, direct envelope.EDK
}

func (r *rig) material() material {
	r.t.Helper()
	ctx, c := r.t.Context(), caller(r.t, orders)
	tenant := map[string]string{"tenant": "acme"}
	message, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("hello"), Context: tenant})
	if err != nil {
		r.t.Fatalf("encrypt: %v", err)
	}
	exported, err := r.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: "orders", Context: tenant})
	if err != nil {
		r.t.Fatalf("generate data key: %v", err)
	}
	wrapped, err := r.Wrap(ctx, c, kms.WrapRequest{Key: "orders", Plaintext: []byte("key material"), Context: tenant})
	if err != nil {
		r.t.Fatalf("wrap: %v", err)
	}
	parsed, err := envelope.Parse(message.Message)
	if err != nil {
		r.t.Fatalf("parse: %v", err)
	}
	return material{message: message.Message, exported: exported.EDKs[0], wrapped: wrapped.EDKs[0], direct: parsed.EDKs[0]}
}

type operation struct {
	name string
	// cached tells that the data key is in the cache, so that the operation
	// works while the backend is down.
	cached bool
	// local operations never ask the backend.
	local bool
	// open operations need no permission on a key.
	open bool
	do   func(r *rig, c kms.Call, m material) error
}

func operations() []operation {
	tenant := map[string]string{"tenant": "acme"}
	return []operation{
		{name: "encrypt", cached: true, do: func(r *rig, c kms.Call, _ material) error {
			_, err := r.Encrypt(context.Background(), c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x"), Context: tenant})
			return err
		}},
		{name: "decrypt", cached: true, do: func(r *rig, c kms.Call, m material) error {
			_, err := r.Decrypt(context.Background(), c, kms.DecryptRequest{Message: m.message, ExpectedContext: tenant})
			return err
		}},
		{name: "reencrypt", cached: true, do: func(r *rig, c kms.Call, m material) error {
			_, err := r.ReEncrypt(context.Background(), c, kms.ReEncryptRequest{Message: m.message})
			return err
		}},
		{name: "generate-data-key", do: func(r *rig, c kms.Call, _ material) error {
			_, err := r.GenerateDataKey(context.Background(), c, kms.GenerateDataKeyRequest{Key: "orders", Context: tenant})
			return err
		}},
		{name: "generate-data-key-without-plaintext", do: func(r *rig, c kms.Call, _ material) error {
			_, err := r.GenerateDataKeyWithoutPlaintext(context.Background(), c, kms.GenerateDataKeyRequest{Key: "orders"})
			return err
		}},
		{name: "decrypt-data-key", cached: true, do: func(r *rig, c kms.Call, m material) error {
			_, err := r.DecryptDataKey(context.Background(), c, kms.DecryptDataKeyRequest{EDKs: []envelope.EDK{m.exported}, Context: tenant})
			return err
		}},
		{name: "wrap", do: func(r *rig, c kms.Call, _ material) error {
			_, err := r.Wrap(context.Background(), c, kms.WrapRequest{Key: "orders", Plaintext: []byte("x")})
			return err
		}},
		{name: "unwrap", do: func(r *rig, c kms.Call, m material) error {
			_, err := r.Unwrap(context.Background(), c, kms.UnwrapRequest{EDKs: []envelope.EDK{m.wrapped}, Context: tenant})
			return err
		}},
		{name: "describe", cached: true, do: func(r *rig, c kms.Call, _ material) error {
			_, err := r.DescribeKey(context.Background(), c, "orders")
			return err
		}},
		{name: "generate-random", local: true, do: func(r *rig, c kms.Call, _ material) error {
			_, err := r.GenerateRandom(context.Background(), c, 16)
			return err
		}},
		{name: "list-keys", local: true, open: true, do: func(r *rig, c kms.Call, _ material) error {
			_, _, err := r.ListKeys(context.Background(), c, "", 0)
			return err
		}},
		{name: "whoami", local: true, open: true, do: func(r *rig, c kms.Call, _ material) error {
			_, err := r.WhoAmI(context.Background(), c)
			return err
		}},
	}
}

func TestEveryOperation(t *testing.T) {
	for _, op := range operations() {
		t.Run(op.name, func(t *testing.T) {
			r := newRig(t)
			m := r.material()
			t.Run("allowed", func(t *testing.T) {
				if err := op.do(r, caller(t, orders), m); err != nil {
					t.Errorf("error: %v", err)
				}
				wantRecord(t, r.lastRecord(), op.name, audit.Success, "")
			})
			t.Run("stranger", func(t *testing.T) {
				err := op.do(r, caller(t, stranger), m)
				if op.open {
					wantReason(t, err, "")
					return
				}
				wantReason(t, err, kms.ReasonAccessDenied)
				wantRecord(t, r.lastRecord(), op.name, audit.Denied, string(kms.ReasonAccessDenied))
			})
			t.Run("backend down", func(t *testing.T) {
				r.backend.fail(unreachable())
				err := op.do(r, caller(t, orders), m)
				r.backend.fail(nil)
				if op.local || op.cached && err == nil {
					wantReason(t, err, "")
					return
				}
				wantReason(t, err, kms.ReasonBackendDown)
				wantRecord(t, r.lastRecord(), op.name, audit.Error, string(kms.ReasonBackendDown))
			})
		})
	}
}

func wantRecord(t *testing.T, rec audit.Record, operation string, outcome audit.Outcome, reason string) {
	t.Helper()
	if rec.Operation != operation || rec.Outcome != outcome || rec.Reason != reason {
		t.Errorf("audit record = %s %s %q, want %s %s %q", rec.Operation, rec.Outcome, rec.Reason, operation, outcome, reason)
	}
	if rec.Caller.SPIFFEID == "" || rec.Caller.UID != 1000 || rec.RequestID == "" || rec.Door != "test" {
		t.Errorf("audit record does not say who and where: %+v", rec)
	}
}

// Each operation opens what it made and nothing that another one made.
func TestPurposesAreNoOracles(t *testing.T) {
	r := newRig(t)
	m := r.material()
	ctx, c := t.Context(), caller(t, orders)
	tenant := map[string]string{"tenant": "acme"}
	for name, edk := range map[string]envelope.EDK{"message": m.direct, "wrapped": m.wrapped, "exported": m.exported} {
		if name != "exported" {
			_, err := r.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: []envelope.EDK{edk}, Context: tenant})
			wantReason(t, err, kms.ReasonDecryptFailed)
		}
		if name != "wrapped" {
			_, err := r.Unwrap(ctx, c, kms.UnwrapRequest{EDKs: []envelope.EDK{edk}, Context: tenant})
			wantReason(t, err, kms.ReasonDecryptFailed)
		}
	}
	t.Run("a wrapped key is no data key of a message", func(t *testing.T) {
		dataKey := bytes.Repeat([]byte{7}, envelope.DataKeySize)
		wrapped, err := r.Wrap(ctx, c, kms.WrapRequest{Key: "orders", Plaintext: dataKey, Context: tenant})
		if err != nil {
			t.Fatal(err)
		}
		forged, err := envelope.Seal(nil, dataKey, []envelope.EDK{wrapped.EDKs[0]}, tenant, []byte("forged"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = r.Decrypt(ctx, c, kms.DecryptRequest{Message: forged})
		wantReason(t, err, kms.ReasonDecryptFailed)
	})
	t.Run("a data key of the caller's own opens as a message", func(t *testing.T) {
		key, err := r.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: "orders", Context: tenant})
		if err != nil {
			t.Fatal(err)
		}
		message, err := envelope.Seal(nil, key.Plaintext, []envelope.EDK{key.EDKs[0]}, tenant, []byte("in process"))
		if err != nil {
			t.Fatal(err)
		}
		got, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: message, ExpectedContext: tenant})
		if err != nil || string(got.Plaintext) != "in process" {
			t.Errorf("decrypt = %q, %v", got.Plaintext, err)
		}
	})
	t.Run("the purpose is bound by the wrapping key", func(t *testing.T) {
		_, err := r.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: []envelope.EDK{repurpose(t, m.wrapped, envelope.PurposeExported)}, Context: tenant})
		wantReason(t, err, kms.ReasonDecryptFailed)
		_, err = r.Unwrap(ctx, c, kms.UnwrapRequest{EDKs: []envelope.EDK{repurpose(t, m.exported, envelope.PurposeWrap)}, Context: tenant})
		wantReason(t, err, kms.ReasonDecryptFailed)
	})
}

func repurpose(t *testing.T, edk envelope.EDK, p envelope.Purpose) envelope.EDK {
	t.Helper()
	return changed(t, edk, func(info *envelope.ProviderInfo) {
		if info.Purpose = p; p == envelope.PurposeWrap {
			info.Check = envelope.KeyCheck{} // it has none
		}
	})
}

func changed(t *testing.T, edk envelope.EDK, change func(*envelope.ProviderInfo)) envelope.EDK {
	t.Helper()
	info, err := envelope.ParseProviderInfo(edk.ProviderInfo)
	if err != nil {
		t.Fatal(err)
	}
	change(&info)
	if edk.ProviderInfo, err = info.Marshal(); err != nil {
		t.Fatal(err)
	}
	return edk
}

// An EDK that was moved to another key, version, partition or context does not
// open, and costs the wrapping key nothing: what opened before still does.
func TestMovedDataKeysAreRefused(t *testing.T) {
	r := newRig(t)
	m := r.material()
	if _, err := r.keystore.Rotate("orders"); err != nil {
		t.Fatal(err)
	}
	ctx, c := t.Context(), caller(t, orders)
	tenant := map[string]string{"tenant": "acme"}
	for name, change := range map[string]func(*envelope.ProviderInfo){
		"key":         func(i *envelope.ProviderInfo) { i.Key, i.URI = "archive", "local:archive" },
		"version":     func(i *envelope.ProviderInfo) { i.Version = "2" },
		"no version":  func(i *envelope.ProviderInfo) { i.Version = "99" },
		"partition":   func(i *envelope.ProviderInfo) { i.Partition[0] ^= 1 },
		"foreign URI": func(i *envelope.ProviderInfo) { i.URI = "local:secret" },
	} {
		t.Run(name, func(t *testing.T) {
			_, err := r.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: []envelope.EDK{changed(t, m.exported, change)}, Context: tenant})
			if got := kms.ReasonOf(err); got != kms.ReasonDecryptFailed && got != kms.ReasonKeyUnusable {
				t.Errorf("reason = %q (%v), want it refused", got, err)
			}
			if _, err := r.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: []envelope.EDK{m.exported}, Context: tenant}); err != nil {
				t.Errorf("the original no longer opens: %v", err)
			}
		})
	}
	for name, wrong := range map[string]map[string]string{
		"other value": {"tenant": "other"}, "more": {"tenant": "acme", "x": "y"}, "none": nil,
	} {
		_, err := r.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: []envelope.EDK{m.exported}, Context: wrong})
		t.Log(name)
		wantReason(t, err, kms.ReasonDecryptFailed)
		_, err = r.Unwrap(ctx, c, kms.UnwrapRequest{EDKs: []envelope.EDK{m.wrapped}, Context: wrong})
		wantReason(t, err, kms.ReasonDecryptFailed)
	}
}

func TestUnknownAndForbiddenKeysLookAlike(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	ask := func(key string) *kms.Error {
		_, err := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: key, Plaintext: []byte("x")})
		e, ok := err.(*kms.Error) //nolint:errorlint // exactly this type is the contract
		if !ok {
			t.Fatalf("error %T", err)
		}
		e.Key = ""
		return e
	}
	if diff := cmp.Diff(ask("secret"), ask("no-such-key")); diff != "" {
		t.Errorf("forbidden and unknown differ (-forbidden +unknown):\n%s", diff)
	}
	if wraps, unwraps := r.backend.counts(); wraps+unwraps != 0 {
		t.Errorf("a denied request reached the backend: %d wraps, %d unwraps", wraps, unwraps)
	}
}

func TestDecryptFailuresLookAlike(t *testing.T) {
	r := newRig(t)
	m := r.material()
	ctx, c := t.Context(), caller(t, orders)
	damaged := bytes.Clone(m.message)
	damaged[len(damaged)-1] ^= 1
	otherKey, err := envelope.Seal(nil, bytes.Repeat([]byte{1}, 32), []envelope.EDK{m.direct}, nil, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	broken := m.direct
	broken.Ciphertext = bytes.Clone(broken.Ciphertext)
	broken.Ciphertext[len(broken.Ciphertext)-1] ^= 1
	forged, err := envelope.Seal(nil, bytes.Repeat([]byte{1}, 32), []envelope.EDK{broken}, nil, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for _, req := range []kms.DecryptRequest{
		{Message: damaged},
		{Message: otherKey},
		{Message: forged},
		{Message: m.message, ExpectedContext: map[string]string{"tenant": "other"}},
		{Message: m.message, ExpectedContext: map[string]string{"absent": ""}},
	} {
		got, err := r.Decrypt(ctx, c, req)
		wantReason(t, err, kms.ReasonDecryptFailed)
		if got.Plaintext != nil {
			t.Errorf("plaintext %q came with an error", got.Plaintext)
		}
		texts = append(texts, err.Error())
		if r.lastRecord().Detail == "" {
			t.Error("the audit record does not tell why")
		}
	}
	for _, text := range texts {
		if text != texts[0] {
			t.Errorf("failures differ outside: %q and %q", text, texts[0])
		}
	}
}

func TestForeignMessages(t *testing.T) {
	r := newRig(t)
	m := r.material()
	ctx, c := t.Context(), caller(t, orders)
	key := bytes.Repeat([]byte{1}, 32)
	foreign := envelope.EDK{ProviderID: "aws-kms", ProviderInfo: []byte("arn"), Ciphertext: []byte("x")}
	sealed := func(edks ...envelope.EDK) []byte {
		message, err := envelope.Seal(nil, key, edks, nil, []byte("x"))
		if err != nil {
			t.Fatal(err)
		}
		return message
	}
	rubbish := m.direct
	rubbish.ProviderInfo = []byte("rubbish")
	toArchive := changed(t, m.direct, func(i *envelope.ProviderInfo) { i.Key, i.URI = "archive", "local:archive" })
	toNobody := changed(t, m.direct, func(i *envelope.ProviderInfo) { i.Key = "no-such-key" })
	for name, tc := range map[string]struct {
		message []byte
		want    kms.Reason
	}{
		"empty":               {nil, kms.ReasonInvalidMessage},
		"text":                {[]byte("hello"), kms.ReasonInvalidMessage},
		"cut short":           {m.message[:len(m.message)-1], kms.ReasonInvalidMessage},
		"trailing bytes":      {append(bytes.Clone(m.message), 0), kms.ReasonInvalidMessage},
		"another system's":    {sealed(foreign), kms.ReasonInvalidMessage},
		"rubbish information": {sealed(rubbish), kms.ReasonInvalidMessage},
		"two keys":            {sealed(m.direct, toArchive), kms.ReasonInvalidMessage},
		"unknown key":         {sealed(toNobody), kms.ReasonAccessDenied},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: tc.message})
			wantReason(t, err, tc.want)
		})
	}
}

func TestReEncryptNeedsBothHalves(t *testing.T) {
	r := newRig(t)
	m := r.material()
	ctx, c := t.Context(), caller(t, orders)
	got, err := r.ReEncrypt(ctx, c, kms.ReEncryptRequest{
		Message: m.message, DestinationKey: "archive", ReplaceContext: true, DestinationContext: map[string]string{"year": "2026"},
	})
	if err != nil {
		t.Fatal(err)
	}
	rec := r.lastRecord()
	if rec.Key != "archive" || rec.Source == nil || rec.Source.Key != "orders" || rec.Source.Rule != "orders" || rec.Source.MessageID == rec.MessageID {
		t.Errorf("the record does not name both messages: %+v, source %+v", rec, rec.Source)
	}
	opened, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: got.Message, ExpectedContext: map[string]string{"year": "2026"}})
	if err != nil || string(opened.Plaintext) != "hello" || opened.KeyUse.Key != "archive" {
		t.Errorf("decrypt = %q under %q, %v", opened.Plaintext, opened.KeyUse.Key, err)
	}
	if _, err := r.ReEncrypt(ctx, c, kms.ReEncryptRequest{Message: m.message, DestinationKey: "secret"}); err == nil {
		t.Error("re-encrypted to a key that the caller may not encrypt with")
	} else {
		wantReason(t, err, kms.ReasonAccessDenied)
	}
	half := everything()
	half.Operations = []string{"encrypt"}
	r.config.Policy = compile(t, half)
	r.apply()
	_, err = r.ReEncrypt(ctx, c, kms.ReEncryptRequest{Message: m.message})
	wantReason(t, err, kms.ReasonAccessDenied)
}

func TestListKeysShowsOnlyWhatMayBeDescribed(t *testing.T) {
	r := newRig(t)
	names := func(c kms.Call, after string, limit int) ([]string, bool) {
		keys, more, err := r.ListKeys(t.Context(), c, after, limit)
		if err != nil {
			t.Fatal(err)
		}
		out := []string{}
		for _, k := range keys {
			out = append(out, k.Name)
		}
		return out, more
	}
	got, more := names(caller(t, orders), "", 0)
	if diff := cmp.Diff([]string{"archive", "orders"}, got); diff != "" || more {
		t.Errorf("keys (-want +got):\n%s more=%v", diff, more)
	}
	got, more = names(caller(t, orders), "", 1)
	if diff := cmp.Diff([]string{"archive"}, got); diff != "" || !more {
		t.Errorf("first page (-want +got):\n%s more=%v", diff, more)
	}
	got, more = names(caller(t, orders), "archive", 1)
	if diff := cmp.Diff([]string{"orders"}, got); diff != "" || more {
		t.Errorf("second page (-want +got):\n%s more=%v", diff, more)
	}
	if got, _ := names(caller(t, stranger), "", 0); len(got) != 0 {
		t.Errorf("a stranger sees %v", got)
	}
}

func TestFormerNamesAndConfiguration(t *testing.T) {
	r := newRig(t)
	m := r.material()
	ctx, c := t.Context(), caller(t, orders)
	t.Run("renamed key opens its old messages", func(t *testing.T) {
		if _, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: m.message}); err != nil {
			t.Fatal(err)
		}
		renamed := r.config
		renamed.Keys = append([]kms.Key(nil), r.config.Keys...)
		renamed.Keys[0].Name, renamed.Keys[0].FormerNames = "shop-orders", []string{"orders"}
		rule := everything()
		rule.Keys = []string{"shop-orders"}
		renamed.Policy = compile(t, rule)
		if err := r.Apply(renamed); err != nil {
			t.Fatal(err)
		}
		r.backend.fail(unreachable())
		_, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: m.message})
		wantReason(t, err, kms.ReasonBackendDown) // what was cached went with the name
		r.backend.fail(nil)
		got, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: m.message})
		if err != nil || got.KeyUse.Key != "shop-orders" {
			t.Errorf("decrypt under %q: %v", got.KeyUse.Key, err)
		}
		r.apply()
	})
	t.Run("one wrapping key, one logical key", func(t *testing.T) {
		twice := r.config
		twice.Keys = append([]kms.Key(nil), r.config.Keys...)
		twice.Keys[1].Wraps = twice.Keys[0].Wraps
		if err := r.Apply(twice); err == nil {
			t.Error("two logical keys share a wrapping key")
		}
	})
	t.Run("a key that is gone is gone at once", func(t *testing.T) {
		gone := r.config
		gone.Keys = r.config.Keys[1:]
		if err := r.Apply(gone); err != nil {
			t.Fatal(err)
		}
		_, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: m.message})
		wantReason(t, err, kms.ReasonAccessDenied)
		r.apply()
	})
}

func TestPermissionsAreDecidedForEachRequest(t *testing.T) {
	r := newRig(t)
	m := r.material()
	ctx, c := t.Context(), caller(t, orders)
	if _, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: m.message}); err != nil {
		t.Fatal(err)
	}
	r.config.Policy = compile(t, everything(), policy.Rule{
		Name: "nobody", Effect: policy.Deny, Callers: []string{"*"}, Keys: []string{"orders"}, Operations: []string{"decrypt"},
	})
	r.apply()
	_, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: m.message})
	wantReason(t, err, kms.ReasonAccessDenied)
	if got := r.lastRecord().Rule; got != "nobody" {
		t.Errorf("rule in the record = %q, want %q", got, "nobody")
	}
}

func TestFreshnessIsSaid(t *testing.T) {
	r := newRig(t)
	ctx, c := t.Context(), caller(t, orders)
	req := kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")}
	first, err := r.Encrypt(ctx, c, req)
	if err != nil || first.KeyUse.Freshness.Source != cache.Upstream || first.KeyUse.Version != "1" {
		t.Fatalf("first = %+v, %v; want upstream", first.KeyUse, err)
	}
	r.clock.Advance(30 * time.Second)
	second, err := r.Encrypt(ctx, c, req)
	if err != nil || second.KeyUse.Freshness.Source != cache.Cached || second.KeyUse.Freshness.Age != 30*time.Second {
		t.Errorf("second = %+v, %v; want cached, 30 s old", second.KeyUse, err)
	}
	c.MaxStale = new(10 * time.Second)
	third, err := r.Encrypt(ctx, c, req)
	if err != nil || third.KeyUse.Freshness.Age > 10*time.Second {
		t.Errorf("with max_stale 10 s = %+v, %v", third.KeyUse, err)
	}
	c.MaxStale = new(time.Duration(0))
	r.clock.Advance(time.Millisecond)
	r.backend.fail(unreachable())
	_, err = r.Encrypt(ctx, c, req)
	wantReason(t, err, kms.ReasonBackendDown)
}

func TestRotationAndRevocation(t *testing.T) {
	r := newRig(t)
	m := r.material()
	ctx, c := t.Context(), caller(t, orders)
	if _, err := r.keystore.Rotate("orders"); err != nil {
		t.Fatal(err)
	}
	r.clock.Advance(6 * time.Minute)
	got, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
	if err != nil || got.KeyUse.Version != "2" {
		t.Fatalf("after rotation: version %q, %v; want 2", got.KeyUse.Version, err)
	}
	if _, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: m.message}); err != nil {
		t.Errorf("a message of version 1 no longer opens: %v", err)
	}
	if err := r.keystore.Disable("orders", "1"); err != nil {
		t.Fatal(err)
	}
	r.clock.Advance(6 * time.Minute)
	for range 2 {
		_, err = r.Decrypt(ctx, c, kms.DecryptRequest{Message: m.message})
		if reason := kms.ReasonOf(err); reason != kms.ReasonKeyUnusable && reason != kms.ReasonKeySuspended {
			t.Errorf("a message of a disabled version: %v", err)
		}
	}
	if _, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: got.Message}); err != nil {
		t.Errorf("version 2 suffers for version 1: %v", err)
	}
	if err := r.keystore.Enable("orders", "1"); err != nil {
		t.Fatal(err)
	}
	r.clock.Advance(10 * time.Minute)
	if _, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: m.message}); err != nil {
		t.Errorf("after it was enabled again: %v", err)
	}
}

func TestALyingBackendLosesNothing(t *testing.T) {
	for name, lie := range map[string]func(*troubled){
		"wrap is damaged":     func(b *troubled) { b.lie(func(p []byte) []byte { p[len(p)-1] ^= 1; return p }, nil) },
		"wrap is empty":       func(b *troubled) { b.lie(func([]byte) []byte { return nil }, nil) },
		"unwraps another key": func(b *troubled) { b.lie(nil, func(p []byte) []byte { p[0] ^= 1; return p }) },
		"unwraps too little":  func(b *troubled) { b.lie(nil, func(p []byte) []byte { return p[:len(p)-1] }) },
		"unwraps nothing":     func(b *troubled) { b.lie(nil, func([]byte) []byte { return nil }) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			lie(r.backend)
			c := caller(t, orders)
			_, err := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
			wantReason(t, err, kms.ReasonBackendBroken)
			_, err = r.Wrap(t.Context(), c, kms.WrapRequest{Key: "orders", Plaintext: []byte("x")})
			wantReason(t, err, kms.ReasonBackendBroken)
			r.backend.lie(nil, nil)
			if _, err := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")}); err != nil {
				t.Errorf("the agent does not recover: %v", err)
			}
		})
	}
}

// A data key that opened nothing yet, and does not open what it should, is not kept:
// what the backend got wrong once must not keep a message closed for as long as the
// cache has it. One that has opened something stays, whatever is forged with it.
func TestALieIsNotKept(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	made, err := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	r.backend.lie(nil, func(p []byte) []byte { p[0] ^= 1; return p })
	_, err = r.Decrypt(t.Context(), c, kms.DecryptRequest{Message: made.Message})
	wantReason(t, err, kms.ReasonDecryptFailed)
	r.backend.lie(nil, nil)
	if _, err := r.Decrypt(t.Context(), c, kms.DecryptRequest{Message: made.Message}); err != nil {
		t.Errorf("after the backend has lied once: %v", err)
	}
	_, before := r.backend.counts()
	forged := bytes.Clone(made.Message)
	forged[len(forged)-1] ^= 1
	_, err = r.Decrypt(t.Context(), c, kms.DecryptRequest{Message: forged})
	wantReason(t, err, kms.ReasonDecryptFailed)
	if _, err := r.Decrypt(t.Context(), c, kms.DecryptRequest{Message: made.Message}); err != nil {
		t.Errorf("after a forged message: %v", err)
	}
	if _, after := r.backend.counts(); after != before {
		t.Errorf("a forged message made the backend unwrap %d times more", after-before)
	}
}

func TestADefiniteNoIsNeverAnOutage(t *testing.T) {
	r := newRig(t)
	m := r.material()
	ctx, c := t.Context(), caller(t, orders)
	r.backend.fail(plugins.Errorf(plugins.Denied, "permission was taken away"))
	_, err := r.Wrap(ctx, c, kms.WrapRequest{Key: "orders", Plaintext: []byte("x")})
	wantReason(t, err, kms.ReasonKeyUnusable)
	// The cached data key is suspended, then gone, although it is young.
	_, err = r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
	if reason := kms.ReasonOf(err); reason != kms.ReasonKeyUnusable && reason != kms.ReasonKeySuspended {
		t.Errorf("encrypt with a cached data key after a no: %v", err)
	}
	_ = m
}

func TestNoAuditNoAnswer(t *testing.T) {
	r := newRig(t)
	m := r.material()
	if err := r.audit.Close(); err != nil {
		t.Fatal(err)
	}
	for _, op := range operations() {
		err := op.do(r, caller(t, orders), m)
		t.Log(op.name)
		wantReason(t, err, kms.ReasonAuditUnavailable)
		wantReason(t, op.do(r, caller(t, stranger), m), kms.ReasonAuditUnavailable)
	}
}

func TestRequestsAreChecked(t *testing.T) {
	r := newRig(t)
	ctx, c := t.Context(), caller(t, orders)
	for name, do := range map[string]func() error{
		"reserved context": func() error {
			_, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders", Context: map[string]string{"aws-crypto-public-key": "x"}})
			return err
		},
		"context is not text": func() error {
			_, err := r.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: "orders", Context: map[string]string{"a": "\xff"}})
			return err
		},
		"wrap of nothing": func() error {
			_, err := r.Wrap(ctx, c, kms.WrapRequest{Key: "orders"})
			return err
		},
		"wrap of too much": func() error {
			_, err := r.Wrap(ctx, c, kms.WrapRequest{Key: "orders", Plaintext: make([]byte, kms.MaxWrapSize+1)})
			return err
		},
		"no random":       func() error { _, err := r.GenerateRandom(ctx, c, 0); return err },
		"too much random": func() error { _, err := r.GenerateRandom(ctx, c, kms.MaxRandomSize+1); return err },
	} {
		t.Run(name, func(t *testing.T) { wantReason(t, do(), kms.ReasonInvalidRequest) })
	}
}

func TestTheCallersDeadline(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := r.Wrap(ctx, caller(t, orders), kms.WrapRequest{Key: "orders", Plaintext: []byte("x")})
	wantReason(t, err, kms.ReasonCancelled)
	if rec := r.lastRecord(); rec.Reason != string(kms.ReasonCancelled) {
		t.Errorf("record = %+v", rec)
	}
}

func TestTheRecordTellsTheTimeUpstream(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	for i, upstream := range []bool{true, false} {
		if _, err := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")}); err != nil {
			t.Fatal(err)
		}
		rec := r.lastRecord()
		if (rec.UpstreamMicros > 0) != upstream || rec.DurationMicros < rec.UpstreamMicros {
			t.Errorf("call %d took %d µs, %d of them upstream; upstream was asked: %v", i, rec.DurationMicros, rec.UpstreamMicros, upstream)
		}
	}
}
