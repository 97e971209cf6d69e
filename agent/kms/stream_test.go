package kms_test

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/identity"
)

func encryptStream(t *testing.T, r *rig, c kms.Call, plaintext []byte) []byte {
	t.Helper()
	var message bytes.Buffer
	st, err := r.EncryptStream(t.Context(), c, kms.EncryptStreamRequest{Key: "orders", Context: map[string]string{"tenant": "acme"}}, &message)
	if err != nil {
		t.Fatalf("begin: %v", err)
	}
	if _, err := st.Write(plaintext); err != nil {
		t.Fatalf("write: %v", err)
	}
	if err := st.Close(t.Context(), nil); err != nil {
		t.Fatalf("close: %v", err)
	}
	return message.Bytes()
}

func TestStreamRoundTrip(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	plaintext := bytes.Repeat([]byte("0123456789abcdef"), 12_345)
	message := encryptStream(t, r, c, plaintext)
	st, err := r.DecryptStream(t.Context(), c, map[string]string{"tenant": "acme"}, bytes.NewReader(message))
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(st)
	if err = errors.Join(err, st.Close(t.Context(), nil)); err != nil || !bytes.Equal(got, plaintext) {
		t.Errorf("got %d bytes, %v; want %d", len(got), err, len(plaintext))
	}
	records := r.records()
	if len(records) != 4 {
		t.Fatalf("%d records, want a start and an end for each of two streams", len(records))
	}
	for i, want := range []audit.Kind{audit.KindStart, audit.KindEnd, audit.KindStart, audit.KindEnd} {
		if records[i].Kind != want || records[i].Key != "orders" || records[i].Rule != "orders" {
			t.Errorf("record %d = %s %s by %q, want a %s", i, records[i].Kind, records[i].Key, records[i].Rule, want)
		}
	}
	in, out := uint64(len(plaintext)), uint64(len(message))
	if e := records[1]; e.BytesIn != in || e.BytesOut != out {
		t.Errorf("the end of encryption counts %d bytes in and %d out, want %d and %d", e.BytesIn, e.BytesOut, in, out)
	}
	if e := records[3]; e.BytesIn != out || e.BytesOut != in {
		t.Errorf("the end of decryption counts %d bytes in and %d out, want %d and %d", e.BytesIn, e.BytesOut, out, in)
	}
}

func TestStreamDenied(t *testing.T) {
	r := newRig(t)
	message := encryptStream(t, r, caller(t, orders), []byte("x"))
	var out bytes.Buffer
	_, err := r.EncryptStream(t.Context(), caller(t, stranger), kms.EncryptStreamRequest{Key: "orders"}, &out)
	wantReason(t, err, kms.ReasonAccessDenied)
	if out.Len() != 0 {
		t.Errorf("%d bytes came out before the refusal", out.Len())
	}
	_, err = r.DecryptStream(t.Context(), caller(t, stranger), nil, bytes.NewReader(message))
	wantReason(t, err, kms.ReasonAccessDenied)
	if got := r.lastRecord(); got.Outcome != audit.Denied {
		t.Errorf("last record = %+v, want a denial", got)
	}
}

func TestStreamThatEndsTooEarly(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	message := encryptStream(t, r, c, bytes.Repeat([]byte("x"), 3*envelope.StreamFrameLength))
	st, err := r.DecryptStream(t.Context(), c, nil, bytes.NewReader(message[:len(message)-10]))
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(io.Discard, st)
	err = st.Close(t.Context(), err)
	wantReason(t, err, kms.ReasonTruncated)
	if got := r.lastRecord(); got.Kind != audit.KindEnd || got.Outcome != audit.Error {
		t.Errorf("last record = %s %s, want a failed end", got.Kind, got.Outcome)
	}
	_, err = r.DecryptStream(t.Context(), c, nil, bytes.NewReader(message[:20]))
	wantReason(t, err, kms.ReasonTruncated)
	_, err = r.DecryptStream(t.Context(), c, nil, bytes.NewReader([]byte("rubbish that is long enough to be a header")))
	wantReason(t, err, kms.ReasonInvalidMessage)
	_, err = r.DecryptStream(t.Context(), c, map[string]string{"tenant": "other"}, bytes.NewReader(message))
	wantReason(t, err, kms.ReasonDecryptFailed)
}

