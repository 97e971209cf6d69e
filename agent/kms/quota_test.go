package kms_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/policy"
)

func number(n uint64) *uint64 { return &n }

// limit gives the orders workload its rules with those limits.
func (r *rig) limit(l policy.Limits) {
	r.t.Helper()
	rules := []policy.Rule{everything(), random()}
	for i := range rules {
		rules[i].Limits = &l
	}
	r.config.Policy = compile(r.t, rules...)
	r.apply()
}

// wantExceeded fails unless err is the refusal of a limit, on record as one.
func (r *rig) wantExceeded(err error, limit, rule string) kms.Error {
	r.t.Helper()
	var e *kms.Error
	if !errors.As(err, &e) || e.Reason != kms.ReasonQuotaExceeded || !strings.Contains(e.Message, limit) {
		r.t.Fatalf("error = %v, want a refusal by %s", err, limit)
	}
	rec := r.lastRecord()
	if rec.Outcome != audit.Denied || rec.Reason != "QUOTA_EXCEEDED" || rec.Rule != rule || !strings.Contains(rec.Detail, limit) {
		r.t.Errorf("record %+v, want a denial by rule %s", rec, rule)
	}
	return *e
}

// Every operation that policy allows is counted; what is not an operation on a
// key, or is denied, is not.
func TestEveryOperationIsCounted(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	ctx := t.Context()
	message, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders", Plaintext: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	made, err := r.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := r.Wrap(ctx, c, kms.WrapRequest{Key: "orders", Plaintext: []byte("k")})
	if err != nil {
		t.Fatal(err)
	}
	for name, ask := range map[string]func() error{
		"encrypt": func() error { _, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders"}); return err },
		"decrypt": func() error { _, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: message.Message}); return err },
		"reencrypt": func() error {
			_, err := r.ReEncrypt(ctx, c, kms.ReEncryptRequest{Message: message.Message})
			return err
		},
		"data key": func() error {
			_, err := r.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: "orders"})
			return err
		},
		"no plaintext": func() error {
			_, err := r.GenerateDataKeyWithoutPlaintext(ctx, c, kms.GenerateDataKeyRequest{Key: "orders"})
			return err
		},
		"open data key": func() error {
			_, err := r.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: made.EDKs})
			return err
		},
		"wrap": func() error {
			_, err := r.Wrap(ctx, c, kms.WrapRequest{Key: "orders", Plaintext: []byte("k")})
			return err
		},
		"unwrap":   func() error { _, err := r.Unwrap(ctx, c, kms.UnwrapRequest{EDKs: wrapped.EDKs}); return err },
		"describe": func() error { _, err := r.DescribeKey(ctx, c, "orders"); return err },
		"random":   func() error { _, err := r.GenerateRandom(ctx, c, 8); return err },
		"encrypt stream": func() error {
			st, err := r.EncryptStream(ctx, c, kms.EncryptStreamRequest{Key: "orders"}, io.Discard)
			if err == nil {
				err = st.Close(ctx, nil)
			}
			return err
		},
		"decrypt stream": func() error {
			st, err := r.DecryptStream(ctx, c, nil, bytes.NewReader(message.Message))
			if err == nil {
				_, err = io.Copy(io.Discard, st)
				err = st.Close(ctx, err)
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			r.clock.Advance(time.Minute)
			r.limit(policy.Limits{Rate: &policy.Rate{Count: 1, Per: time.Minute}, Burst: number(1)})
			if err := ask(); err != nil {
				t.Fatalf("within the limit: %v", err)
			}
			rule := "orders"
			if name == "random" {
				rule = "random"
			}
			if e := r.wantExceeded(ask(), "rate", rule); e.RetryAfter != time.Minute {
				t.Errorf("retry after %v, want a minute", e.RetryAfter)
			}
			if _, err := r.WhoAmI(ctx, c); err != nil {
				t.Error(err)
			}
			if _, _, err := r.ListKeys(ctx, c, "", 0); err != nil {
				t.Error(err)
			}
			_, err := r.Encrypt(ctx, caller(t, stranger), kms.EncryptRequest{Key: "orders"})
			wantReason(t, err, kms.ReasonAccessDenied)
		})
	}
}

// Limits hold while the backend is out of reach, and a failed request counts.
func TestLimitsHoldOffline(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	r.limit(policy.Limits{PerDay: number(4)})
	ask := func(key string) error {
		_, err := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: key, Plaintext: []byte("x")})
		return err
	}
	if err := ask("orders"); err != nil {
		t.Fatal(err)
	}
	r.backend.fail(unreachable())
	for range 2 {
		if err := ask("orders"); err != nil {
			t.Errorf("cached: %v", err)
		}
	}
	wantReason(t, ask("archive"), kms.ReasonBackendDown)
	if e := r.wantExceeded(ask("orders"), "per_day", "orders"); e.RetryAfter <= 0 || e.RetryAfter > 24*time.Hour {
		t.Errorf("retry after %v, want the rest of the day", e.RetryAfter)
	}
}

