package envelope

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/fips140"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"hash"
)

const (
	infoCommitment = "COMMITKEY"
	infoEncryption = "\x04\x78DERIVEKEY" // the suite's ID goes before the label

	finalMark   = 0xFFFFFFFF
	maxSequence = 0xFFFFFFFF // of a final frame; regular ones end one below
)

// part is a piece of a body that has its own IV and tag.
type part uint8

const (
	regularFrame part = iota
	finalFrame
	singleBlock // the whole of a body without frames
)

// content is the part's name inside its additional authenticated data.
func (p part) content() string {
	switch p {
	case regularFrame:
		return "AWSKMSEncryptionClient Frame"
	case finalFrame:
		return "AWSKMSEncryptionClient Final Frame"
	default:
		return "AWSKMSEncryptionClient Single Block"
	}
}

// messageCipher encrypts and decrypts the parts of one message.
type messageCipher struct {
	aead       cipher.AEAD
	commitment [commitmentSize]byte
	iv         [ivSize]byte
	aad        [MessageIDSize + 35 + 4 + 8]byte
	// info and key are where derive works. They are fields and not variables of
	// it because what escapes there would be allocated inside secret.Do, which
	// tracks each allocation at the cost of a microsecond.
	info [16]byte
	key  [sha512.Size]byte
}

// derive sets the keys of the message with the given ID. It must run in
// inSecret.
func (c *messageCipher) derive(dataKey []byte, id *[MessageIDSize]byte) error {
	root, err := hkdf.Extract(sha512.New, dataKey, id[:])
	if err != nil {
		return fmt.Errorf("derive message keys: %w", err)
	}
	defer clear(root)
	defer clear(c.key[:])
	mac := hmac.New(sha512.New, root)
	copy(c.commitment[:], c.expand(mac, infoCommitment))
	copy(c.aad[:], id[:])
	mac.Reset()
	c.aead, err = newGCM(c.expand(mac, infoEncryption)[:DataKeySize])
	return err
}

// expand is HKDF-Expand (RFC 5869, section 2.3) for an output that one block of
// the hash suffices for: a single HMAC. It is not left to crypto/hkdf because
// it shares the keyed HMAC between the two outputs, which halves what secret.Do
// has to track and erase, and so the cost of a short message.
func (c *messageCipher) expand(mac hash.Hash, info string) []byte {
	input := append(append(c.info[:0], info...), 1)
	_, _ = mac.Write(input) // a hash never fails
	return mac.Sum(c.key[:0])
}

// newGCM returns AES-256-GCM with IVs of our choice, which the format demands.
// GODEBUG=fips140=only refuses all such IVs on encryption, because it cannot
// see that they are unique; here they count up from 0 under a key that is used
// for one message.
func newGCM(key []byte) (aead cipher.AEAD, err error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	fips140.WithoutEnforcement(func() { aead, err = cipher.NewGCM(block) })
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	return aead, nil
}

// unlock derives the keys and checks the header against its commitment and
// tag, and so the data key. It must run in inSecret.
func (c *messageCipher) unlock(h *Header, dataKey []byte) error {
	if len(dataKey) != DataKeySize {
		return ErrDecrypt
	}
	if err := c.derive(dataKey, &h.MessageID); err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(c.commitment[:], h.commitment) != 1 {
		return ErrDecrypt
	}
	clear(c.iv[:])
	if _, err := c.aead.Open(nil, c.iv[:], h.tag, h.body); err != nil {
		return ErrDecrypt
	}
	return nil
}

// appendHeader appends commitment and tag to a header that begins at start.
func (c *messageCipher) appendHeader(dst []byte, start int) []byte {
	dst = append(dst, c.commitment[:]...)
	clear(c.iv[:])
	return c.aead.Seal(dst, c.iv[:], nil, dst[start:])
}

// bind returns the additional authenticated data of a part.
func (c *messageCipher) bind(p part, sequence uint32, length int) []byte {
	n := MessageIDSize + copy(c.aad[MessageIDSize:], p.content())
	binary.BigEndian.PutUint32(c.aad[n:], sequence)
	binary.BigEndian.PutUint64(c.aad[n+4:], uint64(length))
	return c.aad[:n+12]
}

// sequenceIV returns the IV of the frame that we write as number sequence.
func (c *messageCipher) sequenceIV(sequence uint32) []byte {
	clear(c.iv[:])
	binary.BigEndian.PutUint32(c.iv[ivSize-4:], sequence)
	return c.iv[:]
}
