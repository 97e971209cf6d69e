package envelope

import (
	"crypto/rand"
	"fmt"
	"slices"
)

// Seal encrypts plaintext as one message with one frame and appends it to dst.
// The data key (DataKeySize bytes) must be the one that every EDK encrypts; it
// is read during the call only. Each call draws a fresh message ID, so one data
// key may seal many messages. context may be nil and must pass CheckContext. A
// plaintext longer than MaxFrameLength is refused with ErrLimit: stream it with
// a Writer. dst must not overlap plaintext.
func Seal(dst, dataKey []byte, edks []EDK, context map[string]string, plaintext []byte) ([]byte, error) {
	h := Header{Context: context, EDKs: edks}
	_, _ = rand.Read(h.MessageID[:]) // it never fails: crypto/rand ends the program instead
	return h.seal(dst, dataKey, plaintext)
}

// seal is Seal for a header with a message ID that was never used before.
func (h *Header) seal(dst, dataKey, plaintext []byte) ([]byte, error) {
	if len(dataKey) != DataKeySize {
		return nil, errDataKey
	}
	if len(plaintext) > MaxFrameLength {
		return nil, fmt.Errorf("%w: plaintext of %d bytes in one message, at most %d: use a stream", ErrLimit, len(plaintext), MaxFrameLength)
	}
	if err := checkHeader(h.EDKs, h.Context); err != nil {
		return nil, err
	}
	h.FrameLength = uint32(max(len(plaintext), MinFrameLength))
	start := len(dst)
	dst = slices.Grow(dst, headerSize(h.EDKs, h.Context)+finalHeadSize+len(plaintext)+tagSize)
	dst = h.append(dst)
	var c messageCipher
	var err error
	inSecret(func() {
		if err = c.derive(dataKey, &h.MessageID); err != nil {
			return
		}
		dst = c.appendHeader(dst, start)
		dst = c.appendFinalHead(dst, 1, len(plaintext))
		dst = c.aead.Seal(dst, c.iv[:], plaintext, c.bind(finalFrame, 1, len(plaintext)))
	})
	if err != nil {
		return nil, err
	}
	return dst, nil
}

// Message is a whole message that was parsed and not opened yet. It aliases the
// bytes it was parsed from, which must stay unchanged, and is safe for
// concurrent use.
type Message struct {
	Header
	frames []byte
	size   int
}

// Parse reads one whole message, framed or not, ours or another writer's. It is
// strict: what deviates from the format, is longer or shorter than it says or
// exceeds a bound of this package is refused with ErrMalformed, ErrTruncated or
// ErrLimit. Nothing in the result is authentic before Open.
func Parse(message []byte) (*Message, error) {
	c := &cursor{b: message, limit: MaxHeaderSize}
	m := &Message{}
	if err := m.parse(c); err != nil {
		return nil, err
	}
	c.limit = 0
	m.frames = message[c.off:]
	err := m.eachFrame(func(f frame) error {
		m.size += f.size()
		return nil
	})
	if err != nil {
		return nil, err
	}
	return m, nil
}

// PlaintextSize returns the length in bytes of what Open appends.
func (m *Message) PlaintextSize() int { return m.size }

// Open decrypts the message under its data key and appends the plaintext to
// dst, which must not overlap the parsed message. Where anything fails to
// verify it returns nil and ErrDecrypt, and no plaintext stays behind dst.
func (m *Message) Open(dst, dataKey []byte) ([]byte, error) {
	start := len(dst)
	dst = slices.Grow(dst, m.size)
	var c messageCipher
	var err error
	inSecret(func() {
		if err = c.unlock(&m.Header, dataKey); err != nil {
			return
		}
		plaintext := dst[start:start]
		err = m.eachFrame(func(f frame) error {
			plaintext, err = c.open(plaintext, f)
			return err
		})
	})
	if err != nil {
		clear(dst[start : start+m.size])
		return nil, err
	}
	return dst[:start+m.size], nil
}

// eachFrame calls do for the frames of the body, which must end with the last.
func (m *Message) eachFrame(do func(frame) error) error {
	c := &cursor{b: m.frames}
	for sequence := uint32(1); ; sequence++ {
		f, err := m.nextFrame(c, sequence)
		if err != nil {
			return err
		}
		if err := do(f); err != nil {
			return err
		}
		if f.part != regularFrame {
			return c.end()
		}
	}
}