// Bytes are those of plaintext, in both directions and as streams go.
func TestBytesOfPlaintext(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	ctx := t.Context()
	bytesPerDay := policy.Bytes(1000)
	r.limit(policy.Limits{BytesPerDay: &bytesPerDay})
	message, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders", Plaintext: make([]byte, 300)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Decrypt(ctx, c, kms.DecryptRequest{Message: message.Message}); err != nil {
		t.Fatal(err)
	}
	_, err = r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders", Plaintext: make([]byte, 1001)})
	if e := r.wantExceeded(err, "bytes_per_day", "orders"); e.RetryAfter != 0 || !strings.Contains(e.Message, "whole day") {
		t.Errorf("%+v, want no retry for what never fits", e)
	}
	st, err := r.EncryptStream(ctx, c, kms.EncryptStreamRequest{Key: "orders", LengthLimit: 1 << 20}, io.Discard)
	if err != nil {
		t.Fatalf("a stream is not counted by its announced length: %v", err)
	}
	for range 2 {
		if _, err = st.Write(make([]byte, 50)); err != nil {
			t.Fatal(err)
		}
	}
	_, err = st.Write(make([]byte, 301))
	r.wantExceeded(st.Close(ctx, err), "bytes_per_day", "orders")
	in, err := r.DecryptStream(ctx, c, nil, bytes.NewReader(message.Message))
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, in); n != 300 || err != nil {
		t.Errorf("decrypted %d bytes, %v, want the 300 that are left", n, err)
	}
	if err := in.Close(ctx, nil); err != nil {
		t.Error(err)
	}
	in, err = r.DecryptStream(ctx, c, nil, bytes.NewReader(message.Message))
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, in)
	if n != 0 {
		t.Errorf("%d bytes were given beyond the limit", n)
	}
	r.wantExceeded(in.Close(ctx, err), "bytes_per_day", "orders")
}

// A stream is under way until it is closed, also where it never began.
func TestConcurrencyOfStreams(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	ctx := t.Context()
	r.limit(policy.Limits{Concurrency: number(1)})
	request := kms.EncryptStreamRequest{Key: "orders"}
	st, err := r.EncryptStream(ctx, c, request, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		_, err := r.Encrypt(ctx, c, kms.EncryptRequest{Key: "orders"})
		r.wantExceeded(err, "concurrency", "orders")
	}
	if err := st.Close(ctx, nil); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		_, err := r.EncryptStream(ctx, c, kms.EncryptStreamRequest{Key: "orders", LengthLimit: 1 << 40}, io.Discard)
		wantReason(t, err, kms.ReasonTooLarge)
	}
	if _, err := r.EncryptStream(ctx, c, request, io.Discard); err != nil {
		t.Errorf("after streams that ended: %v", err)
	}
}

// Rules that both allow count both; a ReEncrypt is one request under the rule of
// its two halves.
func TestSeveralRulesCount(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	first, second := everything(), everything()
	first.Limits, second.Name = &policy.Limits{PerDay: number(2), Concurrency: number(1)}, "a second"
	second.Limits, second.Operations = &policy.Limits{PerDay: number(1)}, []string{"decrypt"}
	r.config.Policy = compile(t, first, second)
	r.apply()
	made, err := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.ReEncrypt(t.Context(), c, kms.ReEncryptRequest{Message: made.Message, DestinationKey: "archive"}); err != nil {
		t.Fatal(err)
	}
	_, err = r.Decrypt(t.Context(), c, kms.DecryptRequest{Message: made.Message})
	r.wantExceeded(err, "per_day", "a second")
	_, err = r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: "orders"})
	r.wantExceeded(err, "per_day", "orders")
}

// What cannot be stored is not served.
func TestCountThatCannotBeStored(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	r.limit(policy.Limits{PerDay: number(2)})
	obstacle := filepath.Join(filepath.Dir(r.auditLog), "quota.state.new", "x")
	if err := os.MkdirAll(obstacle, 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := r.Encrypt(t.Context(), c, kms.EncryptRequest{Key: "orders"})
	wantReason(t, err, kms.ReasonQuotaUnavailable)
	if rec := r.lastRecord(); rec.Outcome != audit.Error || !strings.Contains(rec.Detail, "quota.state") {
		t.Errorf("record %+v", rec)
	}
}

func BenchmarkEncryptWithLimits1KiB(b *testing.B) {
	r := newRig(b)
	r.limit(policy.Limits{Rate: &policy.Rate{Count: 1e9, Per: time.Second}, PerDay: number(1e15), Concurrency: number(1e6)})
	c := caller(b, orders)
	req := kms.EncryptRequest{Key: "orders", Plaintext: make([]byte, 1<<10)}
	b.SetBytes(1 << 10)
	b.ReportAllocs()
	b.SetParallelism(8)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := r.Encrypt(b.Context(), c, req); err != nil {
				b.Fatal(err)
			}
		}
	})
}
