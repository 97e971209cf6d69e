package kms_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/policy"
)

// tenants may use the key with the context of their own.
func tenants() policy.Rule {
	rule := everything()
	rule.When = "context.tenant == caller.path[1] && key.labels.kind == 'shared'"
	return rule
}

func TestConditionsSeeKeyCallerAndContext(t *testing.T) {
	r := newRig(t)
	r.config.Policy = compile(t, tenants())
	r.config.Keys[0].Labels = map[string]string{"kind": "shared"}
	r.config.Keys[0].FormerNames = []string{"former"}
	r.apply()
	ctx, c := t.Context(), caller(t, orders)
	own, other := map[string]string{"tenant": "shop"}, map[string]string{"tenant": "globex"}

	made, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x"), Context: own})
	if err != nil {
		t.Fatalf("with the own context: %v", err)
	}
	if _, err = r.Encrypt(ctx, c, kms.EncryptRequest{Key: "former", Plaintext: []byte("x"), Context: own}); err != nil {
		t.Errorf("by the key's former name: %v", err)
	}
	if opened, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: made.Message}); err != nil || !bytes.Equal(opened.Plaintext, []byte("x")) {
		t.Errorf("decrypt: %v", err)
	}
	_, err = r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x"), Context: other})
	wantReason(t, err, kms.ReasonAccessDenied)
	if rec := r.lastRecord(); strings.Contains(rec.Detail, "could not be evaluated") {
		t.Errorf("detail = %q, but the condition was false", rec.Detail)
	}
	_, err = r.Encrypt(ctx, c, kms.EncryptRequest{Key: "archive", Plaintext: []byte("x"), Context: own})
	wantReason(t, err, kms.ReasonAccessDenied)
	if rec := r.lastRecord(); !strings.Contains(rec.Detail, `rule "orders" could not be evaluated: key.labels.kind is missing`) {
		t.Errorf("detail = %q; it must say which label is missing", rec.Detail)
	}
	if strings.Contains(err.Error(), "labels") {
		t.Errorf("the caller is told of the condition: %v", err)
	}
}

func TestAFailureOfAnotherRuleIsOnTheRecordOfSuccess(t *testing.T) {
	r := newRig(t)
	other := everything()
	other.Name, other.When = "other", "context.ticket == 'x'"
	r.config.Policy = compile(t, everything(), other)
	r.apply()
	if _, err := r.Encrypt(t.Context(), caller(t, orders), kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	if rec := r.lastRecord(); rec.Outcome != "success" || rec.Rule != "orders" || !strings.Contains(rec.Detail, "context.ticket is missing") {
		t.Errorf("record = %+v; want success, and what rule other lacked", rec)
	}
}

func TestAStreamEndsWithItsTimeWindow(t *testing.T) {
	r := newRig(t)
	ctx, c := t.Context(), caller(t, orders)
	st, err := r.EncryptStream(ctx, c, kms.EncryptStreamRequest{Key: "orders"}, &bytes.Buffer{})
	if err != nil {
		t.Fatal(err)
	}
	rule := everything()
	rule.When = "time < timestamp('2020-01-01T00:00:00Z')"
	r.config.Policy = compile(t, rule)
	r.apply()
	r.clock.Advance(r.config.DataKeyUse)
	_, err = st.Write([]byte("x"))
	wantReason(t, err, kms.ReasonAccessDenied)
	wantReason(t, st.Close(ctx, err), kms.ReasonAccessDenied)
}
