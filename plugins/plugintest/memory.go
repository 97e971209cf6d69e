package plugintest

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"os"
	"slices"
	"strconv"

	"github.com/kms-agent/kms-agent/plugins"
)

// Memory is a backend for tests. Its wrapping keys follow from their names, so
// that every process has the same ones: it protects nothing.
type Memory struct{ settings MemorySettings }

// MemorySettings are the settings of a Memory.
type MemorySettings struct {
	// Keys holds how many versions each URI has: "1", "2" and so on.
	Keys map[string]int `json:"keys"`
	// DisabledBy is a file: while it exists, every version is disabled.
	DisabledBy string `json:"disabled_by"`
	// IllBy is a file: while it exists, Ill, the URI of a key, is an outage of this key.
	IllBy string `json:"ill_by"`
	Ill   string `json:"ill"`
	// NoRandom leaves out plugins.CapabilityRandom.
	NoRandom bool `json:"no_random"`
	// DeniedTenant is the value of tenant that is denied where a context is bound.
	DeniedTenant string `json:"denied_tenant"`
}

// Open implements plugins.Backend.
func (m *Memory) Open(_ context.Context, config json.RawMessage) (plugins.Info, error) {
	if err := json.Unmarshal(config, &m.settings); err != nil {
		return plugins.Info{}, plugins.Errorf(plugins.Invalid, "settings: %w", err)
	}
	info := plugins.Info{Name: "memory", Version: "1", Capabilities: []string{plugins.CapabilityRandom}}
	if m.settings.NoRandom {
		info.Capabilities = nil
	}
	if m.settings.DeniedTenant != "" {
		info.Capabilities = append(info.Capabilities, plugins.CapabilityContext)
	}
	return info, nil
}

// Wrap implements plugins.Backend.
func (m *Memory) Wrap(ctx context.Context, key plugins.KeyRef, plaintext []byte, b plugins.Binding) ([]byte, error) {
	if len(plaintext) == 0 || len(plaintext) > plugins.MaxMaterialSize {
		return nil, plugins.Errorf(plugins.Invalid, "%d bytes of key material", len(plaintext))
	}
	aead, err := m.aead(ctx, key, b)
	if err != nil {
		return nil, err
	}
	return aead.Seal(nil, nil, plaintext, b.AAD()), nil //nolint:gosec // the AEAD makes the nonce
}

// Unwrap implements plugins.Backend.
func (m *Memory) Unwrap(ctx context.Context, key plugins.KeyRef, ciphertext []byte, b plugins.Binding) ([]byte, error) {
	aead, err := m.aead(ctx, key, b)
	if err != nil {
		return nil, err
	}
	plaintext, err := aead.Open(nil, nil, ciphertext, b.AAD())
	if err != nil {
		return nil, plugins.Errorf(plugins.BadCiphertext, "does not open")
	}
	return plaintext, nil
}

// Describe implements plugins.Backend.
func (m *Memory) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	if err := ctx.Err(); err != nil {
		return plugins.Description{}, err
	}
	n := m.settings.Keys[uri]
	if n == 0 {
		return plugins.Description{}, plugins.Errorf(plugins.KeyNotFound, "no key %q", uri)
	}
	state := plugins.Enabled
	if m.disabled() {
		state = plugins.Disabled
	}
	d := plugins.Description{Current: strconv.Itoa(n)}
	for i := range n {
		d.Versions = append(d.Versions, plugins.KeyVersion{Version: strconv.Itoa(i + 1), State: state})
	}
	return d, nil
}

// Check implements plugins.Backend.
func (m *Memory) Check(ctx context.Context) (plugins.Health, error) {
	return plugins.Health{Detail: "in memory"}, ctx.Err()
}

// Random implements plugins.RandomSource. It has no other random than the system's.
func (m *Memory) Random(ctx context.Context, dst []byte) error {
	if len(dst) == 0 || len(dst) > plugins.MaxRandomSize {
		return plugins.Errorf(plugins.Invalid, "%d random bytes", len(dst))
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	_, _ = rand.Read(dst) // never fails: crypto/rand
	return nil
}

// Close implements plugins.Backend.
func (m *Memory) Close() error { return nil }

func (m *Memory) disabled() bool { return isThere(m.settings.DisabledBy) }

func isThere(path string) bool {
	_, err := os.Stat(path)
	return path != "" && err == nil
}

func (m *Memory) aead(ctx context.Context, key plugins.KeyRef, b plugins.Binding) (cipher.AEAD, error) {
	d, err := m.Describe(ctx, key.URI)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(d.Versions, func(v plugins.KeyVersion) bool { return v.Version == key.Version })
	if i < 0 {
		return nil, plugins.Errorf(plugins.KeyNotFound, "%q has no version %q", key.URI, key.Version)
	}
	if d.Versions[i].State != plugins.Enabled {
		return nil, plugins.Errorf(plugins.KeyUnusable, "version %s of %s is %s", key.Version, key.URI, d.Versions[i].State)
	}
	if b.ContextBound && m.settings.DeniedTenant != "" && b.Context["tenant"] == m.settings.DeniedTenant {
		return nil, plugins.Errorf(plugins.Denied, "tenant %s may not", m.settings.DeniedTenant)
	}
	if key.URI == m.settings.Ill && isThere(m.settings.IllBy) {
		return nil, &plugins.Error{Class: plugins.Unavailable, KeyOnly: true, Detail: "key " + key.URI + " is ill"}
	}
	material := sha256.Sum256([]byte(key.URI + "\x00" + key.Version))
	block, err := aes.NewCipher(material[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}