// A stream does not outlive the permission, the proof or the key behind it.
func TestStreamIsCheckedAgain(t *testing.T) {
	for name, tc := range map[string]struct {
		withdraw func(r *rig, proof *error)
		want     kms.Reason
	}{
		"policy": {func(r *rig, _ *error) {
			r.config.Policy = compile(r.t)
			r.apply()
		}, kms.ReasonAccessDenied},
		"key": {func(r *rig, _ *error) {
			r.config.Keys = r.config.Keys[1:]
			r.apply()
		}, kms.ReasonAccessDenied},
		"proof": {func(_ *rig, proof *error) { *proof = identity.ErrExpired }, kms.ReasonUnidentified},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			var proof error
			c := caller(t, orders)
			c.Recheck = func() error { return proof }
			var out bytes.Buffer
			st, err := r.EncryptStream(t.Context(), c, kms.EncryptStreamRequest{Key: "orders"}, &out)
			if err != nil {
				t.Fatal(err)
			}
			tc.withdraw(r, &proof)
			if _, err := st.Write([]byte("still within the interval")); err != nil {
				t.Errorf("before the interval has passed: %v", err)
			}
			r.clock.Advance(time.Minute)
			_, err = st.Write([]byte("too late"))
			wantReason(t, st.Close(t.Context(), err), tc.want)
		})
	}
}

