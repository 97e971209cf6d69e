package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"github.com/kms-agent/kms-agent/plugins"
)

// Backend serves the wrapping keys of one keystore. It sees every change that
// another process makes to the file at its next call, and answers Unavailable,
// never a definite no, while the file cannot be read. It is for concurrent use.
type Backend struct {
	mu       sync.Mutex // guards both
	follower *follower  // nil before Open
	closed   bool
}

var _ plugins.Backend = (*Backend)(nil)

// settings is the configuration that Open takes.
type settings struct {
	Keystore string `json:"keystore"`
	Seal     Seal   `json:"seal"`
}

// Paths returns what a process with these settings reads: the directory of the
// keystore, whose file is replaced by each change, and the files of the seal.
// Settings that are wrong name nothing.
func Paths(config json.RawMessage) []string {
	s, err := parseSettings(config)
	if err != nil {
		return nil
	}
	var paths []string
	for _, path := range []string{s.Seal.KeyFile, s.Seal.PassphraseFile} {
		if path != "" {
			paths = append(paths, path)
		}
	}
	paths = append(paths, filepath.Dir(s.Keystore))
	if target, err := filepath.EvalSymlinks(s.Keystore); err == nil {
		paths = append(paths, filepath.Dir(target))
	}
	return paths
}

// New returns a backend that waits for Open.
func New() *Backend { return &Backend{} }

// Open takes {"keystore": path, "seal": {"key_file": path} or {"credential":
// name} or {"passphrase_file": path}}, paths absolute, and loads the keystore.
// Wrong settings are Invalid, a keystore that cannot be read is Unavailable;
// after a failure Open may be called again, after success it is Invalid.
func (b *Backend) Open(ctx context.Context, config json.RawMessage) (plugins.Info, error) {
	s, err := parseSettings(config)
	if err != nil {
		return plugins.Info{}, plugins.Errorf(plugins.Invalid, "settings of the local backend: %v", err)
	}
	k, err := newKeystore(s.Keystore, s.Seal)
	if err != nil {
		return plugins.Info{}, plugins.Errorf(plugins.Invalid, "settings of the local backend: %v", err)
	}
	f := newFollower(k)
	if err := f.use(ctx, func(*ring) error { return nil }); err != nil {
		f.close()
		return plugins.Info{}, classified(err)
	}
	if err := b.begin(f); err != nil {
		f.close()
		return plugins.Info{}, err
	}
	return plugins.Info{Name: "local", Version: buildVersion(), FIPS140: plugins.FIPS140Module()}, nil
}

func (b *Backend) begin(f *follower) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.closed:
		return classified(ErrClosed)
	case b.follower != nil:
		return plugins.Errorf(plugins.Invalid, "the backend is open already")
	}
	b.follower = f
	return nil
}

func parseSettings(config json.RawMessage) (settings, error) {
	const example = `write {"keystore": "/var/lib/kms-agent/keystore", "seal": {"key_file": "/etc/kms-agent/seal.key"}}`
	var s settings
	d := json.NewDecoder(bytes.NewReader(config))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return s, fmt.Errorf("%w: %s", err, example)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return s, fmt.Errorf("more than one JSON value: %s", example)
	}
	if !filepath.IsAbs(s.Keystore) {
		return s, fmt.Errorf("keystore %q is not an absolute path: %s", s.Keystore, example)
	}
	return s, nil
}

func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

// use calls act with the keystore's newest content and classifies the error.
func (b *Backend) use(ctx context.Context, act func(*ring) error) error {
	b.mu.Lock()
	f, closed := b.follower, b.closed
	b.mu.Unlock()
	switch {
	case closed:
		return classified(ErrClosed)
	case f == nil:
		return plugins.Errorf(plugins.Internal, "the backend is not open: call Open first")
	}
	return classified(f.use(ctx, act))
}

// usable finds an enabled version.
func usable(r *ring, ref plugins.KeyRef) (*version, error) {
	name, err := nameOf(ref.URI)
	if err != nil {
		return nil, err
	}
	if ref.Version == "" {
		return nil, fmt.Errorf("%w: no version of key %q is given: ask Describe for the current one", ErrName, name)
	}
	v, err := r.version(name, ref.Version)
	if err != nil {
		return nil, err
	}
	if v.state != Enabled {
		return nil, fmt.Errorf("%w: key %q version %s is %s: enable it, or use another version", ErrKeyState, name, ref.Version, v.state)
	}
	return v, nil
}

