package kms

import (
	"context"
	"errors"
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
	EDK       envelope.EDK
	KeyUse    KeyUse
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
	material := newDataKey()
	edk, use, err := t.wrapBound(ctx, k, material, envelope.PurposeExported, req.Context)
	if err != nil {
		clear(material)
		return DataKeyResponse{}, err
	}
	return DataKeyResponse{Plaintext: material, EDK: edk, KeyUse: use, UseUntil: t.useUntil(k, use.Freshness)}, nil
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

// wrapBound wraps key material under the current version with the context
// bound, past the cache, which learns from it all the same.
func (t *transaction) wrapBound(ctx context.Context, k *key, material []byte, purpose envelope.Purpose, encryptionContext map[string]string) (envelope.EDK, KeyUse, error) {
	current, err := t.current(ctx, k)
	if err != nil {
		return envelope.EDK{}, KeyUse{}, err
	}
	s, g := t.service, k.group
	info := envelope.ProviderInfo{
		Purpose: purpose, Key: k.Name, ContextBound: true, Partition: s.partitionID(t.partition(k, encryptionContext)),
	}
	authority := g.authority(current, cache.Encrypt)
	began, clock := s.now(), time.Now()
	var wrapped sealed
	if err = s.sure(t.upstream(ctx), g, authority, nil, k.Limits.MaxAge); err == nil {
		wrapped, err = s.wrapFirst(t.upstream(ctx), g, current, material, info, encryptionContext)
	}
	t.upstreamSince(clock)
	s.observe(ctx, g, authority, err, began)
	if err != nil {
		return envelope.EDK{}, KeyUse{}, failure(ctx, k.Name, err)
	}
	s.census.Add(census.Kind{Key: k.Name, Purpose: census.Purpose(purpose.String()), Wraps: g.wraps(sealedKey{wrapped})})
	return wrapped.edk, t.used(k, g.versions(sealedKey{wrapped}).String(), cache.Freshness{Source: cache.Upstream}), nil
}

// observe tells the cache what traffic past it has learned, unless the caller's
// own end explains the error, or the answer is about a configuration that has
// been replaced. A definite no counts whatever has become of the caller.
func (s *Service) observe(ctx context.Context, g *group, a cache.Authority, err error, began time.Duration) {
	ended := err != nil && ctx.Err() != nil && !plugins.ClassOf(err).Definite()
	if ended || !s.inUse(g) {
		return
	}
	s.cache.Observe(a, verdictOf(err), began)
}

// DecryptDataKeyRequest asks for the clear form of an exported data key.
type DecryptDataKeyRequest struct {
	EDK     envelope.EDK
	Context map[string]string
}

// DecryptDataKey opens what GenerateDataKey made, with exactly its context,
// and nothing else.
func (s *Service) DecryptDataKey(ctx context.Context, call Call, req DecryptDataKeyRequest) (DataKeyResponse, error) {
	return perform(ctx, s, call, policy.DecryptDataKey, func(ctx context.Context, t *transaction) (DataKeyResponse, error) {
		k, edk, err := t.admitEDK(ctx, req.EDK, policy.DecryptDataKey, req.Context, envelope.PurposeExported)
		if err != nil {
			return DataKeyResponse{}, err
		}
		use, v, err := t.decryptionKey(ctx, k, sealedKey{edk})
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

// admitEDK authorises the caller for the key that an EDK names and returns the
// EDK ready to be opened.
func (t *transaction) admitEDK(ctx context.Context, edk envelope.EDK, op policy.Operation, encryptionContext map[string]string, purpose envelope.Purpose) (*key, sealed, error) {
	if edk.ProviderID != envelope.ProviderID {
		return nil, sealed{}, foreign(errors.New("its provider is not kms-agent"))
	}
	info, err := envelope.ParseProviderInfo(edk.ProviderInfo)
	if err != nil {
		return nil, sealed{}, foreign(err)
	}
	k, err := t.authoriseWith(ctx, info.Key, op, encryptionContext, uint64(len(edk.Ciphertext)))
	if err != nil {
		return nil, sealed{}, err
	}
	if !info.ContextBound {
		return nil, sealed{}, undecryptable(k.Name, errors.New("its context is not bound"))
	}
	ready, err := t.recognise(k, edk, info, encryptionContext, purpose)
	return k, ready, err
}

// WrapRequest asks for key material to be wrapped.
type WrapRequest struct {
	Key       string
	Plaintext []byte
	Context   map[string]string
}

// WrapResponse holds wrapped key material.
type WrapResponse struct {
	EDK    envelope.EDK
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
		edk, use, err := t.wrapBound(ctx, k, req.Plaintext, envelope.PurposeWrap, req.Context)
		return WrapResponse{EDK: edk, KeyUse: use}, err
	})
}

// UnwrapRequest asks for wrapped key material in clear.
type UnwrapRequest struct {
	EDK     envelope.EDK
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
		k, edk, err := t.admitEDK(ctx, req.EDK, policy.Unwrap, req.Context, envelope.PurposeWrap)
		if err != nil {
			return UnwrapResponse{}, err
		}
		plaintext, err := t.unwrapDirect(ctx, k, edk)
		if err != nil {
			return UnwrapResponse{}, failure(ctx, k.Name, err)
		}
		t.record.BytesOut = uint64(len(plaintext))
		use := t.used(k, k.group.versions(sealedKey{edk}).String(), cache.Freshness{Source: cache.Upstream})
		return UnwrapResponse{Plaintext: plaintext, KeyUse: use}, nil
	})
}

func (t *transaction) unwrapDirect(ctx context.Context, k *key, edk sealed) ([]byte, error) {
	s, g := t.service, k.group
	w := g.parts[edk.part]
	if err := s.knows(t.upstream(ctx), w, edk.version); err != nil {
		return nil, err
	}
	authority := g.authority(g.versions(sealedKey{edk}), cache.Decrypt)
	began, clock := s.now(), time.Now()
	var plaintext []byte
	err := s.sure(t.upstream(ctx), g, authority, sealedKey{edk}, k.Limits.MaxAge)
	if err == nil {
		plaintext, err = s.unwrap(t.upstream(ctx), w, edk)
	}
	t.upstreamSince(clock)
	s.observe(ctx, g, authority, err, began)
	return plaintext, err
}