func TestStreamLengthLimits(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	_, err := r.EncryptStream(t.Context(), c, kms.EncryptStreamRequest{Key: "orders", LengthLimit: r.config.MaxStream + 1}, io.Discard)
	wantReason(t, err, kms.ReasonTooLarge)
	st, err := r.EncryptStream(t.Context(), c, kms.EncryptStreamRequest{Key: "orders", LengthLimit: 10}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	_, err = st.Write(make([]byte, 11))
	wantReason(t, st.Close(t.Context(), err), kms.ReasonTooLarge)
}

// What a stream reserved and did not use may be used by others, however it ended.
func TestStreamGivesBackWhatItReserved(t *testing.T) {
	r := newRig(t)
	r.config.Keys[0].Limits.MaxBytes = r.config.MaxStream + 2500
	r.apply()
	c := caller(t, orders)
	begin := func() *kms.EncryptStream {
		t.Helper()
		st, err := r.EncryptStream(t.Context(), c, kms.EncryptStreamRequest{Key: "orders"}, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	for _, cause := range []error{nil, io.ErrUnexpectedEOF, nil} {
		st := begin()
		if _, err := st.Write(make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		_ = st.Close(t.Context(), cause)
		if _, err := st.Write([]byte("x")); err == nil {
			t.Error("a stream that has ended takes plaintext")
		}
	}
	if wraps, _ := r.backend.counts(); wraps != 1 {
		t.Errorf("%d data keys for 3000 bytes, want 1", wraps)
	}
	st := begin()
	defer func() { _ = st.Close(t.Context(), io.ErrUnexpectedEOF) }()
	if wraps, _ := r.backend.counts(); wraps != 2 {
		t.Errorf("%d data keys where the first has not room for a whole stream, want 2", wraps)
	}
}

// Whoever may decrypt cannot have the agent hold any number of the largest
// frames; others still may, and ordinary streams are not touched.
func TestStreamsWithLargeFrames(t *testing.T) {
	r := newRig(t)
	other := everything()
	other.Name, other.Callers = "other", []string{stranger}
	r.config.Policy = compile(t, everything(), other)
	r.apply()
	c := caller(t, orders)
	key, err := r.GenerateDataKey(t.Context(), c, kms.GenerateDataKeyRequest{Key: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	large, err := envelope.Seal(nil, key.Plaintext, []envelope.EDK{key.EDKs[0]}, nil, make([]byte, 32<<20))
	if err != nil {
		t.Fatal(err)
	}
	ordinary := encryptStream(t, r, c, []byte("x"))
	var open []*kms.DecryptStream
	begin := func(c kms.Call, message []byte, want kms.Reason) {
		t.Helper()
		st, err := r.DecryptStream(t.Context(), c, nil, bytes.NewReader(message))
		wantReason(t, err, want)
		if err == nil {
			open = append(open, st)
		}
	}
	for range 4 {
		begin(c, large, "")
	}
	begin(c, large, kms.ReasonTooManyRequests)
	begin(c, ordinary, "")
	for range 4 {
		begin(caller(t, stranger), large, "")
	}
	begin(caller(t, stranger), large, kms.ReasonTooManyRequests)
	if _, err := io.Copy(io.Discard, open[0]); err != nil {
		t.Errorf("a stream with a large frame: %v", err)
	}
	for range 2 {
		_ = open[0].Close(t.Context(), nil)
	}
	begin(c, large, "")
	begin(c, large, kms.ReasonTooManyRequests)
	for _, st := range open {
		_ = st.Close(t.Context(), io.ErrUnexpectedEOF)
	}
	for range 8 { // what fails gives its room back too
		_, err := r.DecryptStream(t.Context(), c, nil, bytes.NewReader(large[:20]))
		wantReason(t, err, kms.ReasonTruncated)
		broken := bytes.Clone(large[:1<<10])
		broken[bytes.Index(broken, key.EDKs[0].Ciphertext)+len(key.EDKs[0].Ciphertext)-1] ^= 1
		_, err = r.DecryptStream(t.Context(), c, nil, bytes.NewReader(broken))
		wantReason(t, err, kms.ReasonDecryptFailed)
		begin(c, large, "")
		_ = open[len(open)-1].Close(t.Context(), nil)
	}
}

func TestStreamWithoutAudit(t *testing.T) {
	r := newRig(t)
	c := caller(t, orders)
	var out bytes.Buffer
	st, err := r.EncryptStream(t.Context(), c, kms.EncryptStreamRequest{Key: "orders"}, &out)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.audit.Close(); err != nil {
		t.Fatal(err)
	}
	wantReason(t, st.Close(t.Context(), nil), kms.ReasonAuditUnavailable)
	out.Reset()
	_, err = r.EncryptStream(t.Context(), c, kms.EncryptStreamRequest{Key: "orders"}, &out)
	wantReason(t, err, kms.ReasonAuditUnavailable)
	if out.Len() != 0 {
		t.Errorf("%d bytes came out without a start record", out.Len())
	}
}

func TestAdministratorsAreNamed(t *testing.T) {
	r := newRig(t)
	ran := false
	act := func() error { ran = true; return nil }
	c := kms.Call{Door: "test", RequestID: "r", Caller: identity.Caller{Proof: identity.ProofStaticPeer, Peer: identity.Peer{UID: 1000, GID: 1000}}}
	wantReason(t, r.Administer(t.Context(), c, kms.AdminRequest{Operation: kms.AdminStatus}, act), kms.ReasonAccessDenied)
	uid := uint32(1000)
	for _, a := range []kms.Administrator{{}, {UID: &uid}, {UID: new(uint32), Operations: nil}} {
		r.config.Administrators = []kms.Administrator{a}
		r.apply()
		wantReason(t, r.Administer(t.Context(), c, kms.AdminRequest{Operation: kms.AdminStatus}, act), kms.ReasonAccessDenied)
	}
	if ran {
		t.Fatal("an operation ran for somebody who is no administrator")
	}
	r.config.Administrators = []kms.Administrator{{UID: &uid, Operations: []kms.AdminOperation{kms.AdminStatus}}}
	r.apply()
	if err := r.Administer(t.Context(), c, kms.AdminRequest{Operation: kms.AdminStatus}, act); err != nil || !ran {
		t.Errorf("status = %v, ran %v", err, ran)
	}
	if got := r.lastRecord(); got.Operation != "status" || got.Outcome != audit.Success {
		t.Errorf("record = %+v", got)
	}
	// One operation is not another.
	ran = false
	wantReason(t, r.Administer(t.Context(), c, kms.AdminRequest{Operation: kms.AdminEvict, Key: "orders", Changes: true}, act), kms.ReasonAccessDenied)
	if got := r.lastRecord(); ran || got.Kind != audit.KindOperation || got.Outcome != audit.Denied || got.Key != "orders" {
		t.Errorf("ran %v, record %+v", ran, got)
	}
}

// A change by an administrator is on record before it begins, and does not
// begin without a record.
func TestChangesAreRecordedFirst(t *testing.T) {
	r := newRig(t)
	uid := uint32(1000)
	r.config.Administrators = []kms.Administrator{{UID: &uid, Operations: kms.AdminRoles()["key-admin"]}}
	r.apply()
	c := kms.Call{Door: "test", RequestID: "r", Caller: identity.Caller{Proof: identity.ProofStaticPeer, Peer: identity.Peer{UID: 1000}}}
	req := kms.AdminRequest{Operation: kms.AdminEvict, Key: "orders", Detail: "why", Changes: true}
	err := r.Administer(t.Context(), c, req, func() error {
		if got := r.lastRecord(); got.Kind != audit.KindStart || got.Operation != "evict" || got.Key != "orders" || got.Detail != "why" {
			t.Errorf("record before the change: %+v", got)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := r.lastRecord(); got.Kind != audit.KindEnd || got.Outcome != audit.Success {
		t.Errorf("record after the change: %+v", got)
	}
	if err := r.audit.Close(); err != nil {
		t.Fatal(err)
	}
	wantReason(t, r.Administer(t.Context(), c, req, func() error { t.Error("changed without a record"); return nil }), kms.ReasonAuditUnavailable)
}
