package kms

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
	"github.com/kms-agent/kms-agent/plugins"
)

const (
	// describeTimeout bounds one question for the versions of a wrapping key.
	describeTimeout = 5 * time.Second
	// describePause is how long a failed question is not asked again, and how
	// often a version that nobody knows may cause one.
	describePause = time.Second
	// describePatience is how long a request waits for the versions of a wrapping
	// key where it can go on with those that are known.
	describePatience = time.Second
)

type wrappingID struct{ backend, uri string }

// wrapping is a wrapping key in its backend and what is known of it. It lives
// as long as the configuration names it.
type wrapping struct {
	id      wrappingID
	key     string // logical key
	backend plugins.Backend

	described atomic.Pointer[described]
	refused   atomic.Pointer[string] // why the last question was answered by a definite no; nil where it was not
	asked     atomic.Int64           // time of the last question, as time.Duration
	failures  atomic.Int64           // questions in a row that had no answer
	// jitter is drawn with each failure: drawn with each request, the least would count.
	jitter atomic.Uint32
	// failing is 1 while the last call was not answered, or slowly.
	failing atomic.Int32
	// missing: it was reported that the backend does not have it, which others have.
	missing atomic.Bool
	// group is the one that it is a part of, in the configuration in use.
	group  atomic.Pointer[group]
	flight singleflight.Group

	mu       sync.Mutex             // guards canaries and noes
	canaries map[string]sealed      // by version
	noes     map[question]time.Time // what was refused last, and when that was heard
}

// described is what upstream said of a wrapping key, and when it was asked.
type described struct {
	plugins.Description
	at time.Duration
}

// sealed is an encrypted data key with all that is needed to open it.
type sealed struct {
	edk     envelope.EDK
	version string
	binding plugins.Binding
	part    int // index of the wrapping key in its group
	// proven: it was opened, so that it is no forgery.
	proven bool
}

// clone returns a copy that keeps no message in memory which k was read from.
func (k sealed) clone() sealed {
	k.edk.ProviderInfo, k.edk.Ciphertext = bytes.Clone(k.edk.ProviderInfo), bytes.Clone(k.edk.Ciphertext)
	k.binding.ProviderInfo = k.edk.ProviderInfo
	return k
}

var errReconfigured = errors.New("the configuration has been replaced")

// reconfigured is for what began under a configuration that has been replaced.
// Upstream has said nothing.
func reconfigured(k *key) *Error {
	e := &Error{
		Reason: ReasonBackendDown, RetryAfter: time.Second,
		Message: "the agent's configuration of this key changed meanwhile; retry", Cause: errReconfigured,
	}
	if k != nil {
		e.Key = k.Name
	}
	return e
}

// inUse tells whether a key's wrapping keys are still configured as they were.
func (s *Service) inUse(g *group) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.groups[g.id] == g
}

func newWrapping(id wrappingID, key string, backend plugins.Backend) *wrapping {
	return &wrapping{id: id, key: key, backend: backend, canaries: map[string]sealed{}, noes: map[question]time.Time{}}
}

func (w *wrapping) ref(version string) plugins.KeyRef {
	return plugins.KeyRef{URI: w.id.uri, Version: version}
}

// describe returns what is known of the versions, asking upstream when it is
// older than maxAge. While upstream does not answer, the last answer stands:
// whether a key may still be used is the cache's decision, not this one's.
func (s *Service) describe(ctx context.Context, w *wrapping, maxAge time.Duration) (*described, error) {
	known := w.described.Load()
	now := s.now()
	if known != nil && now-known.at <= maxAge {
		return known, nil
	}
	if known == nil {
		return s.askDescription(ctx, w)
	}
	if now-time.Duration(w.asked.Load()) < w.describePause(maxAge) {
		return known, nil
	}
	bounded, cancel := context.WithTimeout(ctx, w.patience(maxAge))
	defer cancel()
	fresh, err := s.askDescription(bounded, w)
	switch {
	case err == nil:
		return fresh, nil
	case plugins.ClassOf(err).Definite():
		return nil, err
	case ctx.Err() == nil && bounded.Err() != nil:
		w.failures.CompareAndSwap(0, 1) // too slow to be waited for again
	}
	return known, nil
}

// patience is how long a request waits for the answer. In an outage who asks does so
// for those who come later; who can do nothing with the last answer waits.
func (w *wrapping) patience(maxAge time.Duration) time.Duration {
	switch {
	case maxAge <= 0:
		return describeTimeout
	case w.failures.Load() > 0:
		return 0
	}
	return describePatience
}

