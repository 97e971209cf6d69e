package kms_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

func flipped(p []byte) []byte { p[0] ^= 1; return p }

// A caller never gets another data key than was made: a token that lies, or a line that
// changes what it carries, is found out, and what it said is not kept.
func TestNoOtherDataKey(t *testing.T) {
	p := newPair(t, 1)
	ctx, c := t.Context(), caller(t, orders)
	made, err := p.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	p.Settle()
	for name, tc := range map[string]struct {
		liars []*troubled
		want  kms.Reason
	}{
		"one of two": {[]*troubled{p.a}, ""},
		"the other":  {[]*troubled{p.b}, ""},
		"both":       {[]*troubled{p.a, p.b}, kms.ReasonDecryptFailed},
		"none":       {nil, ""},
	} {
		for _, liar := range tc.liars {
			liar.lie(nil, flipped)
		}
		p.forget()
		for range 2 {
			opened, err := p.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: made.EDKs})
			if kms.ReasonOf(err) != tc.want || err == nil && !bytes.Equal(opened.Plaintext, made.Plaintext) {
				t.Errorf("%s lies: %v, want %q and no other data key", name, err, tc.want)
			}
		}
		p.a.lie(nil, nil)
		p.b.lie(nil, nil)
		opened, err := p.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: made.EDKs})
		if err != nil || !bytes.Equal(opened.Plaintext, made.Plaintext) {
			t.Errorf("after %s lied: %v", name, err)
		}
	}
}

// Who can wrap by himself can make a data key whose check does not hold. It opens
// nothing, and is no outage of the key's.
func TestForgedKeyCheck(t *testing.T) {
	r := newRig(t)
	r.config.Keys[0].Grace = kms.Grace{Encrypt: time.Hour, Decrypt: time.Hour}
	r.apply()
	ctx, c := t.Context(), caller(t, orders)
	made, err := r.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	forged := changed(t, made.EDKs[0], func(info *envelope.ProviderInfo) { info.Check[0] ^= 1 })
	forged.Ciphertext, err = r.backend.Backend.Wrap(ctx, plugins.KeyRef{URI: "local:orders", Version: "1"}, make([]byte, envelope.DataKeySize),
		plugins.Binding{Purpose: "exported", ProviderInfo: forged.ProviderInfo, ContextBound: true})
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		_, err = r.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: []envelope.EDK{forged}})
		wantReason(t, err, kms.ReasonDecryptFailed)
	}
	_, err = r.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: []envelope.EDK{made.EDKs[0], forged}})
	wantReason(t, err, kms.ReasonInvalidMessage)
	if opened, err := r.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: made.EDKs}); err != nil || opened.KeyUse.Freshness.Source == cache.Grace {
		t.Errorf("the honest one: %+v, %v; want it served, and not in grace", opened.KeyUse.Freshness, err)
	}
}

// An exported data key from before there were key checks opens.
func TestDataKeyWithoutACheck(t *testing.T) {
	r := newRig(t)
	ctx, c := t.Context(), caller(t, orders)
	made, err := r.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	old := changed(t, made.EDKs[0], func(info *envelope.ProviderInfo) { info.Check = envelope.KeyCheck{} })
	old.Ciphertext, err = r.backend.Backend.Wrap(ctx, plugins.KeyRef{URI: "local:orders", Version: "1"}, made.Plaintext,
		plugins.Binding{Purpose: "exported", ProviderInfo: old.ProviderInfo, ContextBound: true})
	if err != nil {
		t.Fatal(err)
	}
	opened, err := r.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: []envelope.EDK{old}})
	if err != nil || !bytes.Equal(opened.Plaintext, made.Plaintext) {
		t.Errorf("%v, want the data key", err)
	}
}

// A canary that opens to something else confirms nothing.
func TestLyingConfirmation(t *testing.T) {
	inBubble(t, func(p *pair) {
		made := p.must()
		decrypt := func() cache.Source {
			t.Helper()
			got, err := p.decrypt(made.Message)
			if err != nil {
				t.Fatal(err)
			}
			return got.KeyUse.Freshness.Source
		}
		decrypt()
		p.pass(10 * time.Minute)
		p.must() // with canaries now
		for name, tc := range map[string]struct {
			liars []*troubled
			want  cache.Source
		}{"one": {[]*troubled{p.a}, cache.Cached}, "both": {[]*troubled{p.a, p.b}, cache.Grace}} {
			for _, liar := range tc.liars {
				liar.lie(nil, flipped)
			}
			p.pass(10 * time.Minute)
			decrypt()
			if source := decrypt(); source != tc.want {
				t.Errorf("%s lies: the answer is %v, want it %v", name, source, tc.want)
			}
			p.a.lie(nil, nil)
			p.b.lie(nil, nil)
			p.forget()
			if source := decrypt(); source != cache.Upstream {
				t.Errorf("after %s lied: the answer is %v", name, source)
			}
		}
	})
}
