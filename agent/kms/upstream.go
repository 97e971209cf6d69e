package kms

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kms-agent/kms-agent/agent/random"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

// verdictOf tells the cache what an error from upstream means.
func verdictOf(err error) cache.Verdict {
	if err == nil {
		return cache.Yes
	}
	var own *Error
	if errors.Is(err, context.Canceled) || errors.Is(err, plugins.ErrCrowded) || errors.As(err, &own) {
		return cache.Other
	}
	switch class := plugins.ClassOf(err); {
	case class.Definite():
		return cache.No
	case class == plugins.BadCiphertext, class == plugins.Invalid:
		return cache.Other
	default:
		return cache.Unreachable
	}
}

// current returns the versions that new data keys are wrapped under.
func (t *transaction) current(ctx context.Context, k *key) (versions, error) {
	v, known, err := t.service.describeGroup(t.upstream(ctx), k.group, t.maxAge(k))
	if err != nil {
		return nil, failure(ctx, k.Name, err)
	}
	t.record.KeyVersion = v.String()
	for _, d := range known {
		if why := k.tooOld(d, 1); why != "" {
			return nil, &Error{Reason: ReasonKeyUnusable, Key: k.Name, Message: why}
		}
	}
	return v, nil
}

// tooOld says why the current version encrypts nothing new, at a share of the age
// that it may have; "" where it does.
func (k *key) tooOld(d *described, share float64) string {
	if k.MaxVersionAge == 0 || d == nil {
		return ""
	}
	v := findVersion(d.Description, d.Current)
	if v == nil || v.Created.IsZero() {
		return "the backend does not tell when version " + d.Current + " of the wrapping key was made, and max_version_age wants to know"
	}
	age := time.Since(v.Created) // the wall clock's: it counts across restarts
	if float64(age) < share*float64(k.MaxVersionAge) {
		return ""
	}
	return fmt.Sprintf("version %s of the wrapping key is %s old, and encrypts until it is %s old: rotate the wrapping key", d.Current, age.Round(time.Minute), k.MaxVersionAge)
}

// upstream marks calls to the backend with who they are for.
func (t *transaction) upstream(ctx context.Context) context.Context {
	return plugins.WithCaller(ctx, t.call.Caller.ID.String())
}

// upstreamSince counts the time since began as spent on the backend.
func (t *transaction) upstreamSince(began time.Time) {
	t.record.UpstreamMicros += time.Since(began).Microseconds()
}

// waited counts the time since began as spent on the backend, where the cache
// had to ask it.
func (t *transaction) waited(use *cache.Use, began time.Time) {
	if use == nil || use.Freshness().Source == cache.Upstream {
		t.upstreamSince(began)
	}
}

// encryptionKey takes a data key for one message of that many bytes from the
// cache, which wraps a new one where it has to. With reserve it is the most that
// they can be, and cache.GiveBack follows.
func (t *transaction) encryptionKey(ctx context.Context, k *key, encryptionContext map[string]string, bytes uint64, reserve bool) (*cache.Use, error) {
	current, err := t.current(ctx, k)
	if err != nil {
		return nil, err
	}
	partition, began := t.partition(k, encryptionContext), time.Now()
	use, err := t.service.cache.Encrypt(t.upstream(ctx), cache.EncryptRequest{
		Caller: t.call.Caller.ID.String(),
		Slot: cache.Slot{
			Key: k.Name, Authority: k.group.authorityIn(current, cache.Encrypt, k.BindContext, encryptionContext), Partition: partition,
		},
		Limits: k.limits(cache.Encrypt), Bytes: bytes, Reserve: reserve, MaxStale: t.maxStale, Arrived: t.arrived,
		Fill: func(ctx context.Context) (cache.Material, error) {
			m, err := t.service.newMessageKey(ctx, k, current, partition, encryptionContext)
			return t.service.stillWanted(k, m, err)
		},
	})
	t.waited(use, began)
	if err != nil {
		return nil, failure(ctx, k.Name, err)
	}
	return use, nil
}

