package client

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"maps"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kms-agent/kms-agent/envelope"
)

// CacheLimits bound the data keys that an InProcess holds. A zero field means its
// default.
type CacheLimits struct {
	// MaxEntries is how many data keys are held for encryption, and as many for
	// decryption; 1000 by default. Beyond it the one unused for longest goes.
	MaxEntries int
	// MaxAge is how long a data key is held at most, 5 minutes by default. The
	// agent's own bound (use_until) holds in any case.
	MaxAge time.Duration
	// MaxMessages is how many messages one data key encrypts, 2^20 by default and
	// 2^32 at most.
	MaxMessages uint64
	// MaxBytes is how many bytes of plaintext one data key encrypts, 64 GiB by
	// default and 64 MiB, the longest message in one piece, at least.
	MaxBytes uint64
}

// The defaults of CacheLimits.
const (
	DefaultMaxEntries  = 1000
	DefaultMaxAge      = 5 * time.Minute
	DefaultMaxMessages = 1 << 20
	DefaultMaxBytes    = 64 << 30
)

func (l CacheLimits) complete() (CacheLimits, error) {
	l.MaxEntries = cmp.Or(l.MaxEntries, DefaultMaxEntries)
	l.MaxAge = cmp.Or(l.MaxAge, DefaultMaxAge)
	l.MaxMessages = cmp.Or(l.MaxMessages, DefaultMaxMessages)
	l.MaxBytes = cmp.Or(l.MaxBytes, DefaultMaxBytes)
	switch {
	case l.MaxEntries < 0 || l.MaxAge < 0:
		return l, errors.New("limits of the data-key cache: MaxEntries and MaxAge must not be negative")
	case l.MaxMessages > 1<<32:
		return l, errors.New("limits of the data-key cache: MaxMessages is 2^32 at most")
	case l.MaxBytes < envelope.MaxFrameLength:
		return l, fmt.Errorf("limits of the data-key cache: MaxBytes is %d at least", envelope.MaxFrameLength)
	}
	return l, nil
}

// CacheStats counts since the start.
type CacheStats struct {
	Entries int    // data keys held now
	Hits    uint64 // operations with a data key that was at hand
	Misses  uint64 // calls of the agent for a data key
}

// InProcess encrypts and decrypts in this process. The agent only makes and opens
// data keys, which are held for a while: most operations need no call at all, and
// plaintext never leaves the process. The messages are the agent's own format;
// its Decrypt opens them, and what the agent encrypted, Decrypt opens by asking
// it.
//
// What it costs: policy, audit and revocation see data keys, not messages, and
// take effect when the agent is next asked, within use_until (limits.data_key_use
// of the agent, 5 minutes unless configured) at most. The caller needs the
// operations generate-data-key and decrypt-data-key, and data keys stand in the
// memory of this process; they are cleared when they go. Where that is too much,
// Client has the same methods.
//
// It is safe for concurrent use.
type InProcess struct {
	client     *Client
	encryption *dataKeys
	decryption *dataKeys
}

// InProcess returns an encryptor that gets its data keys through c, which stays
// the caller's to close.
func (c *Client) InProcess(limits CacheLimits) (*InProcess, error) {
	limits, err := limits.complete()
	if err != nil {
		return nil, err
	}
	return &InProcess{client: c, encryption: newDataKeys(limits), decryption: newDataKeys(limits)}, nil
}

// Close clears the data keys; those in use when their operation ends. Operations
// fail from then on. It is idempotent.
func (p *InProcess) Close() error {
	p.encryption.close()
	p.decryption.close()
	return nil
}

// EncryptionStats counts what concerns Encrypt and EncryptStream.
func (p *InProcess) EncryptionStats() CacheStats { return p.encryption.stats() }

// DecryptionStats counts what concerns Decrypt and DecryptStream.
func (p *InProcess) DecryptionStats() CacheStats { return p.decryption.stats() }

func (d *dataKeys) stats() CacheStats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return CacheStats{Entries: len(d.keys), Hits: d.hits, Misses: d.misses}
}

