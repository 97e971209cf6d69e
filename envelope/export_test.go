package envelope

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha512"
	"encoding/binary"
	"io"
)

// What the tests of this package reach inside for: message IDs that are not
// random, which nothing but a frozen vector may have.

// SealWithID is Seal with a given message ID.
func SealWithID(id [MessageIDSize]byte, dst, dataKey []byte, edks []EDK, context map[string]string, plaintext []byte) ([]byte, error) {
	h := Header{MessageID: id, Context: context, EDKs: edks}
	return h.seal(dst, dataKey, plaintext)
}

// NewWriterWithID is NewWriter with a given message ID.
func NewWriterWithID(id [MessageIDSize]byte, w io.Writer, dataKey []byte, edks []EDK, context map[string]string) (*Writer, error) {
	h := &Header{MessageID: id, Context: context, EDKs: edks}
	return h.newWriter(w, dataKey)
}

// SealUncommitted makes a message that is right in all but its commitment, as an
// attacker makes one that is to open under two keys.
func SealUncommitted(dataKey []byte, edks []EDK, plaintext []byte) []byte {
	h := Header{EDKs: edks, FrameLength: MinFrameLength}
	var c messageCipher
	if err := c.derive(dataKey, &h.MessageID); err != nil {
		panic(err)
	}
	c.commitment[commitmentSize-1] ^= 1
	out := c.appendHeader(h.append(nil), 0)
	out = c.appendFinalHead(out, 1, len(plaintext))
	return c.aead.Seal(out, c.iv[:], plaintext, c.bind(finalFrame, 1, len(plaintext)))
}

// MarshalHeader serialises a parsed header anew.
func MarshalHeader(h *Header) []byte {
	return append(append(h.append(nil), h.commitment...), h.tag...)
}

// MarshalBody serialises the frames of a parsed message anew.
func MarshalBody(m *Message) ([]byte, error) {
	var c messageCipher
	var out []byte
	err := m.eachFrame(func(f frame) error {
		switch f.part {
		case regularFrame:
			out = c.appendRegularHead(out, f.sequence)
			copy(out[len(out)-ivSize:], f.iv)
		case finalFrame:
			out = c.appendFinalHead(out, f.sequence, f.size())
			copy(out[len(out)-ivSize-4:], f.iv)
		case singleBlock:
			out = binary.BigEndian.AppendUint64(append(out, f.iv...), uint64(f.size()))
		}
		out = append(out, f.sealed...)
		return nil
	})
	return out, err
}

// Expand is the key expansion, for comparison with crypto/hkdf.
func Expand(root []byte, info string) []byte {
	return bytes.Clone(new(messageCipher).expand(hmac.New(sha512.New, root), info))
}

// SetSequence pretends that frames were written.
func (w *Writer) SetSequence(n uint32) { w.sequence = n }

// Held returns the bytes of memory that the Reader holds for frames.
func (r *Reader) Held() []byte { return r.cursor.b[:cap(r.cursor.b)] }

// Held returns the bytes of memory that the Writer holds for frames.
func (w *Writer) Held() []byte { return w.buf[:cap(w.buf)] }