// newMessageKey makes a data key for messages and has it wrapped and proven.
func (s *Service) newMessageKey(ctx context.Context, k *key, current versions, partition string, encryptionContext map[string]string) (cache.Material, error) {
	began := s.now()
	material := s.newDataKey()
	info := envelope.ProviderInfo{
		Purpose: envelope.PurposeMessage, Key: k.Name,
		ContextBound: k.BindContext, Partition: s.partitionID(partition),
	}
	wrapped, err := s.wrapGroup(ctx, k.group, current, material, info, encryptionContext)
	if err != nil {
		clear(material)
		return cache.Material{}, err
	}
	all := len(wrapped) == len(k.group.parts)
	if !all {
		k.group.lacking.Store(true)
	}
	s.leaveCanaries(ctx, k.group, wrapped)
	if all && s.inUse(k.group) {
		s.cache.Observe(k.group.authorityIn(current, cache.Decrypt, k.BindContext, encryptionContext), cache.Yes, nil, began)
	}
	return cache.Material{DataKey: material, Origin: k.group.made(wrapped), Unconfirmed: !all}, nil
}

// stillWanted keeps a data key out of the cache when the key that it belongs to
// has been taken out of the configuration, or given to another backend, since
// the operation began: Apply has evicted such data keys already. Nor does it say
// anything that the backend of before is gone, also to those who joined the operation.
func (s *Service) stillWanted(k *key, m cache.Material, err error) (cache.Material, error) {
	if (err == nil || verdictOf(err) == cache.Unreachable) && !s.inUse(k.group) {
		clear(m.DataKey)
		return cache.Material{}, reconfigured(k)
	}
	return m, err
}

// newDataKey makes the bytes of a data key, of whatever use. It never fails, and does
// not wait for a backend's random.
func (s *Service) newDataKey() []byte {
	material := make([]byte, envelope.DataKeySize)
	s.random.Fill(material, random.DataKey)
	return material
}

// partition names who shares a data key for encryption. The parts are
// length-prefixed: no two partitions have the same name.
func (t *transaction) partition(k *key, encryptionContext map[string]string) string {
	var name []byte
	switch k.Partition {
	case PartitionKey:
		name = append(name, 'k')
	case PartitionContext:
		name = append(name, 'x')
	default:
		name = append(name, 'c')
		name = append(name, t.call.Caller.ID.String()...)
	}
	if k.BindContext || k.Partition == PartitionContext {
		sum := contextHash(encryptionContext)
		name = append(append(name, 0), sum[:]...)
	}
	if k.BindContext {
		// A data key from before a reload that asked for this binds nothing.
		name = append(name, 'b')
	}
	return string(name)
}

func contextHash(encryptionContext map[string]string) [sha256.Size]byte {
	h := sha256.New()
	for _, name := range sortedKeys(encryptionContext) {
		writeField(h.Write, []byte(name))
		writeField(h.Write, []byte(encryptionContext[name]))
	}
	return [sha256.Size]byte(h.Sum(nil))
}

func writeField(write func([]byte) (int, error), field []byte) {
	var length [8]byte
	binary.BigEndian.PutUint64(length[:], uint64(len(field)))
	_, _ = write(length[:]) // a hash never fails
	_, _ = write(field)
}

// partitionID separates writers in a message without naming them.
func (s *Service) partitionID(partition string) (id [16]byte) {
	mac := hmac.New(sha256.New, s.partitionKey[:])
	mac.Write([]byte(partition))
	copy(id[:], mac.Sum(nil))
	return id
}