// Wrap wraps 1 to plugins.MaxMaterialSize bytes under any enabled version, the current one
// or not. Every wrap has an AES-256-GCM key of its own, derived from the
// wrapping key and 256 random bits, and binds the binding's AAD.
func (b *Backend) Wrap(ctx context.Context, ref plugins.KeyRef, plaintext []byte, binding plugins.Binding) ([]byte, error) {
	if n := len(plaintext); n < 1 || n > plugins.MaxMaterialSize {
		return nil, plugins.Errorf(plugins.Invalid, "wrap of %d bytes: 1 to %d are possible", n, plugins.MaxMaterialSize)
	}
	aad := binding.AAD()
	var wrapped []byte
	err := b.use(ctx, func(r *ring) error {
		v, err := usable(r, ref)
		if err == nil {
			wrapped, err = v.wrap(plaintext, aad)
		}
		return err
	})
	return wrapped, err
}

// Unwrap opens what Wrap made under the same version with the same binding. A
// ciphertext that does not open, whatever the reason, is BadCiphertext; so is
// one wrapped under another key that had the same name and version.
func (b *Backend) Unwrap(ctx context.Context, ref plugins.KeyRef, ciphertext []byte, binding plugins.Binding) ([]byte, error) {
	aad := binding.AAD()
	var plaintext []byte
	err := b.use(ctx, func(r *ring) error {
		v, err := usable(r, ref)
		if err == nil {
			plaintext, err = v.unwrap(ciphertext, aad)
		}
		return err
	})
	return plaintext, err
}

// Describe lists a key's versions. The current one is the newest, whatever its
// state: a disabled newest version stops wrapping until the key is rotated or
// the version enabled, it does not bring an older one back into use.
func (b *Backend) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	var d plugins.Description
	err := b.use(ctx, func(r *ring) error {
		name, err := nameOf(uri)
		if err != nil {
			return err
		}
		k, err := r.key(name)
		if err != nil {
			return err
		}
		d.Current = strconv.Itoa(len(k.versions))
		for i, v := range k.versions {
			d.Versions = append(d.Versions, plugins.KeyVersion{
				Version: strconv.Itoa(i + 1), State: contractState(v.state), Created: time.Unix(v.created, 0).UTC(),
			})
		}
		return nil
	})
	return d, err
}

func contractState(s State) plugins.KeyState {
	switch s {
	case Enabled:
		return plugins.Enabled
	case Disabled:
		return plugins.Disabled
	default:
		return plugins.Destroyed
	}
}

// Check tells whether the keystore can be read.
func (b *Backend) Check(ctx context.Context) (plugins.Health, error) {
	began := time.Now()
	var h plugins.Health
	err := b.use(ctx, func(r *ring) error {
		h.Detail = fmt.Sprintf("keystore of %d keys, generation %d", len(r.keys), r.generation)
		return nil
	})
	h.UpstreamLatency = time.Since(began)
	return h, err
}

// Close erases the keys from memory. Later calls are Unavailable.
func (b *Backend) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	if b.follower != nil {
		b.follower.close()
		b.follower = nil
	}
	return nil
}

// classified translates the package's faults into the contract's classes. What
// is not known to be a fault of the request or the key is an outage.
func classified(err error) error {
	if err == nil {
		return nil
	}
	class := plugins.Unavailable
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return plugins.Errorf(class, "waiting for the keystore: %w", err)
	case errors.Is(err, errOpen):
		class = plugins.BadCiphertext
	case errors.Is(err, ErrUnknownKey), errors.Is(err, ErrUnknownVersion):
		class = plugins.KeyNotFound
	case errors.Is(err, ErrKeyState):
		class = plugins.KeyUnusable
	case errors.Is(err, ErrName):
		class = plugins.Invalid
	}
	e := &plugins.Error{Class: class, Detail: err.Error()} // all of it crosses the process boundary
	if class == plugins.Unavailable {
		e.RetryAfter = retryLoad
	}
	return e
}