// describePause is how long an answer that is too old is not asked for again: twice
// as long with each question that has failed, up to half of the age, so that the
// agents of a fleet do not all ask when upstream is back.
func (w *wrapping) describePause(maxAge time.Duration) time.Duration {
	failed := min(w.failures.Load(), 16)
	if failed == 0 {
		return describePause
	}
	spread := 1 + float64(w.jitter.Load())/math.MaxUint32/2
	return max(describePause, time.Duration(spread*float64(min(describePause<<failed, maxAge/2))))
}

// askAgain makes the next use of the wrapping key ask for its versions, however new
// the last answer is. Where upstream does not answer, the last answer stands.
func (w *wrapping) askAgain() {
	for {
		old := w.described.Load()
		if old == nil {
			return
		}
		if w.described.CompareAndSwap(old, &described{Description: old.Description, at: longAgo}) {
			w.asked.Store(int64(longAgo))
			return
		}
	}
}

// longAgo is before anything that a caller may find too old.
const longAgo = time.Duration(-1 << 61)

// askDescription asks upstream, once for all who wait.
func (s *Service) askDescription(ctx context.Context, w *wrapping) (*described, error) {
	result := w.flight.DoChan("", func() (any, error) {
		detached, done, err := s.strays.begin(forAll(ctx))
		if err != nil {
			return nil, err
		}
		defer done()
		return s.askForItself(detached, w)
	})
	select {
	case r := <-result:
		fresh, _ := r.Val.(*described)
		return fresh, r.Err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// forAll marks a call whose answer is for every caller of a key: it is nobody's,
// so that it does not wait behind the others of whoever happened to be first.
func forAll(ctx context.Context) context.Context { return plugins.WithCaller(ctx, "") }

// askForItself asks upstream with a question of its own. An answer to an older
// question does not replace one to a newer.
func (s *Service) askForItself(ctx context.Context, w *wrapping) (*described, error) {
	ctx, cancel := context.WithTimeout(ctx, describeTimeout)
	defer cancel()
	began := s.now()
	w.asked.Store(int64(began))
	d, err := w.backend.Describe(ctx, w.id.uri)
	if err != nil {
		if verdictOf(err) == cache.Unreachable {
			w.failures.Add(1)
			w.jitter.Store(mathrand.Uint32()) //nolint:gosec // no secret
		}
		s.descriptionFailed(w, err, began)
		return nil, fmt.Errorf("describe %s: %w", w.id.uri, err)
	}
	w.refused.Store(nil)
	w.missing.Store(false)
	w.failures.Store(0)
	fresh := &described{Description: d, at: began}
	for {
		old := w.described.Load()
		switch {
		case old != nil && old.at > began:
			return fresh, nil
		case !w.described.CompareAndSwap(old, fresh):
			continue
		case old != nil && old.Current != d.Current:
			s.rotated(w)
		}
		return fresh, nil
	}
}

// rotated retires what is wrapped under versions that are not current any more.
func (s *Service) rotated(w *wrapping) {
	g := w.group.Load()
	if g == nil {
		return
	}
	v := make(versions, len(g.parts))
	for part, other := range g.parts {
		if d := other.described.Load(); d != nil {
			v[part] = d.Current
		}
	}
	s.cache.EvictVersions(g.id.backend, g.id.uri, v.name())
}

// descriptionFailed lets the cache suspend, and ask for itself, when upstream
// says that the wrapping key is gone.
func (s *Service) descriptionFailed(w *wrapping, err error, began time.Duration) {
	if !plugins.ClassOf(err).Definite() {
		return
	}
	why := err.Error()
	w.refused.Store(&why)
	known, g := w.described.Load(), w.group.Load()
	if known == nil || g == nil || !g.refuses(err) {
		return
	}
	w.refusedAll(known, err)
	s.cache.Refuse(g.id.backend, g.id.uri, func(a cache.Authority) bool {
		v, err := g.parseVersions(a.Version)
		return err == nil && v[g.partOf(w.id.uri)] != ""
	}, began)
}

// refuses tells whether what one part says is a no for the whole group: that only one
// of several does not have the key is none.
func (g *group) refuses(err error) bool {
	class := plugins.ClassOf(err)
	return class.Definite() && (len(g.parts) == 1 || class != plugins.KeyNotFound)
}

// knows tells whether upstream has said that the version exists. A version
// that nobody knows may be a new one: the list is asked for again, at most
// once in describePause, but the version itself is never tried upstream on a
// caller's word. While the list cannot be asked for, nobody says that there is
// no such version.
func (s *Service) knows(ctx context.Context, w *wrapping, version string) error {
	began := s.now()
	known, err := s.describe(ctx, w, time.Duration(1<<62))
	if err != nil {
		return err
	}
	if findVersion(known.Description, version) != nil {
		return nil
	}
	if known, err = s.describe(ctx, w, 0); err != nil {
		return err
	}
	switch {
	case findVersion(known.Description, version) != nil:
		return nil
	case known.at < began:
		return &plugins.Error{
			Class: plugins.Unavailable, RetryAfter: describePause,
			Detail: fmt.Sprintf("version %q of %s is not among those last heard of, and the backend has not been asked since", version, w.id.uri),
		}
	}
	return plugins.Errorf(plugins.KeyNotFound, "%s has no version %q", w.id.uri, version)
}

// hasToldOf is knows without a question.
func (w *wrapping) hasToldOf(version string) bool {
	d := w.described.Load()
	return d != nil && findVersion(d.Description, version) != nil
}

func findVersion(d plugins.Description, version string) *plugins.KeyVersion {
	for i := range d.Versions {
		if d.Versions[i].Version == version {
			return &d.Versions[i]
		}
	}
	return nil
}

// binding is what the wrapping key authenticates with the key material.
func (w *wrapping) binding(info envelope.ProviderInfo, encryptionContext map[string]string) (plugins.Binding, error) {
	encoded, err := info.Marshal()
	if err != nil {
		return plugins.Binding{}, fmt.Errorf("provider information of key %q: %w", info.Key, err)
	}
	b := plugins.Binding{Purpose: info.Purpose.String(), ProviderInfo: encoded, ContextBound: info.ContextBound}
	if info.ContextBound {
		b.Context = encryptionContext
	}
	return b, nil
}

// wrap wraps key material and makes sure that upstream can open what it gave:
// a wrap that does not unwrap must never lose data.
func (s *Service) wrap(ctx context.Context, w *wrapping, material []byte, info envelope.ProviderInfo, encryptionContext map[string]string) (sealed, error) {
	b, err := w.binding(info, encryptionContext)
	if err != nil {
		return sealed{}, err
	}
	began := time.Now()
	ciphertext, err := plugins.WrapProven(ctx, w.backend, w.ref(info.Version), material, b)
	w.said(question{info.Version, cache.Encrypt}, b, err, began)
	w.took(began, stragglers, err)
	if errors.Is(err, plugins.ErrUnproven) {
		s.alarm("a wrap does not unwrap; it is not used", err, w.id.backend, w.id.uri)
	}
	if err != nil {
		return sealed{}, fmt.Errorf("wrap under %s version %s: %w", w.id.uri, info.Version, err)
	}
	return sealed{
		edk:     envelope.EDK{ProviderID: envelope.ProviderID, ProviderInfo: b.ProviderInfo, Ciphertext: ciphertext},
		version: info.Version, binding: b, proven: true,
	}, nil
}

// unwrap opens one encrypted data key. The result is the caller's to clear.
func (w *wrapping) unwrap(ctx context.Context, k sealed) ([]byte, error) {
	began := time.Now()
	material, err := w.backend.Unwrap(ctx, w.ref(k.version), k.edk.Ciphertext, k.binding)
	w.said(question{k.version, cache.Decrypt}, k.binding, err, began)
	w.took(began, hedgeAfter, err)
	if err == nil {
		w.keep(k)
	}
	if err != nil {
		return nil, fmt.Errorf("unwrap with %s version %s: %w", w.id.uri, k.version, err)
	}
	return material, nil
}

// keep makes what was opened the canary of its version, where there is none yet: an agent
// that only decrypts makes none of its own.
func (w *wrapping) keep(k sealed) {
	if k.binding.ContextBound {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.canaries[k.version]; !ok {
		k = k.clone()
		k.proven = true
		w.canaries[k.version] = k
	}
}

// provable sees to it that each of several parts can be asked about what it has wrapped,
// whatever callers bring: exported data keys prove nothing of the key, as only a caller
// knows their context. Nobody waits for it.
func (s *Service) provable(ctx context.Context, g *group, wrapped sealedKey) {
	if len(g.parts) == 1 {
		return // each unwrap is its own proof
	}
	for _, one := range wrapped {
		w := g.parts[one.part]
		w.mu.Lock()
		_, ok := w.canaries[one.version]
		w.mu.Unlock()
		if ok {
			continue
		}
		detached, done, err := s.strays.begin(forAll(ctx))
		if err != nil {
			return
		}
		go func() {
			defer done()
			_, _, _ = w.flight.Do("canary "+one.version, func() (any, error) { // the next wrap tries again
				return nil, s.confirmWrap(detached, w, one.version)
			})
		}()
	}
}

// took notes whether a call was answered, and in good time: also one that was given up
// because another backend was faster.
func (w *wrapping) took(began time.Time, good time.Duration, err error) {
	switch {
	case verdictOf(err) == cache.Unreachable, time.Since(began) > good:
		w.failing.Store(1)
	case err == nil:
		w.failing.Store(0)
	}
}

// confirm asks upstream whether it still says yes: with a canary of the
// agent's own where it has one. It is the cache's Confirm.
func (s *Service) confirm(ctx context.Context, a cache.Authority, sample any) error {
	s.mu.Lock()
	g := s.groups[wrappingID{backend: a.Backend, uri: a.WrappingKey}]
	s.mu.Unlock()
	if g == nil {
		return reconfigured(nil)
	}
	return s.confirmGroup(forAll(ctx), g, a, sample)
}

func (s *Service) confirmWrap(ctx context.Context, w *wrapping, version string) error {
	// Not the question that others wait for: a no to that one may be what has to
	// be made sure of.
	d, err := s.askForItself(ctx, w)
	if err != nil {
		return err
	}
	v := findVersion(d.Description, version)
	if v == nil {
		return plugins.Errorf(plugins.KeyNotFound, "%s has no version %q", w.id.uri, version)
	}
	if v.State != plugins.Enabled {
		err := plugins.Errorf(plugins.KeyUnusable, "version %s of %s is %s", version, w.id.uri, v.State)
		w.said(question{version, cache.Encrypt}, plugins.Binding{}, err, time.Now())
		return err
	}
	var material [envelope.DataKeySize]byte
	_, _ = rand.Read(material[:]) // never fails: crypto/rand
	info := envelope.ProviderInfo{Purpose: envelope.PurposeProbe, Key: w.key, URI: w.id.uri, Version: version}
	canary, err := s.wrap(ctx, w, material[:], info, nil)
	if err != nil {
		return err
	}
	w.mu.Lock()
	w.canaries[version] = canary
	w.mu.Unlock()
	return nil
}

func (s *Service) confirmUnwrap(ctx context.Context, w *wrapping, version string, sample *sealed) error {
	w.mu.Lock()
	probe, ok := w.canaries[version]
	w.mu.Unlock()
	switch {
	case ok:
	case sample == nil:
		return nothingAtHand(w, version, nil)
	default:
		probe = *sample
	}
	material, err := w.unwrap(ctx, probe)
	clear(material)
	class := plugins.ClassOf(err)
	switch {
	case err == nil:
		return nil
	case !probe.proven && (class == plugins.BadCiphertext || class.Definite() && probe.binding.ContextBound):
		return nothingAtHand(w, version, err) // a caller may have made it up, or its context
	case class == plugins.BadCiphertext:
		s.alarm("what opened before no longer opens: the wrapping key may have been replaced", err, w.id.backend, w.id.uri)
		return plugins.Errorf(plugins.Internal, "version %s of %s no longer opens what it opened before", version, w.id.uri)
	}
	return err
}

// nothingAtHand says that a version cannot be asked about. Upstream has said nothing,
// which is no outage.
func nothingAtHand(w *wrapping, version string, err error) error {
	message := "the agent has nothing at hand to ask the backend with whether it still allows this key; retry"
	if plugins.ClassOf(err).Definite() {
		message = "a backend refuses what it was asked to open, and the agent has nothing else at hand to learn whether it refuses the key; " +
			"retry, and if it stays so have the key looked at upstream"
	}
	return &Error{
		Reason: ReasonKeySuspended, Key: w.key, RetryAfter: time.Second, Message: message,
		Cause: fmt.Errorf("nothing at hand to prove version %s of %s with: %w", version, w.id.uri, cmp.Or(err, errNoSample)),
	}
}

var errNoSample = errors.New("nothing of it was opened yet")
