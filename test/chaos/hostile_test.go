package chaos

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/envelope"
)

// forbidden does what no rule allows, with what otherwise would work.
func (w *worker) forbidden() {
	c, ctx, cancel := w.begin("encrypt", "archive")
	defer cancel()
	if w.name == "bob" {
		switch w.r.IntN(3) {
		case 0:
			c.Operation, c.Key = "wrap", "orders"
			_, err := w.c.Wrap(ctx, &client.WrapRequest{Key: c.Key, Plaintext: w.payload()})
			w.rec.done(c, err)
			return
		case 1:
			if m, ok := w.kept.pick(w.r, func(key string) bool { return key == "ledger" || key == "pair" }); ok {
				c.Operation, c.Key = "decrypt", m.key
				w.decryptIn(ctx, c, m)
				return
			}
		case 2:
			c.Key = "ledger"
		}
	}
	w.encryptIn(ctx, c)
}

// hostile sends what nobody can have made honestly.
func (w *worker) hostile() {
	m, ok := w.kept.pick(w.r, w.may)
	if !ok {
		return
	}
	c, ctx, cancel := w.begin("decrypt", m.key)
	defer cancel()
	sealed := append([]byte(nil), m.sealed...)
	switch w.r.IntN(4) {
	case 0:
		c.Hostile, sealed = "garbage", w.payload()
	case 1:
		c.Hostile, sealed = "cut", sealed[:w.r.IntN(len(sealed))]
	case 2:
		c.Hostile = "a bit changed"
		sealed[w.r.IntN(len(sealed))] ^= 1 << w.r.IntN(8)
	case 3:
		w.forge(ctx, c, m)
		return
	}
	_, err := w.c.Decrypt(ctx, &client.DecryptRequest{Message: sealed})
	w.rec.done(c, err)
}

// forge asks for a data key under a version that there is not, or with an EDK that was
// changed: neither may harm others.
func (w *worker) forge(ctx context.Context, c *call, m message) {
	edk := edksOf(m.sealed)[0]
	info, err := envelope.ParseProviderInfo(edk.ProviderInfo)
	if err != nil {
		return
	}
	c.Operation, c.Hostile = "decrypt-data-key", "a forged EDK"
	info.Purpose, info.ContextBound = envelope.PurposeExported, true
	if w.r.IntN(2) == 0 {
		c.Hostile, info.Version = "an EDK of a version that is not", "77"
	}
	encoded, err := info.Marshal()
	if err != nil {
		return
	}
	_, err = w.c.DecryptDataKey(ctx, &client.DecryptDataKeyRequest{EncryptedDataKey: &client.EncryptedDataKey{
		ProviderId: edk.ProviderID, ProviderInfo: encoded, Ciphertext: edk.Ciphertext,
	}})
	w.rec.done(c, err)
}

// hasty gives up before, in, or after the call, or has all the time of the world.
func (w *worker) hasty() {
	c, _, cancel := w.begin("encrypt", w.key())
	cancel()
	c.Hasty, c.Patience = true, time.Duration(w.r.IntN(20_000))*time.Microsecond
	ctx, cancel := context.WithTimeout(context.Background(), c.Patience)
	defer cancel()
	switch w.r.IntN(4) {
	case 0: // cancelled, not late
		ctx, cancel = context.WithCancel(context.Background())
		defer time.AfterFunc(c.Patience, cancel).Stop()
		defer cancel()
	case 1:
		c.Patience = 24 * time.Hour
		long, end := context.WithTimeout(context.Background(), c.Patience)
		defer end()
		w.encryptIn(long, c)
		return
	}
	zero := time.Duration(0)
	c.Uses, c.MaxStale = []use{{Key: c.Key, Encrypt: true}}, &zero
	plaintext := w.payload()
	a, err := w.c.Encrypt(ctx, &client.EncryptRequest{Key: c.Key, Plaintext: plaintext, MaxStale: durationpb.New(0)})
	if err == nil {
		c.Uses[0] = w.rec.useOf(a.GetKeyUse(), true, edksOf(a.GetMessage()))
		c.Message = messageID(a.GetMessage())
		w.kept.add(message{c.Key, a.GetMessage(), plaintext})
	}
	w.rec.done(c, err)
}
