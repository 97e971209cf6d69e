package local

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"sync"
)

const sealLabel = "kms-agent local keystore 1"

// unlocker opens and seals files under one seal. It keeps the seal's secret, so
// that a passphrase is stretched once and not at every change of the file.
type unlocker struct {
	seal Seal

	mu          sync.Mutex     // guards all below
	secret      *region        // nil: not read yet
	rounds      uint32         // what secret was stretched with
	stretchSalt [saltSize]byte // what secret was stretched with
}

func (u *unlocker) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.secret.free()
	u.secret = nil
}

// fileKeys is what a seal's secret yields for one file.
type fileKeys struct {
	aead  cipher.AEAD
	check [checkSize]byte // tells a wrong secret from a damaged file
	fresh bool            // the secret was read for this very call
}

func (k *fileKeys) fit(h *header) bool {
	return subtle.ConstantTimeCompare(k.check[:], h.check[:]) == 1
}

func (u *unlocker) keys(h *header, reread bool) (*fileKeys, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	k := &fileKeys{}
	if u.secret == nil || reread || u.rounds != h.rounds || u.stretchSalt != h.stretchSalt {
		secret, err := u.seal.secret(h.rounds, h.stretchSalt[:])
		if err != nil {
			return nil, err
		}
		u.secret.free()
		u.secret, u.rounds, u.stretchSalt, k.fresh = secret, h.rounds, h.stretchSalt, true
	}
	aead, rest, err := deriveAEAD(func() ([]byte, error) {
		return hkdf.Key(sha256.New, u.secret.data, h.salt[:], sealLabel, keySize+checkSize)
	})
	if err != nil {
		return nil, fmt.Errorf("%w: derive: %w", ErrSeal, err)
	}
	copy(k.check[:], rest)
	k.aead = aead
	return k, nil
}

// deriveAEAD turns the first keySize bytes of what derive returns into
// AES-256-GCM with random nonces and returns a copy of the rest.
func deriveAEAD(derive func() ([]byte, error)) (aead cipher.AEAD, rest []byte, err error) {
	erasing(func() {
		var okm []byte
		if okm, err = derive(); err != nil {
			return
		}
		defer clear(okm)
		rest = append(rest, okm[keySize:]...)
		var block cipher.Block
		if block, err = aes.NewCipher(okm[:keySize]); err == nil {
			aead, err = cipher.NewGCMWithRandomNonce(block)
		}
	})
	return aead, rest, err
}

// open opens a whole file. The ring is the caller's to free.
func (u *unlocker) open(file []byte, want fileKind) (*ring, *header, error) {
	h, body, err := parseFile(file, want)
	if err != nil {
		return nil, nil, err
	}
	if h.seal != u.seal.kind() {
		return nil, nil, fmt.Errorf("%w: by %s, but the %s is given: name the seal it was made with", ErrWrongSeal, h.seal, u.seal)
	}
	k, err := u.keys(h, false)
	if err == nil && !k.fit(h) && !k.fresh {
		k, err = u.keys(h, true) // the key file may have been replaced since
	}
	if err != nil {
		return nil, nil, err
	}
	if !k.fit(h) {
		return nil, nil, fmt.Errorf("%w: the %s does not open it: name the seal it was made with (or its header is damaged: %s)",
			ErrWrongSeal, u.seal, restoreCure)
	}
	r, err := openBody(k.aead, h, body)
	if err != nil {
		return nil, nil, err
	}
	return r, h, nil
}

func openBody(aead cipher.AEAD, h *header, body []byte) (*ring, error) {
	m, err := newRegion(len(body) - aeadOverhead)
	if err != nil {
		return nil, err
	}
	if _, err := aead.Open(m.data[:0], nil, body, h.marshal()); err != nil {
		m.free()
		return nil, fmt.Errorf("%w: its content fails authentication: %s", ErrDamaged, restoreCure)
	}
	r, err := parseBody(m.data)
	if err != nil {
		m.free()
		return nil, err
	}
	r.regions = append(r.regions, m)
	return r, nil
}

// newHeader begins a file that this unlocker will seal, with new parameters.
func (u *unlocker) newHeader(kind fileKind) *header {
	h := &header{kind: kind, seal: u.seal.kind()}
	if h.seal == sealPassphrase {
		h.rounds = minRounds
		_, _ = rand.Read(h.stretchSalt[:])
	}
	return h
}

// sealRing returns a whole file with the ring. It keeps the stretching
// parameters of like and takes a new salt, so that no key seals two files. What
// it made has been opened again: bad memory must not cost the keys.
func (u *unlocker) sealRing(r *ring, like *header) ([]byte, error) {
	h := *like
	_, _ = rand.Read(h.salt[:])
	k, err := u.keys(&h, false)
	if err != nil {
		return nil, err
	}
	body, err := r.marshal()
	if err != nil {
		return nil, err
	}
	defer body.free()
	h.check, h.bodyLength = k.check, uint32(len(body.data)+aeadOverhead)
	head := h.marshal()
	file := k.aead.Seal(head, nil, body.data, head) //nolint:gosec // this AEAD makes its own random nonce
	again, _, err := u.open(file, h.kind)
	if err != nil {
		return nil, fmt.Errorf("%w: what was sealed does not open again: check this host's memory: %w", ErrWrite, err)
	}
	again.free()
	return file, nil
}
