// Keydir is a backend of kms-agent whose wrapping keys are files: the 32 bytes of
// DIRECTORY/NAME/VERSION, as Kubernetes mounts a Secret.
package main

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/json"
	"errors"
	"io/fs"
	"log"
	"os"
	"strconv"
	"strings"

	"github.com/kms-agent/kms-agent/plugins"
)

func main() {
	if err := plugins.Serve(&backend{}); err != nil {
		log.Fatal(err)
	}
}

// backend implements plugins.Backend.
type backend struct{ root *os.Root }

// Open takes the settings: {"directory": "/etc/keys"}.
func (b *backend) Open(_ context.Context, config json.RawMessage) (plugins.Info, error) {
	var settings map[string]string
	if err := json.Unmarshal(config, &settings); err != nil || settings["directory"] == "" {
		return plugins.Info{}, plugins.Errorf(plugins.Invalid, "settings must name the directory of the keys")
	}
	root, err := os.OpenRoot(settings["directory"]) // no name leads out of it
	if err != nil {
		return plugins.Info{}, plugins.Errorf(plugins.Unavailable, "open the directory of the keys: %w", err)
	}
	b.root = root
	return plugins.Info{Name: "keydir", Version: "1", FIPS140: plugins.FIPS140Module()}, nil
}

func (b *backend) Wrap(_ context.Context, key plugins.KeyRef, material []byte, binding plugins.Binding) ([]byte, error) {
	if len(material) == 0 || len(material) > plugins.MaxMaterialSize {
		return nil, plugins.Errorf(plugins.Invalid, "%d bytes of key material", len(material))
	}
	aead, err := b.aead(key)
	if err != nil {
		return nil, err
	}
	return aead.Seal(nil, nil, material, binding.AAD()), nil //nolint:gosec // the AEAD makes the nonce
}

func (b *backend) Unwrap(_ context.Context, key plugins.KeyRef, ciphertext []byte, binding plugins.Binding) ([]byte, error) {
	aead, err := b.aead(key)
	if err != nil {
		return nil, err
	}
	material, err := aead.Open(nil, nil, ciphertext, binding.AAD())
	if err != nil {
		return nil, plugins.Errorf(plugins.BadCiphertext, "it does not open under version %s of %s", key.Version, key.URI)
	}
	return material, nil
}

// Describe lists the files of a key; the highest number is the current version.
func (b *backend) Describe(_ context.Context, uri string) (d plugins.Description, err error) {
	name, err := nameIn(uri)
	if err != nil {
		return d, err
	}
	entries, err := fs.ReadDir(b.root.FS(), name)
	if err != nil {
		return d, classify(err, "key "+uri)
	}
	current := 0
	for _, e := range entries { // Kubernetes keeps "..data" there too
		if n := number(e.Name()); n > 0 {
			current = max(current, n)
			d.Versions = append(d.Versions, plugins.KeyVersion{Version: e.Name(), State: plugins.Enabled})
		}
	}
	if current == 0 {
		return d, plugins.Errorf(plugins.KeyNotFound, "key %s has no version", uri)
	}
	d.Current = strconv.Itoa(current)
	return d, nil
}

func (b *backend) Check(context.Context) (plugins.Health, error) {
	_, err := b.root.Stat(".")
	if err != nil {
		err = plugins.Errorf(plugins.Unavailable, "directory of the keys: %w", err)
	}
	return plugins.Health{}, err
}

func (b *backend) Close() error {
	if b.root == nil {
		return nil
	}
	return b.root.Close()
}

// aead reads the key each time: whoever takes its file away has revoked it.
func (b *backend) aead(key plugins.KeyRef) (cipher.AEAD, error) {
	name, err := nameIn(key.URI)
	if err != nil {
		return nil, err
	}
	if number(key.Version) == 0 {
		return nil, plugins.Errorf(plugins.KeyNotFound, "%s has no version %q", key.URI, key.Version)
	}
	secret, err := b.root.ReadFile(name + "/" + key.Version)
	if err != nil {
		return nil, classify(err, "version "+key.Version+" of "+key.URI)
	}
	defer clear(secret)
	block, err := aes.NewCipher(secret)
	if err != nil || len(secret) != 32 {
		return nil, plugins.Errorf(plugins.KeyUnusable, "version %s of %s has %d bytes, want 32", key.Version, key.URI, len(secret))
	}
	return cipher.NewGCMWithRandomNonce(block)
}

func number(version string) int { // 0 where it is none
	if n, err := strconv.Atoi(version); err == nil && version == strconv.Itoa(max(n, 1)) {
		return n
	}
	return 0
}

// nameIn is the name in "keydir:NAME".
func nameIn(uri string) (string, error) {
	name, ours := strings.CutPrefix(uri, "keydir:")
	if !ours || !fs.ValidPath(name) || name == "." || strings.Contains(name, "/") {
		return "", plugins.Errorf(plugins.KeyNotFound, "%q is not keydir:NAME", uri)
	}
	return name, nil
}

// classify tells a definite no from an outage: that decides what the agent does.
func classify(err error, what string) error {
	class := plugins.Unavailable
	if errors.Is(err, fs.ErrNotExist) {
		class = plugins.KeyNotFound
	}
	return plugins.Errorf(class, "read %s: %w", what, err)
}