// Encrypt is Client.Encrypt, in this process. One message holds 64 MiB at most;
// the agent opens what its own limits.max_message allows, its DecryptStream all.
func (p *InProcess) Encrypt(ctx context.Context, r *EncryptRequest) (*EncryptResponse, error) {
	if len(r.GetPlaintext()) > envelope.MaxFrameLength {
		return nil, failed(codes.InvalidArgument, ErrTooLarge, r.GetKey(), fmt.Sprintf("one message holds %d bytes at most; use EncryptStream", envelope.MaxFrameLength))
	}
	k, freshness, err := p.keyToEncrypt(ctx, r.GetKey(), r.GetContext(), r.GetMaxStale(), uint64(len(r.GetPlaintext())))
	if err != nil {
		return nil, err
	}
	defer p.encryption.release(k)
	message, err := envelope.Seal(nil, k.key, k.edks, r.GetContext(), r.GetPlaintext())
	if err != nil {
		return nil, failed(codes.Internal, ErrInternal, k.name, "the message could not be made: "+err.Error())
	}
	return &EncryptResponse{Message: message, KeyUse: k.use(freshness)}, nil
}

// Decrypt is Client.Decrypt, in this process where the message was made by an
// InProcess.
func (p *InProcess) Decrypt(ctx context.Context, r *DecryptRequest) (*DecryptResponse, error) {
	m, err := envelope.Parse(r.GetMessage())
	if err != nil {
		return nil, unreadable(err)
	}
	name, own := exported(&m.Header)
	if !own {
		return p.client.Decrypt(ctx, r)
	}
	answer := &DecryptResponse{Context: m.Context}
	err = p.open(ctx, &m.Header, name, r.GetExpectedContext(), r.GetMaxStale(), func(k *dataKey, f Freshness) (err error) {
		answer.Plaintext, err = m.Open(nil, k.key)
		answer.KeyUse = k.use(f)
		return err
	})
	if err != nil {
		return nil, err
	}
	return answer, nil
}

// open tries the data keys of a message until one opens it.
func (p *InProcess) open(ctx context.Context, h *envelope.Header, name string, expected map[string]string, maxStale *durationpb.Duration, try func(*dataKey, Freshness) error) error {
	for pair, value := range expected {
		if got, ok := h.Context[pair]; !ok || got != value {
			return undecryptable(name)
		}
	}
	own := slices.DeleteFunc(slices.Clone(h.EDKs), func(e envelope.EDK) bool { return e.ProviderID != envelope.ProviderID })
	tries := [][]envelope.EDK{own} // as a rule they are of one data key
	for i := range own {
		if len(own) > 1 {
			tries = append(tries, own[i:i+1])
		}
	}
	var first error
	for i, edks := range tries {
		k, freshness, err := p.keyToDecrypt(ctx, edks, h.Context, maxStale)
		if err == nil {
			err = try(k, freshness)
			p.decryption.release(k)
			if err == nil {
				return nil
			}
			err = undecryptable(name)
		}
		if first == nil || errors.Is(first, ErrDecryptFailed) {
			first = err
		}
		if i == 0 && !errors.Is(err, ErrDecryptFailed) {
			break // what none of them opens now, none opens alone
		}
	}
	return first
}

// exported returns the key of a message whose data keys an InProcess can have
// opened: all of ours are exported ones, of one key. Others are the agent's to
// judge.
func exported(h *envelope.Header) (name string, ok bool) {
	for _, edk := range h.EDKs {
		if edk.ProviderID != envelope.ProviderID {
			continue
		}
		info, err := envelope.ParseProviderInfo(edk.ProviderInfo)
		if err != nil || info.Purpose != envelope.PurposeExported || name != "" && name != info.Key {
			return "", false
		}
		name = info.Key
	}
	return name, name != ""
}

// keyToEncrypt returns the data key for a key and context; the caller releases
// it.
func (p *InProcess) keyToEncrypt(ctx context.Context, name string, pairs map[string]string, maxStale *durationpb.Duration, bytes uint64) (*dataKey, Freshness, error) {
	if err := envelope.CheckContext(pairs); err != nil {
		return nil, Freshness{}, failed(codes.InvalidArgument, ErrInvalidRequest, name, err.Error())
	}
	stale, err := bound(maxStale)
	if err != nil {
		return nil, Freshness{}, err
	}
	id := identify(pairs, "encrypt", name)
	return p.encryption.acquire(ctx, want{id: id, bytes: bytes, maxStale: stale, fetch: func(ctx context.Context) (*dataKey, error) {
		return p.generate(ctx, id, &GenerateDataKeyRequest{Key: name, Context: pairs, MaxStale: maxStale})
	}})
}

