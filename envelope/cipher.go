package envelope

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/fips140"
	"crypto/hkdf"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
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
}

// newMessageCipher derives the keys of the message from its data key. It must
// run in inSecret.
func newMessageCipher(dataKey []byte, id *[MessageIDSize]byte) (*messageCipher, error) {
	root, err := hkdf.Extract(sha512.New, dataKey, id[:])
	if err != nil {
		return nil, fmt.Errorf("derive message keys: %w", err)
	}
	defer clear(root)
	commitment, err := hkdf.Expand(sha512.New, root, infoCommitment, commitmentSize)
	if err != nil {
		return nil, fmt.Errorf("derive message keys: %w", err)
	}
	key, err := hkdf.Expand(sha512.New, root, infoEncryption, DataKeySize)
	if err != nil {
		return nil, fmt.Errorf("derive message keys: %w", err)
	}
	defer clear(key)
	c := &messageCipher{}
	copy(c.commitment[:], commitment)
	copy(c.aad[:], id[:])
	c.aead, err = newGCM(key)
	return c, err
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

// unlock checks a header against its commitment and tag, and so the data key.
func (h *Header) unlock(dataKey []byte) (*messageCipher, error) {
	if len(dataKey) != DataKeySize {
		return nil, ErrDecrypt
	}
	c, err := newMessageCipher(dataKey, &h.MessageID)
	if err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare(c.commitment[:], h.commitment) != 1 {
		return nil, ErrDecrypt
	}
	clear(c.iv[:])
	if _, err := c.aead.Open(nil, c.iv[:], h.tag, h.body); err != nil {
		return nil, ErrDecrypt
	}
	return c, nil
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
