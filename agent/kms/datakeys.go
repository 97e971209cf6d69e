package kms

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kms-agent/kms-agent/agent/census"
	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

// GenerateDataKeyRequest asks for a new data key.
type GenerateDataKeyRequest struct {
	Key     string
	Context map[string]string
}

// DataKeyResponse holds a data key: in clear where the operation gives that.
type DataKeyResponse struct {
	Plaintext []byte
	// EDKs has one of each backend that has wrapped it, in the configuration's order.
	EDKs   []envelope.EDK
	KeyUse KeyUse
	// UseUntil bounds how long a receiver may cache the plaintext.
	UseUntil time.Time
}

func (r *DataKeyResponse) wipe() { clear(r.Plaintext) }

// GenerateDataKey makes a data key and wraps it, with the context bound. The
// data key is the caller's alone: the agent never uses or caches it.
func (s *Service) GenerateDataKey(ctx context.Context, call Call, req GenerateDataKeyRequest) (DataKeyResponse, error) {
	return perform(ctx, s, call, policy.GenerateDataKey, func(ctx context.Context, t *transaction) (DataKeyResponse, error) {
		return t.generate(ctx, req, policy.GenerateDataKey)
	})
}

// GenerateDataKeyWithoutPlaintext is GenerateDataKey without the clear form.
func (s *Service) GenerateDataKeyWithoutPlaintext(ctx context.Context, call Call, req GenerateDataKeyRequest) (DataKeyResponse, error) {
	const op = policy.GenerateDataKeyWithoutPlaintext
	return perform(ctx, s, call, op, func(ctx context.Context, t *transaction) (DataKeyResponse, error) {
		r, err := t.generate(ctx, req, op)
		r.wipe()
		r.Plaintext, r.UseUntil = nil, time.Time{}
		return r, err
	})
}

func (t *transaction) generate(ctx context.Context, req GenerateDataKeyRequest, op policy.Operation) (DataKeyResponse, error) {
	k, err := t.authoriseWith(ctx, req.Key, op, req.Context, envelope.DataKeySize)
	if err != nil {
		return DataKeyResponse{}, err
	}
	material := t.service.newDataKey()
	edks, use, err := t.wrapBound(ctx, k, material, envelope.PurposeExported, req.Context)
	if err != nil {
		clear(material)
		return DataKeyResponse{}, err
	}
	return DataKeyResponse{Plaintext: material, EDKs: edks, KeyUse: use, UseUntil: t.useUntil(k, use.Freshness)}, nil
}

// useUntil is how long a receiver may cache a data key: no longer than the agent
// itself would use it on the confirmation behind this answer, nor than policy
// lets this caller have one.
func (t *transaction) useUntil(k *key, f cache.Freshness) time.Time {
	left := k.Limits.MaxAge
	if t.policyStale != nil {
		left = min(left, *t.policyStale)
	}
	return t.began.Add(max(0, min(t.state.DataKeyUse, left-f.Age)))
}

// wrapBound has key material wrapped by every part that answers, under the current
// versions and with the context bound: past the cache, which learns from it all the same.
func (t *transaction) wrapBound(ctx context.Context, k *key, material []byte, purpose envelope.Purpose, encryptionContext map[string]string) ([]envelope.EDK, KeyUse, error) {
	current, err := t.current(ctx, k)
	if err != nil {
		return nil, KeyUse{}, err
	}
	s, g := t.service, k.group
	info := envelope.ProviderInfo{
		Purpose: purpose, Key: k.Name, ContextBound: true, Partition: s.partitionID(t.partition(k, encryptionContext)),
	}
	if purpose == envelope.PurposeExported {
		if info.Check, err = envelope.NewKeyCheck(material); err != nil {
			return nil, KeyUse{}, err
		}
	}
	authority := g.authorityIn(current, cache.Encrypt, true, encryptionContext)
	clock, began := time.Now(), s.now()
	wrapped, err := s.wrapGroup(t.upstream(ctx), g, current, material, info, encryptionContext)
	all := len(wrapped) == len(g.parts)
	if err != nil || all {
		s.observe(ctx, g, authority, err, began)
	}
	if err == nil && !all {
		err = s.agreed(t.upstream(ctx), g, authority, wrapped, t.maxAge(k))
	}
	t.upstreamSince(clock)
	if err != nil {
		return nil, KeyUse{}, failure(ctx, k.Name, err)
	}
	edks := make([]envelope.EDK, len(wrapped))
	for i, one := range wrapped {
		edks[i] = one.edk
	}
	s.leaveCanaries(ctx, g, wrapped)
	s.census.Add(census.Kind{Key: k.Name, Purpose: census.Purpose(purpose.String()), Wraps: g.wraps(wrapped)})
	return edks, t.used(k, g.versions(wrapped).String(), cache.Freshness{Source: cache.Upstream}), nil
}

