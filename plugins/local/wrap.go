package local

import (
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"

	"github.com/kms-agent/kms-agent/plugins"
)

// A wrapped key (docs/local-backend.md, "Wrapped format"):
//
//	format 1, key ID 16, salt 32, commitment 32, nonce 12, ciphertext, tag 16
//
// Each wrap derives its own AES-256-GCM key from the wrapping key, so that the
// bound of SP 800-38D section 8.3 on random nonces (2^32 for one key) never
// adds up over a key's life or over hosts that share a keystore.
const (
	wrapFormat     = 1
	wrapLabel      = "kms-agent local wrap 1"
	wrapSaltSize   = 32
	wrapHeaderSize = 1 + idSize + wrapSaltSize + checkSize

	// WrapOverhead is by how many bytes wrapped is longer than plain.
	WrapOverhead = wrapHeaderSize + aeadOverhead
)

// errOpen is every way in which a wrapped key does not open.
var errOpen = errors.New("wrapped key does not open")

// wrap seals plaintext under an enabled version, binding aad.
func (v *version) wrap(plaintext, aad []byte) ([]byte, error) {
	head := make([]byte, wrapHeaderSize, wrapHeaderSize+len(plaintext)+aeadOverhead)
	head[0] = wrapFormat
	copy(head[1:], v.id[:])
	salt := head[1+idSize:][:wrapSaltSize]
	_, _ = rand.Read(salt)
	aead, commitment, err := v.derive(salt)
	if err != nil {
		return nil, err
	}
	copy(head[1+idSize+wrapSaltSize:], commitment)
	erasing(func() { head = aead.Seal(head, nil, plaintext, aad) }) //nolint:gosec // this AEAD makes its own random nonce
	return head, nil
}

// unwrap opens what wrap made under the same version with the same aad. The
// result is the caller's to clear. Errors wrap errOpen where wrapped is at
// fault, and say why only for the log.
func (v *version) unwrap(wrapped, aad []byte) ([]byte, error) {
	if n := len(wrapped); n <= WrapOverhead || n > WrapOverhead+plugins.MaxMaterialSize {
		return nil, fmt.Errorf("%w: %d bytes", errOpen, n)
	}
	if wrapped[0] != wrapFormat {
		return nil, fmt.Errorf("%w: format %d, this program reads %d", errOpen, wrapped[0], wrapFormat)
	}
	id, rest := wrapped[1:][:idSize], wrapped[1+idSize:]
	if string(id) != string(v.id[:]) {
		return nil, fmt.Errorf("%w: it was wrapped under key ID %x, this version has %x", errOpen, id, v.id)
	}
	salt, commitment, body := rest[:wrapSaltSize], rest[wrapSaltSize:][:checkSize], rest[wrapSaltSize+checkSize:]
	aead, want, err := v.derive(salt)
	if err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare(commitment, want) != 1 {
		return nil, fmt.Errorf("%w: key commitment differs", errOpen)
	}
	plaintext := make([]byte, 0, len(body)-aeadOverhead)
	erasing(func() { plaintext, err = aead.Open(plaintext, nil, body, aad) })
	if err != nil {
		return nil, fmt.Errorf("%w: authentication failed: damaged, or bound to something else", errOpen)
	}
	return plaintext, nil
}

// derive makes the key of one wrap, and a value that commits to it, by
// HKDF-Expand with the wrapping key as pseudorandom key (RFC 5869 section 3.3;
// an SP 800-108 feedback-mode KDF). The key ID and the salt are authenticated
// by being part of it.
func (v *version) derive(salt []byte) (cipher.AEAD, []byte, error) {
	info := wrapLabel + string(v.id[:]) + string(salt)
	aead, commitment, err := deriveAEAD(func() ([]byte, error) {
		return hkdf.Expand(sha256.New, v.material, info, keySize+checkSize)
	})
	if err != nil {
		return nil, nil, fmt.Errorf("derive the wrap's key: %w", err)
	}
	return aead, commitment, nil
}