// decryptionKey takes the data key behind EDKs from the cache, which asks upstream
// where it has to.
func (t *transaction) decryptionKey(ctx context.Context, k *key, edks sealedKey) (*cache.Use, versions, error) {
	known, err := t.known(ctx, k, edks)
	if err != nil {
		return nil, nil, failure(ctx, k.Name, err)
	}
	v := k.group.versions(known)
	authority := k.group.authorityOf(known)
	t.record.KeyVersion = v.String()
	began := time.Now()
	use, err := t.service.cache.Decrypt(t.upstream(ctx), cache.DecryptRequest{
		Caller: t.call.Caller.ID.String(), Hold: t.holds, Key: k.Name, ID: decryptID(k, known),
		Authority: authority,
		Limits:    k.limits(cache.Decrypt), MaxStale: t.maxStale, Arrived: t.arrived,
		Fill: func(ctx context.Context) (cache.Material, error) {
			if err := t.service.sure(ctx, k.group, authority, known); err != nil {
				return cache.Material{}, err
			}
			material, by, err := t.service.unwrapGroup(ctx, k.group, known)
			var origin sealedKey
			if err == nil {
				origin, err = t.service.wrapped(ctx, k.group, authority, known, by, material)
			}
			if err != nil {
				clear(material)
				material = nil
			}
			return t.service.stillWanted(k, cache.Material{
				DataKey: material, Origin: origin, Unconfirmed: len(k.group.parts) > 1, // one has answered
			}, err)
		},
	})
	t.waited(use, began)
	if err != nil {
		return nil, nil, failure(ctx, k.Name, err)
	}
	return use, v, nil
}

// known returns the EDKs under versions that upstream has told of: others are never
// tried on a caller's word.
func (t *transaction) known(ctx context.Context, k *key, edks sealedKey) (sealedKey, error) {
	var known sealedKey
	for _, edk := range edks {
		// One that was refused, and is not told of any more, is refused still.
		if w := k.group.parts[edk.part]; w.hasToldOf(edk.version) || len(k.group.parts) > 1 && w.refuses(edk.version, cache.Decrypt) {
			known = append(known, edk)
		}
	}
	if len(known) == len(edks) {
		return known, nil
	}
	// One that can be opened is not made to wait for what the others say of the rest.
	bounded, cancel := ctx, context.CancelFunc(func() {})
	if len(known) > 0 {
		bounded, cancel = context.WithTimeout(ctx, hedgeAfter)
	}
	defer cancel()
	var parts []int
	for _, edk := range edks {
		if known.of(edk.part) == nil {
			parts = append(parts, edk.part)
		}
	}
	errs := t.service.poll(bounded, k.group, parts, polling{
		allowance: describePatience,
		ask: func(ctx context.Context, part int) error {
			return t.service.knows(t.upstream(ctx), k.group.parts[part], edks.of(part).version)
		},
	})
	for part, err := range errs {
		if k.group.refuses(err) {
			return nil, err
		}
		if err == nil {
			known = append(known, *edks.of(part))
		}
	}
	if len(known) == 0 {
		return nil, t.service.combine(k.group, errs)
	}
	return inOrder(known), nil
}

func decryptID(k *key, edks sealedKey) cache.DecryptID {
	h := sha256.New()
	for _, edk := range edks {
		for _, field := range [][]byte{
			[]byte(k.group.parts[edk.part].id.backend), []byte(k.Name), edk.edk.ProviderInfo, edk.edk.Ciphertext, edk.binding.AAD(),
		} {
			writeField(h.Write, field)
		}
	}
	return cache.DecryptID(h.Sum(nil))
}

// recogniseAll returns those of EDKs that can be opened, or why none can. infos is what
// they say of themselves; nil for what is none of ours.
func (t *transaction) recogniseAll(k *key, edks []envelope.EDK, infos []*envelope.ProviderInfo, encryptionContext map[string]string, allowed ...envelope.Purpose) (sealedKey, error) {
	var ready sealedKey
	var last error = undecryptable(k.Name, errors.New("it has no encrypted data key of this key"))
	for i, info := range infos {
		if info == nil || t.state.keys[info.Key] != k {
			continue
		}
		one, err := t.recognise(k, edks[i], *info, encryptionContext, allowed...)
		if err != nil {
			last = err
			continue
		}
		ready = append(ready, one)
	}
	if len(ready) == 0 {
		return nil, last
	}
	return ready, nil
}