// observe tells the cache what traffic past it has learned, unless the caller's
// own end explains the error, or the answer is about a configuration that has
// been replaced. A definite no counts whatever has become of the caller.
func (s *Service) observe(ctx context.Context, g *group, a cache.Authority, err error, began time.Duration) {
	ended := err != nil && ctx.Err() != nil && !plugins.ClassOf(err).Definite()
	if ended || !s.inUse(g) {
		return
	}
	verdict := verdictOf(err)
	s.cache.Observe(a, verdict, err, began)
	if verdict == cache.No && a.Context != "" {
		a.Context = "" // it may be more than a word on the context
		s.cache.Ask(a)
	}
}

// observeOne is observe for what one of the parts has said: of several it is no yes.
func (s *Service) observeOne(ctx context.Context, g *group, a cache.Authority, err error, began time.Duration) {
	if err != nil || len(g.parts) == 1 {
		s.observe(ctx, g, a, err, began)
	}
}

// maxAge is how old the last confirmation may be, by the key's limits and for this request.
func (t *transaction) maxAge(k *key) time.Duration {
	if t.maxStale != nil {
		return min(k.Limits.MaxAge, *t.maxStale)
	}
	return k.Limits.MaxAge
}

// DecryptDataKeyRequest asks for the clear form of an exported data key, whose EDKs are
// of one data key: it is opened by whichever backend answers first.
type DecryptDataKeyRequest struct {
	EDKs    []envelope.EDK
	Context map[string]string
}

// DecryptDataKey opens what GenerateDataKey made, with exactly its context,
// and nothing else.
func (s *Service) DecryptDataKey(ctx context.Context, call Call, req DecryptDataKeyRequest) (DataKeyResponse, error) {
	return perform(ctx, s, call, policy.DecryptDataKey, func(ctx context.Context, t *transaction) (DataKeyResponse, error) {
		k, edks, err := t.admitEDKs(ctx, req.EDKs, policy.DecryptDataKey, req.Context, envelope.PurposeExported)
		if err != nil {
			return DataKeyResponse{}, err
		}
		use, v, err := t.decryptionKey(ctx, k, edks)
		if err != nil {
			return DataKeyResponse{}, err
		}
		defer use.Release()
		plaintext := append([]byte(nil), use.DataKey()...)
		return DataKeyResponse{
			Plaintext: plaintext, KeyUse: t.used(k, v.String(), use.Freshness()), UseUntil: t.useUntil(k, use.Freshness()),
		}, nil
	})
}

// admitEDKs authorises the caller for the key that EDKs name, and returns those that can
// be tried, one of each part.
func (t *transaction) admitEDKs(ctx context.Context, edks []envelope.EDK, op policy.Operation, encryptionContext map[string]string, purpose envelope.Purpose) (*key, sealedKey, error) {
	name, infos, err := ownEDKs(edks)
	if err != nil {
		return nil, nil, err
	}
	payload := 0 // they are of the same
	for _, edk := range edks {
		payload = max(payload, len(edk.Ciphertext))
	}
	k, err := t.authoriseWith(ctx, name, op, encryptionContext, uint64(payload))
	if err != nil {
		return nil, nil, err
	}
	ready, err := t.recogniseAll(k, edks, infos, encryptionContext, purpose)
	return k, distinct(ready), err
}

// ownEDKs reads what EDKs say of themselves: all are of this kind of agent and name one key.
func ownEDKs(edks []envelope.EDK) (name string, infos []*envelope.ProviderInfo, err error) {
	switch n := len(edks); {
	case n == 0:
		return "", nil, foreign(errors.New("there is no encrypted data key"))
	case n > envelope.MaxEDKs:
		return "", nil, foreign(fmt.Errorf("it has %d encrypted data keys, at most %d", n, envelope.MaxEDKs))
	}
	infos = make([]*envelope.ProviderInfo, len(edks))
	for i, edk := range edks {
		if edk.ProviderID != envelope.ProviderID {
			return "", nil, foreign(errors.New("its provider is not kms-agent"))
		}
		info, err := envelope.ParseProviderInfo(edk.ProviderInfo)
		if err != nil {
			return "", nil, foreign(err)
		}
		infos[i] = &info
		switch {
		case info.Key != infos[0].Key:
			return "", nil, foreign(errors.New("its encrypted data keys name several keys"))
		case info.Check != infos[0].Check:
			return "", nil, foreign(errors.New("its encrypted data keys are not of one data key"))
		}
	}
	return infos[0].Key, infos, nil
}

