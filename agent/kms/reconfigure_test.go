package kms_test

import (
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/cache"
)

// outlives has the key orders in an outage that began long enough ago for grace.
func (r *rig) outlives() {
	r.t.Helper()
	if err := r.use(); err != nil {
		r.t.Fatal(err)
	}
	r.backend.fail(unreachable())
	r.clock.Advance(6 * time.Minute)
	_ = r.use()
	if len(r.Outages()) != 1 {
		r.t.Fatalf("outages %+v, want one", r.Outages())
	}
}

func (r *rig) use() error {
	_, err := r.Encrypt(r.t.Context(), caller(r.t, orders), kms.EncryptRequest{Key: "orders"})
	return err
}

func (r *rig) grace(d time.Duration) {
	r.t.Helper()
	r.config.Keys[0].Grace = kms.Grace{Encrypt: d, Decrypt: d}
	r.apply()
}

// A reload in an outage raises grace for what is cached, counted from the outage's
// beginning, and takes it away as well; unchanged keys keep their data keys.
func TestGraceIsRaisedInAnOutage(t *testing.T) {
	r := newRig(t)
	r.outlives()
	wantReason(t, r.use(), kms.ReasonBackendDown)
	for _, step := range []struct {
		grace, pass time.Duration
		left        time.Duration // 0: not served
	}{
		{time.Hour, 0, 59 * time.Minute},
		{time.Hour, 30 * time.Minute, 29 * time.Minute},
		{20 * time.Minute, 0, 0},
		{2 * time.Hour, 0, 89 * time.Minute},
		{0, 0, 0},
		{40 * time.Minute, 0, 9 * time.Minute},
	} {
		r.grace(step.grace)
		r.clock.Advance(step.pass)
		made, err := r.Encrypt(t.Context(), caller(t, orders), kms.EncryptRequest{Key: "orders"})
		if step.left == 0 {
			wantReason(t, err, kms.ReasonBackendDown)
			continue
		}
		if f := made.KeyUse.Freshness; err != nil || f.Source != cache.Grace || f.GraceLeft != step.left {
			t.Errorf("grace %v: %+v, %v; want %v left", step.grace, f, err, step.left)
		}
	}
}

// Spares that a reload asks for are made while the backend answers, and serve in the
// outage.
func TestSparesByReload(t *testing.T) {
	r := newRig(t)
	r.config.Keys[0].Limits.MaxMessages = 2
	r.grace(time.Hour)
	if err := r.use(); err != nil {
		t.Fatal(err)
	}
	r.config.Keys[0].Limits.Spares = 2
	r.apply()
	if err := r.use(); err != nil {
		t.Fatal(err)
	}
	await(t, "two spares", func() bool { return r.Stats().Spares == 2 })
	r.backend.fail(unreachable())
	r.clock.Advance(6 * time.Minute)
	for i := range 4 {
		if err := r.use(); err != nil {
			t.Errorf("message %d of the spares: %v", i+1, err)
		}
	}
	wantReason(t, r.use(), kms.ReasonBackendDown)
}

// A backend that is configured no more has no outage that goes on for ever.
func TestOutageOfARemovedBackend(t *testing.T) {
	p := newPair(t, 1)
	p.config.Keys = p.config.Keys[:1]
	p.apply()
	p.b.fail(unreachable())
	p.outlives()
	p.backend.fail(nil)
	p.config.Keys[0].Wraps = p.config.Keys[0].Wraps[:1]
	p.apply()
	if err := p.use(); err != nil {
		t.Errorf("with the other alone: %v", err)
	}
	if o := p.Outages(); len(o) != 0 {
		t.Errorf("outages %+v of backends that are not configured", o)
	}
}

// Messages outlive each change of the backends that wrap a key.
func TestBackendsComeAndGo(t *testing.T) {
	p := newPair(t, 1)
	both := p.config.Keys[0].Wraps
	one := p.must().Message
	p.config.Keys[0].Wraps = both[:1]
	p.apply()
	p.opens("one of two is taken out", one)
	p.wantWraps("by the one that is left", p.must().Message, 1)
	if h := p.health(); h.Problem != "" {
		t.Errorf("problem with one backend, which wraps all: %s", h.Problem)
	}
	alone := p.must().Message
	p.config.Keys[0].Wraps = both
	p.apply()
	p.opens("one is put in: of before", alone)
	p.wantWraps("by both", p.must().Message, 2)
	p.config.Keys[0].Wraps = both[1:]
	p.apply()
	p.opens("the first is taken out", one)
	p.forget()
	_, err := p.decrypt(alone)
	wantReason(t, err, kms.ReasonDecryptFailed)
	p.config.Keys[0].Wraps, p.config.Keys[0].MinWraps = both, 2
	p.apply()
	p.wantWraps("min_wraps is 2", p.must().Message, 2)
}

// A reload that changes nothing of a key's backends leaves its data keys alone.
func TestUnchangedKeysKeepTheirDataKeys(t *testing.T) {
	p := newPair(t, 1)
	p.must()
	before := p.Stats()
	p.config.Keys[0].Limits.Spares, p.config.Keys[0].Limits.MaxAge = 1, time.Minute
	p.config.Keys[0].Grace = kms.Grace{Encrypt: time.Minute}
	p.apply()
	p.must()
	if s := p.Stats(); s.Evictions != before.Evictions || s.EncryptionKeys != before.EncryptionKeys {
		t.Errorf("%+v, want the data keys of before: %+v", s, before)
	}
}

// How long a key lasts is told of what there is to last: without data keys nothing does.
func TestEnduranceNeedsDataKeys(t *testing.T) {
	r := newRig(t)
	r.grace(time.Hour)
	r.outlives()
	if h := r.health(); h.Encrypt.Left != time.Hour-time.Minute {
		t.Errorf("encrypts for %v, want 59m", h.Encrypt.Left)
	}
	r.forget()
	if h := r.health(); h.Encrypt.Left != 0 || h.Decrypt.Left != 0 {
		t.Errorf("without data keys: encrypts for %v, decrypts for %v", h.Encrypt.Left, h.Decrypt.Left)
	}
	wantReason(t, r.use(), kms.ReasonBackendDown)
}