// recognise turns an EDK into something that can be opened: it must be of this
// agent, of a purpose in allowed, and under a wrapping key that the configuration
// gives its logical key.
func (t *transaction) recognise(k *key, edk envelope.EDK, info envelope.ProviderInfo, encryptionContext map[string]string, allowed ...envelope.Purpose) (sealed, error) {
	if !slices.Contains(allowed, info.Purpose) {
		return sealed{}, undecryptable(k.Name, errors.New("purpose "+info.Purpose.String()+" is not for this operation"))
	}
	part := k.group.partOf(info.URI)
	if part < 0 {
		return sealed{}, foreignPart(k.Name, info.URI)
	}
	if n := len(edk.Ciphertext); n == 0 || n > plugins.MaxCiphertextSize {
		return sealed{}, undecryptable(k.Name, fmt.Errorf("an encrypted data key of %d bytes: %w", n, errNoWrap))
	}
	b := plugins.Binding{Purpose: info.Purpose.String(), ProviderInfo: edk.ProviderInfo, ContextBound: info.ContextBound}
	if info.ContextBound {
		b.Context = encryptionContext
	}
	return sealed{edk: edk, version: info.Version, binding: b, part: part}, nil
}

// errNoWrap: no backend has made it, nor is asked.
var errNoWrap = fmt.Errorf("what a backend wraps has 1 to %d bytes", plugins.MaxCiphertextSize)

// What callers are told of their own ends.
const (
	outOfTime         = "the caller's deadline passed before the backend answered; allow more time"
	cancelledByCaller = "the caller cancelled the request"
)

// failure turns what a leaf returned into what the caller is told. ctx is the
// caller's: its end explains an error better than anything behind it.
func failure(ctx context.Context, key string, err error) *Error {
	var done *Error
	if errors.As(err, &done) {
		return done
	}
	e := &Error{Key: key, Cause: err}
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		e.Reason, e.Message = ReasonDeadlineExceeded, outOfTime
	case errors.Is(ctx.Err(), context.Canceled):
		e.Reason, e.Message = ReasonCancelled, cancelledByCaller
	case errors.Is(err, cache.ErrSuspended):
		e.Reason, e.RetryAfter = ReasonKeySuspended, time.Second
		e.Message = "the backend refused this key and the agent is making sure; retry, and if it stays so the key was disabled upstream"
	case errors.Is(err, cache.ErrOverShare):
		e.Reason, e.RetryAfter = ReasonTooManyRequests, time.Second
		e.Message = "the caller has too many requests waiting for the backend; send fewer at once"
	case errors.Is(err, cache.ErrMemory):
		e.Reason, e.RetryAfter = ReasonTooManyRequests, time.Second
		e.Message = "too many data keys are in use at once; retry, and raise cache.max_entries if it stays so"
	case errors.Is(err, cache.ErrTooLarge):
		e.Reason = ReasonTooLarge
		e.Message = "the plaintext is larger than one data key of this key may encrypt (cache.max_bytes); split the data"
	case errors.Is(err, cache.ErrRevoked):
		unusable(e)
	case errors.Is(err, cache.ErrClosed):
		e.Reason, e.RetryAfter, e.Message = ReasonShuttingDown, time.Second, "the agent is shutting down"
	default:
		upstreamFailure(e, err)
	}
	return e
}

func upstreamFailure(e *Error, err error) {
	switch plugins.ClassOf(err) {
	case plugins.Denied, plugins.KeyUnusable, plugins.KeyNotFound:
		unusable(e)
	case plugins.BadCiphertext:
		*e = *undecryptable(e.Key, err)
	case plugins.Internal:
		e.Reason, e.RetryAfter = ReasonBackendBroken, time.Second
		e.Message = "the backend gave an answer that cannot be right; it is not used; `kms-agent status` on the host says more"
	case plugins.Invalid:
		e.Reason, e.Message = ReasonInternal, "the backend refused the agent's request as invalid; see the agent's log"
	default:
		e.Reason, e.RetryAfter = ReasonBackendDown, retryAfter(err)
		e.Message = "the backend cannot be reached now; retry"
		if errors.Is(err, plugins.ErrCrowded) {
			e.Message = "too many calls wait for the backend, or it is slow; retry, and send fewer at once"
		}
	}
}

func unusable(e *Error) {
	e.Reason = ReasonKeyUnusable
	e.Message = "the backend does not let this version of the key be used: it is disabled, destroyed or gone, and an administrator of the key must enable or restore it; or it has made all the wraps that it may, and must be rotated"
}

func retryAfter(err error) time.Duration {
	var e *plugins.Error
	if errors.As(err, &e) && e.RetryAfter > 0 {
		return e.RetryAfter
	}
	return time.Second
}