// WrapRequest asks for key material to be wrapped.
type WrapRequest struct {
	Key       string
	Plaintext []byte
	Context   map[string]string
}

// WrapResponse holds wrapped key material.
type WrapResponse struct {
	// EDKs has one of each backend that has wrapped it, in the configuration's order.
	EDKs   []envelope.EDK
	KeyUse KeyUse
}

// Wrap wraps 1 to MaxWrapSize bytes of the caller's own key material directly
// under the wrapping key. Nothing is cached.
func (s *Service) Wrap(ctx context.Context, call Call, req WrapRequest) (WrapResponse, error) {
	return perform(ctx, s, call, policy.Wrap, func(ctx context.Context, t *transaction) (WrapResponse, error) {
		k, err := t.authoriseWith(ctx, req.Key, policy.Wrap, req.Context, uint64(len(req.Plaintext)))
		if err != nil {
			return WrapResponse{}, err
		}
		if n := len(req.Plaintext); n < 1 || n > MaxWrapSize {
			return WrapResponse{}, invalid(k.Name, "Wrap takes 1 to %d bytes of key material, this is %d; use Encrypt for data", MaxWrapSize, n)
		}
		t.record.BytesIn = uint64(len(req.Plaintext))
		edks, use, err := t.wrapBound(ctx, k, req.Plaintext, envelope.PurposeWrap, req.Context)
		return WrapResponse{EDKs: edks, KeyUse: use}, err
	})
}

// UnwrapRequest asks for wrapped key material in clear, whose EDKs are of the same:
// it is opened by whichever backend answers first.
type UnwrapRequest struct {
	EDKs    []envelope.EDK
	Context map[string]string
}

// UnwrapResponse holds key material in clear.
type UnwrapResponse struct {
	Plaintext []byte
	KeyUse    KeyUse
}

func (r *UnwrapResponse) wipe() { clear(r.Plaintext) }

// Unwrap opens what Wrap made, with exactly its context, and nothing else. It
// always asks upstream.
func (s *Service) Unwrap(ctx context.Context, call Call, req UnwrapRequest) (UnwrapResponse, error) {
	return perform(ctx, s, call, policy.Unwrap, func(ctx context.Context, t *transaction) (UnwrapResponse, error) {
		k, edks, err := t.admitEDKs(ctx, req.EDKs, policy.Unwrap, req.Context, envelope.PurposeWrap)
		if err != nil {
			return UnwrapResponse{}, err
		}
		plaintext, v, err := t.unwrapDirect(ctx, k, edks)
		if err != nil {
			return UnwrapResponse{}, failure(ctx, k.Name, err)
		}
		t.record.BytesOut = uint64(len(plaintext))
		use := t.used(k, v.String(), cache.Freshness{Source: cache.Upstream})
		return UnwrapResponse{Plaintext: plaintext, KeyUse: use}, nil
	})
}

// unwrapDirect opens EDKs past the cache. The result is the caller's to clear.
func (t *transaction) unwrapDirect(ctx context.Context, k *key, edks sealedKey) ([]byte, versions, error) {
	s, g := t.service, k.group
	known, err := t.known(ctx, k, edks)
	if err != nil {
		return nil, nil, err
	}
	v := g.versions(known)
	authority := g.authorityOf(known)
	if err := s.sure(t.upstream(ctx), g, authority, known); err != nil {
		return nil, v, err
	}
	began, clock := s.now(), time.Now()
	plaintext, by, err := s.unwrapGroup(t.upstream(ctx), g, known)
	s.observeOne(ctx, g, authority, err, began)
	var proven sealedKey
	if err == nil {
		proven, err = s.wrapped(t.upstream(ctx), g, authority, known, by, plaintext)
	}
	if err == nil {
		err = s.agreed(t.upstream(ctx), g, authority, proven, t.maxAge(k))
	}
	if err != nil {
		clear(plaintext)
		plaintext = nil
	}
	t.upstreamSince(clock)
	return plaintext, v, err
}
