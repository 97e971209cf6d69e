package kms

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
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
	*verdicts

	id      wrappingID
	key     string // logical key
	backend plugins.Backend
	aware   plugins.ContextAware // nil where the backend is none

	described atomic.Pointer[described]
	asked     atomic.Int64 // time of the last question, as time.Duration
	failures  atomic.Int64 // questions in a row that had no answer
	// jitter is drawn with each failure: drawn with each request, the least would count.
	jitter atomic.Uint32
	// failing is 0 while calls are answered in good time, else slowly or unanswered.
	failing atomic.Int32
	// missing: it was reported that the backend does not have it, which others have.
	missing atomic.Bool
	// group is the one that it is a part of, in the configuration in use.
	group  atomic.Pointer[group]
	flight singleflight.Group

	mu       sync.Mutex         // guards canaries and makings
	canaries map[string]sealed  // by version
	makings  map[string]*making // of canaries, by version
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

// holds tells whether what was opened may be what was wrapped: where messages prove it,
// and of callers' own key material, the EDK says nothing.
func (k sealed) holds(material []byte) bool {
	info, err := envelope.ParseProviderInfo(k.edk.ProviderInfo)
	return err == nil && info.Check.Holds(material)
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
	aware, _ := backend.(plugins.ContextAware)
	return &wrapping{aware: aware, id: id, key: key, backend: backend, verdicts: newVerdicts(), canaries: map[string]sealed{}, makings: map[string]*making{}}
}

// seesContext tells whether the backend's policy sees the encryption context, or did when
// that was known last: a plugin that does not run says nothing.
func (w *wrapping) seesContext() bool {
	if w.aware == nil {
		return false
	}
	sees, known := w.aware.SeesContext()
	if known && sees != w.seen.Load() {
		w.seen.Store(sees)
	}
	return w.seen.Load()
}

// dependsOnContext tells whether a context may decide what the backend says.
func (w *wrapping) dependsOnContext(b plugins.Binding) bool { return b.ContextBound && w.seesContext() }

// contextName stands for an encryption context.
func contextName(encryptionContext map[string]string) string {
	sum := contextHash(encryptionContext)
	return hex.EncodeToString(sum[:])
}

func (w *wrapping) ref(version string) plugins.KeyRef {
	return plugins.KeyRef{URI: w.id.uri, Version: version}
}

// forAll marks a call whose answer is for every caller of a key: it is nobody's,
// so that it does not wait behind the others of whoever happened to be first.
func forAll(ctx context.Context) context.Context { return plugins.WithCaller(ctx, "") }

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
// a wrap that does not unwrap must never lose data. What a no means is the caller's to say.
func (s *Service) wrap(ctx context.Context, w *wrapping, material []byte, info envelope.ProviderInfo, encryptionContext map[string]string) (sealed, error) {
	b, err := w.binding(info, encryptionContext)
	if err != nil {
		return sealed{}, err
	}
	began := time.Now()
	ciphertext, err := plugins.WrapProven(ctx, w.backend, w.ref(info.Version), material, b)
	if err == nil { // it has opened it as well
		s.said(w, info.Version, cache.Encrypt, b, word{began: began})
		s.said(w, info.Version, cache.Decrypt, b, word{began: began})
	}
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
func (s *Service) unwrap(ctx context.Context, w *wrapping, k sealed) ([]byte, error) {
	began := time.Now()
	material, err := w.backend.Unwrap(ctx, w.ref(k.version), k.edk.Ciphertext, k.binding)
	if err == nil && !k.holds(material) {
		clear(material)
		// Who can wrap by himself, as with a public key, can make such EDKs too: it is no outage.
		err = plugins.Errorf(plugins.BadCiphertext, "it opened to another data key than was wrapped: its key check does not hold")
	}
	s.said(w, k.version, cache.Decrypt, k.binding, word{err: err, began: began, of: &k})
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
// that only decrypts makes none of its own. What a context may decide is none.
func (w *wrapping) keep(k sealed) {
	if w.dependsOnContext(k.binding) {
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

// How the last call of a part went that did not go well.
const slowly, unanswered = 1, 2

// took notes whether a call was answered, and in good time: also one that was given up
// because another backend was faster.
func (w *wrapping) took(began time.Time, good time.Duration, err error) {
	switch {
	case verdictOf(err) == cache.Unreachable:
		w.failing.Store(unanswered)
	case time.Since(began) > good:
		w.failing.Store(slowly)
	case err == nil:
		w.failing.Store(0)
	}
}