func (p *InProcess) generate(ctx context.Context, id keyID, r *GenerateDataKeyRequest) (*dataKey, error) {
	asked := time.Now()
	answer, err := p.client.GenerateDataKey(ctx, r)
	if err != nil {
		return nil, err
	}
	k, err := p.received(id, asked, answer.GetPlaintext(), answer.GetKeyUse(), answer.GetUseUntil())
	if err != nil {
		return nil, err
	}
	first := answer.GetEncryptedDataKey()
	for _, one := range append([]*EncryptedDataKey{first}, first.GetMore()...) {
		k.edks = append(k.edks, envelope.EDK{ProviderID: one.GetProviderId(), ProviderInfo: one.GetProviderInfo(), Ciphertext: one.GetCiphertext()})
	}
	return k, nil
}

// keyToDecrypt returns the data key behind EDKs; the caller releases it.
func (p *InProcess) keyToDecrypt(ctx context.Context, edks []envelope.EDK, pairs map[string]string, maxStale *durationpb.Duration) (*dataKey, Freshness, error) {
	stale, err := bound(maxStale)
	if err != nil {
		return nil, Freshness{}, err
	}
	var first *EncryptedDataKey
	what := []string{"decrypt"}
	for _, edk := range edks {
		one := &EncryptedDataKey{ProviderId: edk.ProviderID, ProviderInfo: edk.ProviderInfo, Ciphertext: edk.Ciphertext}
		if what = append(what, string(edk.ProviderInfo), string(edk.Ciphertext)); first == nil {
			first = one
			continue
		}
		first.More = append(first.More, one)
	}
	id := identify(pairs, what...)
	return p.decryption.acquire(ctx, want{id: id, maxStale: stale, fetch: func(ctx context.Context) (*dataKey, error) {
		asked := time.Now()
		answer, err := p.client.DecryptDataKey(ctx, &DecryptDataKeyRequest{EncryptedDataKey: first, Context: pairs, MaxStale: maxStale})
		if err != nil {
			return nil, err
		}
		return p.received(id, asked, answer.GetPlaintext(), answer.GetKeyUse(), answer.GetUseUntil())
	}})
}

// received makes a dataKey of an answer, whose plaintext it takes over.
func (p *InProcess) received(id keyID, asked time.Time, key []byte, use *KeyUse, until *timestamppb.Timestamp) (*dataKey, error) {
	if len(key) != envelope.DataKeySize {
		clear(key)
		return nil, failed(codes.Internal, ErrInternal, use.GetKey(), fmt.Sprintf("the agent gave a data key of %d bytes, not %d", len(key), envelope.DataKeySize))
	}
	k := &dataKey{
		id: id, key: key, name: use.GetKey(), version: use.GetKeyVersion(), freshness: FreshnessOf(use),
		asked: asked, life: p.encryption.limits.MaxAge,
	}
	if until.IsValid() {
		k.until = until.AsTime()
		// The wall clock may be set back later.
		k.life = min(k.life, k.until.Sub(asked.Round(0)))
	}
	return k, nil
}

func (k *dataKey) use(f Freshness) *KeyUse {
	return &KeyUse{Key: k.name, KeyVersion: k.version, Freshness: f.proto()}
}

// bound reads max_stale; nil stays nil.
func bound(maxStale *durationpb.Duration) (*time.Duration, error) {
	if maxStale == nil {
		return nil, nil //nolint:nilnil // no bound
	}
	age := maxStale.AsDuration()
	if maxStale.CheckValid() != nil || age < 0 {
		return nil, failed(codes.InvalidArgument, ErrInvalidRequest, "", "max_stale must be a duration of zero or more")
	}
	return &age, nil
}

// identify hashes strings and an encryption context, each with its length.
func identify(pairs map[string]string, parts ...string) (id keyID) {
	h := sha256.New()
	_, _ = h.Write([]byte{byte(len(parts))}) // a hash never fails
	for _, part := range parts {
		writeField(h, part)
	}
	for _, name := range slices.Sorted(maps.Keys(pairs)) {
		writeField(h, name)
		writeField(h, pairs[name])
	}
	h.Sum(id[:0])
	return id
}

func writeField(h hash.Hash, s string) {
	var length [8]byte
	binary.BigEndian.PutUint64(length[:], uint64(len(s)))
	_, _ = h.Write(length[:])
	_, _ = h.Write([]byte(s))
}
