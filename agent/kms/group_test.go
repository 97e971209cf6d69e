package kms_test

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

// pair is a service whose key orders is wrapped in two places, each with a keystore
// of its own.
type pair struct {
	*rig
	a, b *troubled
}

func newPair(t *testing.T, least int) *pair {
	t.Helper()
	r := newRig(t)
	dir := t.TempDir()
	newKeystore(t, dir, "orders-b")
	p := &pair{rig: r, a: r.backend, b: &troubled{Backend: openLocal(t, dir)}}
	r.config.Backends["b"] = p.b
	r.config.Keys[0].Wraps = append(r.config.Keys[0].Wraps, kms.Wrap{Backend: "b", WrappingKey: "local:orders-b"})
	r.config.Keys[0].MinWraps = least
	r.config.Keys[0].Grace = kms.Grace{Encrypt: time.Hour, Decrypt: time.Hour}
	r.apply()
	return p
}

func (p *pair) encrypt() (kms.EncryptResponse, error) {
	p.t.Helper()
	return p.Encrypt(p.t.Context(), caller(p.t, orders), kms.EncryptRequest{Key: "orders", Plaintext: []byte("hello")})
}

func (p *pair) must() kms.EncryptResponse {
	p.t.Helper()
	made, err := p.encrypt()
	if err != nil {
		p.t.Fatalf("encrypt: %v", err)
	}
	return made
}

func (p *pair) decrypt(message []byte) (kms.DecryptResponse, error) {
	p.t.Helper()
	return p.Decrypt(p.t.Context(), caller(p.t, orders), kms.DecryptRequest{Message: message})
}

// opens has the message opened, with nothing cached.
func (p *pair) opens(what string, message []byte) {
	p.t.Helper()
	p.forget()
	got, err := p.decrypt(message)
	if err != nil || !bytes.Equal(got.Plaintext, []byte("hello")) {
		p.t.Errorf("%s: %q, %v", what, got.Plaintext, err)
	}
}

// forget drops what is cached, so that upstream is asked.
func (r *rig) forget() {
	r.t.Helper()
	if _, _, err := r.Evict("orders"); err != nil {
		r.t.Error(err)
	}
}

func (r *rig) health() kms.KeyHealth {
	r.t.Helper()
	for _, h := range r.Health() {
		if h.Name == "orders" {
			return h
		}
	}
	r.t.Fatal("the key is not there")
	return kms.KeyHealth{}
}

func wrapsOf(t testing.TB, message []byte) (uris []string) {
	t.Helper()
	m, err := envelope.Parse(message)
	if err != nil {
		t.Fatal(err)
	}
	for _, edk := range m.EDKs {
		info, err := envelope.ParseProviderInfo(edk.ProviderInfo)
		if err != nil {
			t.Fatal(err)
		}
		uris = append(uris, info.URI)
	}
	return uris
}

func (p *pair) wantWraps(what string, message []byte, want int) {
	p.t.Helper()
	if got := wrapsOf(p.t, message); len(got) != want {
		p.t.Errorf("%s: wrapped by %v, want %d", what, got, want)
	}
}

func denied() error { return &plugins.Error{Class: plugins.Denied, Err: errors.New("no permission")} }

func gone() error { return &plugins.Error{Class: plugins.KeyNotFound, Err: errors.New("no such key")} }

// A data key is wrapped by both, and either opens it: the loss of one is invisible.
func TestTwoBackends(t *testing.T) {
	p := newPair(t, 1)
	made := p.must()
	p.wantWraps("both answer", made.Message, 2)
	if made.KeyUse.Version != "1,1" {
		t.Errorf("version %q, want those of both", made.KeyUse.Version)
	}
	p.opens("both answer", made.Message)
	p.a.fail(unreachable())
	p.opens("the first is away", made.Message)
	p.a.fail(nil)
	p.b.fail(unreachable())
	p.opens("the second is away", made.Message)
	p.a.fail(unreachable())
	p.forget()
	_, err := p.decrypt(made.Message)
	wantReason(t, err, kms.ReasonBackendDown)
}

