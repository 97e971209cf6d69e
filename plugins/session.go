package plugins

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	pluginv1 "github.com/kms-agent/kms-agent/api/plugin/v1"
)

// The names that separate the two keys of a session, and sealed material from
// everything else. docs/plugins.md specifies them for other languages.
const (
	sessionToPlugin = "kms-agent/plugin/1 host to plugin"
	sessionToHost   = "kms-agent/plugin/1 plugin to host"

	sessionKeySize = 32
	gcmNonceSize   = 12
	gcmTagSize     = 16
	// maxSeals is how often a key may be used with random nonces (NIST SP
	// 800-38D section 8.3).
	maxSeals = 1 << 32
)

var (
	errSeal   = errors.New("the session's key is used up; the process must be replaced")
	errUnseal = errors.New("sealed key material does not open under the session's key")
)

// session seals key material between the host and one plugin process, beneath
// the transport's own encryption, so that buffers of the RPC stack never hold
// it in clear.
type session struct {
	toPlugin, toHost cipher.AEAD
	seals            atomic.Uint64
}

// newSession derives the session's keys: HKDF-SHA256 over the ECDH P-256 secret,
// salted with both public keys. host tells which of the two is ours.
func newSession(own *ecdh.PrivateKey, peer []byte, host bool) (*session, error) {
	peerKey, err := ecdh.P256().NewPublicKey(peer)
	if err != nil {
		return nil, fmt.Errorf("public key of the session: %w", err)
	}
	secret, err := own.ECDH(peerKey)
	if err != nil {
		return nil, fmt.Errorf("key agreement of the session: %w", err)
	}
	defer clear(secret)
	transcript := slices.Concat(own.PublicKey().Bytes(), peer)
	if !host {
		transcript = slices.Concat(peer, own.PublicKey().Bytes())
	}
	s := &session{}
	if s.toPlugin, err = sessionKey(secret, transcript, sessionToPlugin); err != nil {
		return nil, err
	}
	if s.toHost, err = sessionKey(secret, transcript, sessionToHost); err != nil {
		return nil, err
	}
	return s, nil
}

func sessionKey(secret, salt []byte, info string) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, secret, salt, info, sessionKeySize)
	if err != nil {
		return nil, fmt.Errorf("derive the session's key: %w", err)
	}
	defer clear(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

func newSessionKey() (*ecdh.PrivateKey, error) { return ecdh.P256().GenerateKey(rand.Reader) }

// seal encrypts material under one direction's key. It does not keep material.
func (s *session) seal(aead cipher.AEAD, material, aad []byte) (*pluginv1.Sealed, error) {
	if s.seals.Add(1) > maxSeals {
		return nil, errSeal
	}
	out := aead.Seal(make([]byte, 0, gcmNonceSize+len(material)+gcmTagSize), nil, material, aad) //nolint:gosec // the AEAD makes the nonce
	return &pluginv1.Sealed{Nonce: out[:gcmNonceSize:gcmNonceSize], Ciphertext: out[gcmNonceSize:]}, nil
}

// open returns 1 to MaxMaterialSize bytes, which the caller clears.
func (s *session) open(aead cipher.AEAD, sealed *pluginv1.Sealed, aad []byte) ([]byte, error) {
	n := len(sealed.GetCiphertext())
	if len(sealed.GetNonce()) != gcmNonceSize || n <= gcmTagSize || n > MaxMaterialSize+gcmTagSize {
		return nil, errUnseal
	}
	material, err := aead.Open(nil, nil, slices.Concat(sealed.GetNonce(), sealed.GetCiphertext()), aad)
	if err != nil {
		return nil, errUnseal
	}
	return material, nil
}

// wrapAAD and unwrapAAD are what sealed material is bound to: one request.
func wrapAAD(key KeyRef, b Binding) []byte { return sessionAAD("Wrap", key, nil, b) }

func unwrapAAD(key KeyRef, ciphertext []byte, b Binding) []byte {
	return sessionAAD("Unwrap", key, ciphertext, b)
}

// sessionAAD is length-prefixed as Binding.AAD is. The direction is bound by
// its key.
func sessionAAD(method string, key KeyRef, ciphertext []byte, b Binding) []byte {
	direction := sessionToPlugin
	if method == "Unwrap" {
		direction = sessionToHost
	}
	bound := b.AAD()
	out := make([]byte, 0, 6*fieldOverhead+len(direction)+len(method)+len(key.URI)+len(key.Version)+len(ciphertext)+len(bound))
	out = appendField(appendField(out, direction), method)
	out = appendField(appendField(out, key.URI), key.Version)
	return appendField(appendField(out, ciphertext), bound)
}
