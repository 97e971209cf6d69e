package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
)

const (
	// SecretSize is the size of a sealer's secret, in bytes.
	SecretSize = 32

	keyLabel     = "kms-agent sealed store 1"
	keySize      = 32
	idSize       = 16
	aeadOverhead = 12 + 16 // nonce and tag
	keyOverhead  = idSize + aeadOverhead
)

// Key does the cryptography of a sealer whose secret is in this process: what
// it seals is a 16-byte identity of the secret, then AES-256-GCM with a random
// nonce. Key and identity are HKDF-SHA256 of the secret, without salt (RFC
// 5869). The secret is in protected memory; what is derived from it lives for
// one call.
type Key struct{ secret *Memory }

// NewKey copies the secret of SecretSize bytes; the caller clears its own.
func NewKey(secret []byte) (*Key, error) {
	if len(secret) != SecretSize {
		return nil, fmt.Errorf("%w: a secret of %d bytes, not %d", ErrUnavailable, len(secret), SecretSize)
	}
	m, err := NewMemory(SecretSize)
	if err != nil {
		return nil, err
	}
	copy(m.Bytes(), secret)
	return &Key{secret: m}, nil
}

// Free clears the secret. The key must not be used afterwards. A nil key is
// left alone.
func (k *Key) Free() {
	if k != nil {
		k.secret.Free()
	}
}

// Seal is Sealer's.
func (k *Key) Seal(dst, plaintext, aad []byte) (sealed []byte, err error) {
	erasing(func() {
		var aead cipher.AEAD
		var id [idSize]byte
		if aead, id, err = k.derive(); err == nil {
			sealed = aead.Seal(append(dst, id[:]...), nil, plaintext, aad) //nolint:gosec // this AEAD makes its own random nonce
		}
	})
	return sealed, err
}

// Open is Sealer's.
func (k *Key) Open(dst, sealed, aad []byte) (plaintext []byte, err error) {
	if len(sealed) < keyOverhead {
		return nil, fmt.Errorf("%w: %d bytes are too few", ErrDamaged, len(sealed))
	}
	erasing(func() {
		var aead cipher.AEAD
		var id [idSize]byte
		if aead, id, err = k.derive(); err != nil {
			return
		}
		if subtle.ConstantTimeCompare(id[:], sealed[:idSize]) != 1 {
			err = fmt.Errorf("%w: it was made on another host, or the sealer's secret is a new one since", ErrForeign)
			return
		}
		// The destination may be protected memory: not one byte goes elsewhere.
		if plaintext, err = aead.Open(dst, nil, sealed[idSize:], aad); err != nil {
			err = fmt.Errorf("%w: it fails authentication", ErrDamaged)
		}
	})
	return plaintext, err
}

func (k *Key) derive() (cipher.AEAD, [idSize]byte, error) {
	var id [idSize]byte
	if len(k.secret.Bytes()) != SecretSize {
		return nil, id, fmt.Errorf("%w: it is closed", ErrUnavailable)
	}
	okm, err := hkdf.Key(sha256.New, k.secret.Bytes(), nil, keyLabel, keySize+idSize)
	if err != nil {
		return nil, id, fmt.Errorf("%w: derive: %w", ErrUnavailable, err)
	}
	defer clear(okm)
	copy(id[:], okm[keySize:])
	block, err := aes.NewCipher(okm[:keySize])
	if err != nil {
		return nil, id, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, id, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return aead, id, nil
}