// What is made while one is away misses its wrap, and is retired first when it is back.
func TestMissingWrapsAreRetired(t *testing.T) {
	for name, back := range map[string]func(p *pair){
		"told by the backend's health": func(p *pair) { p.Reached("b") },
		"found by a confirmation": func(p *pair) {
			p.clock.Advance(6 * time.Minute)
			if _, err := p.encrypt(); err != nil {
				p.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 1)
			p.must()
			p.forget()
			p.b.fail(unreachable())
			made := p.must()
			p.wantWraps("one is away", made.Message, 1)
			p.opens("one is away", made.Message)
			p.must()
			if h := p.health(); h.Problem == "" {
				t.Error("nothing tells of the wraps that are missing")
			}
			p.b.fail(nil)
			back(p)
			p.wantWraps("it is back", p.must().Message, 2)
			if h := p.health(); h.Problem != "" {
				t.Errorf("problem: %s", h.Problem)
			}
			p.opens("what was made without it", made.Message)
		})
	}
}

// With fewer than min_wraps nothing new is encrypted; what is cached is.
func TestMinWraps(t *testing.T) {
	p := newPair(t, 2)
	made := p.must()
	p.b.fail(unreachable())
	if _, err := p.encrypt(); err != nil {
		t.Errorf("with a data key that both have wrapped: %v", err)
	}
	p.forget()
	_, err := p.encrypt()
	wantReason(t, err, kms.ReasonBackendDown)
	p.opens("one is enough to open", made.Message)
	p.b.fail(nil)
	p.wantWraps("it is back", p.must().Message, 2)
}

// A no of one is a no, once it is confirmed, whatever the other says.
func TestOneRevokes(t *testing.T) {
	p := newPair(t, 1)
	made := p.must()
	if _, err := p.decrypt(made.Message); err != nil {
		t.Fatal(err)
	}
	p.b.fail(denied())
	p.clock.Advance(6 * time.Minute)
	if _, err := p.encrypt(); err == nil {
		t.Error("encrypted with a key that one backend denies")
	}
	if _, err := p.decrypt(made.Message); err == nil {
		t.Error("decrypted with a key that one backend denies")
	}
	p.b.fail(nil)
	comesBack(t, p, "encrypt", p.encrypts)
}

// That one does not have the key is a fault to report, not a no; that none has it is.
func TestMissingKeyIsReported(t *testing.T) {
	p := newPair(t, 1)
	made := p.must()
	p.b.fail(gone())
	p.clock.Advance(6 * time.Minute)
	if _, err := p.encrypt(); err != nil {
		t.Errorf("one has it still: %v", err)
	}
	p.opens("one has it still", made.Message)
	p.a.fail(gone())
	p.clock.Advance(6 * time.Minute)
	p.forget()
	_, err := p.encrypt()
	wantReason(t, err, kms.ReasonKeyUnusable)
}

// The loss of one of two is no outage: nothing is served in grace.
func TestOneAwayIsNoOutage(t *testing.T) {
	p := newPair(t, 1)
	made := p.must()
	if _, err := p.decrypt(made.Message); err != nil {
		t.Fatal(err)
	}
	p.a.fail(unreachable())
	for range 3 {
		p.clock.Advance(6 * time.Minute)
		sealed, err := p.encrypt()
		if err != nil || sealed.KeyUse.Freshness.Source != cache.Upstream {
			t.Errorf("encrypt: %v, %v; want confirmed by the other", sealed.KeyUse.Freshness, err)
		}
		opened, err := p.decrypt(made.Message)
		if err != nil || opened.KeyUse.Freshness.Source == cache.Grace {
			t.Errorf("decrypt: %v, %v; want confirmed by the other", opened.KeyUse.Freshness, err)
		}
	}
	if o := p.Outages(); len(o) != 0 {
		t.Errorf("outages %+v", o)
	}
	p.b.fail(unreachable())
	p.clock.Advance(6 * time.Minute)
	opened, err := p.decrypt(made.Message)
	if err != nil || opened.KeyUse.Freshness.Source != cache.Grace {
		t.Errorf("both away: %v, %v; want grace", opened.KeyUse.Freshness, err)
	}
}

// A backend that takes its time is not waited for when another is faster.
func TestHedgedUnwrap(t *testing.T) {
	p := newPair(t, 1)
	made := p.must()
	hold := make(chan struct{})
	defer close(hold)
	p.a.intercept(func(call string) error {
		if call == "unwrap" {
			<-hold
		}
		return nil
	})
	began := time.Now()
	p.opens("one hangs", made.Message)
	if d := time.Since(began); d > 3*time.Second {
		t.Errorf("took %v", d)
	}
	p.forget()
	began = time.Now()
	p.opens("one hangs, as is known", made.Message)
	if d := time.Since(began); d > 3*time.Second {
		t.Errorf("took %v", d)
	}
}

// A backend that lies, or whose EDK was damaged or exchanged, keeps nobody from
// opening the message with the other.
func TestDamagedWrap(t *testing.T) {
	p := newPair(t, 1)
	first, second := p.must().Message, []byte(nil)
	p.forget()
	second = p.must().Message
	m, err := envelope.Parse(first)
	if err != nil {
		t.Fatal(err)
	}
	other, err := envelope.Parse(second)
	if err != nil {
		t.Fatal(err)
	}
	for i := range m.EDKs {
		damaged := bytes.Replace(first, m.EDKs[i].Ciphertext, bytes.Repeat([]byte{7}, len(m.EDKs[i].Ciphertext)), 1)
		exchanged := bytes.Replace(first, m.EDKs[i].Ciphertext, other.EDKs[i].Ciphertext, 1)
		for what, message := range map[string][]byte{"damaged": damaged, "exchanged": exchanged} {
			p.forget()
			// The header's tag covers the EDKs: such a message does not open, and says no
			// more than any other that does not.
			_, err := p.decrypt(message)
			wantReason(t, err, kms.ReasonDecryptFailed)
			if h := p.health(); h.Problem != "" {
				t.Errorf("%s: problem: %s", what, h.Problem)
			}
		}
	}
	p.opens("the message as it was", first)
}

// A rotation in one place retires what is wrapped under the version before.
func TestRotationInOnePlace(t *testing.T) {
	p := newPair(t, 1)
	first := p.must()
	if _, err := p.keystore.Rotate("orders"); err != nil {
		t.Fatal(err)
	}
	p.clock.Advance(6 * time.Minute)
	second := p.must()
	if second.KeyUse.Version != "2,1" {
		t.Errorf("version %q, want 2,1", second.KeyUse.Version)
	}
	p.opens("the old", first.Message)
	p.opens("the new", second.Message)
}

// One that was never reached is missed by the first data keys, and gets its wrap when
// it is there.
func TestStartWithoutOne(t *testing.T) {
	p := newPair(t, 1)
	p.b.fail(unreachable())
	made := p.must()
	p.wantWraps("one was never reached", made.Message, 1)
	if made.KeyUse.Version != "1,-" {
		t.Errorf("version %q, want 1,-", made.KeyUse.Version)
	}
	p.b.fail(nil)
	p.clock.Advance(6 * time.Minute)
	p.wantWraps("it is there", p.must().Message, 2)
	p.opens("what was made without it", made.Message)
}

// Data keys for callers, and wraps of theirs, carry the wraps of all that answer, of at
// least min_wraps, and whichever answers opens them.
func TestExportedByAll(t *testing.T) {
	p := newPair(t, 1)
	p.must()
	ctx, c := t.Context(), caller(t, orders)
	lose := func(who *troubled) {
		p.a.fail(nil)
		p.b.fail(nil)
		if who != nil {
			who.fail(unreachable())
		}
	}
	opens := func(what string, data, material []envelope.EDK, plaintext []byte) {
		t.Helper()
		p.forget()
		opened, err := p.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: data})
		if err != nil || !bytes.Equal(opened.Plaintext, plaintext) {
			t.Errorf("%s: DecryptDataKey: %v", what, err)
		}
		back, err := p.Unwrap(ctx, c, kms.UnwrapRequest{EDKs: material})
		if err != nil || string(back.Plaintext) != "key material" {
			t.Errorf("%s: Unwrap: %v", what, err)
		}
	}
	for name, tc := range map[string]struct {
		away  *troubled // while they are made
		wraps int
		lose  []*troubled // when they are opened
	}{
		"all":       {nil, 2, []*troubled{nil, p.a, p.b}},
		"no first":  {p.a, 1, []*troubled{nil, p.a}},
		"no second": {p.b, 1, []*troubled{nil, p.b}},
	} {
		lose(tc.away)
		made, err := p.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: "orders"})
		if err != nil {
			t.Fatal(err)
		}
		wrapped, err := p.Wrap(ctx, c, kms.WrapRequest{Key: "orders", Plaintext: []byte("key material")})
		if err != nil {
			t.Fatal(err)
		}
		if len(made.EDKs) != tc.wraps || len(wrapped.EDKs) != tc.wraps {
			t.Errorf("%s: %d and %d wraps, want %d", name, len(made.EDKs), len(wrapped.EDKs), tc.wraps)
		}
		for _, who := range tc.lose {
			lose(who)
			opens(name, made.EDKs, wrapped.EDKs, made.Plaintext)
		}
		lose(nil)
	}
}

// A revocation by one of the backends is heard where all that the agent does is to make
// and open data keys of callers, also by a caller who brings the wrap of the other alone.
func TestOneRevokesWhatIsExported(t *testing.T) {
	p := newPair(t, 1)
	ctx, c := t.Context(), caller(t, orders)
	made, err := p.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	p.Settle() // each backend has its canary
	p.b.intercept(butDescribe)
	for range 6 {
		p.clock.Advance(time.Minute)
		for _, edks := range [][]envelope.EDK{made.EDKs[:1], made.EDKs} {
			_, _ = p.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: edks}) // allowed at first
		}
	}
	for name, edks := range map[string][]envelope.EDK{"the other's wrap": made.EDKs[:1], "both": made.EDKs} {
		_, err = p.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: edks})
		if reason := kms.ReasonOf(err); reason != kms.ReasonKeyUnusable && reason != kms.ReasonKeySuspended {
			t.Errorf("%s: %v, want that the key is refused", name, err)
		}
	}
}

func TestExportedWithFewer(t *testing.T) {
	p := newPair(t, 2)
	p.must()
	p.b.fail(unreachable())
	ctx, c := t.Context(), caller(t, orders)
	_, err := p.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: "orders"})
	wantReason(t, err, kms.ReasonBackendDown)
	_, err = p.Wrap(ctx, c, kms.WrapRequest{Key: "orders", Plaintext: []byte("key material")})
	wantReason(t, err, kms.ReasonBackendDown)
}

// What a caller puts together opens as what belongs together, or not at all.
func TestExportedPutTogether(t *testing.T) {
	p := newPair(t, 1)
	ctx, c := t.Context(), caller(t, orders)
	made, err := p.GenerateDataKey(ctx, c, kms.GenerateDataKeyRequest{Key: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	good, other := made.EDKs[0], made.EDKs[1]
	broken := good
	broken.Ciphertext = append(bytes.Clone(good.Ciphertext[:len(good.Ciphertext)-1]), good.Ciphertext[len(good.Ciphertext)-1]^1)
	info, err := envelope.ParseProviderInfo(good.ProviderInfo)
	if err != nil {
		t.Fatal(err)
	}
	info.Key = "invoices"
	strange := envelope.EDK{ProviderID: envelope.ProviderID, Ciphertext: good.Ciphertext}
	if strange.ProviderInfo, err = info.Marshal(); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		edks []envelope.EDK
		want kms.Reason
	}{
		"none":             {nil, kms.ReasonInvalidMessage},
		"too many":         {slices.Repeat([]envelope.EDK{good}, envelope.MaxEDKs+1), kms.ReasonInvalidMessage},
		"of two keys":      {[]envelope.EDK{good, strange}, kms.ReasonInvalidMessage},
		"of another too":   {[]envelope.EDK{good, {ProviderID: "aws-kms"}}, kms.ReasonInvalidMessage},
		"one twice":        {[]envelope.EDK{good, good}, ""},
		"in another order": {[]envelope.EDK{other, good}, ""},
		"one broken":       {[]envelope.EDK{broken, other}, ""},
		"all broken":       {[]envelope.EDK{broken}, kms.ReasonDecryptFailed},
	} {
		p.forget()
		_, err := p.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: tc.edks})
		if got := kms.ReasonOf(err); got != tc.want {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
	if _, err := p.DecryptDataKey(ctx, c, kms.DecryptDataKeyRequest{EDKs: made.EDKs}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}
