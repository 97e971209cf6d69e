package envelope

import (
	"encoding/binary"
	"fmt"
)

const (
	regularHeadSize = 4 + ivSize         // sequence number, IV
	finalHeadSize   = 4 + 4 + ivSize + 4 // mark, sequence number, IV, length
)

// frame is one part of a body as it was read.
type frame struct {
	part     part
	sequence uint32
	iv       []byte
	sealed   []byte // ciphertext and tag
}

// nextFrame reads the frame that must have the given number.
func (h *Header) nextFrame(c *cursor, sequence uint32) (frame, error) {
	if h.FrameLength == 0 {
		return singleFrame(c)
	}
	f := frame{sequence: sequence}
	number, err := c.uint32()
	if err != nil {
		return frame{}, err
	}
	if number == finalMark {
		f.part = finalFrame
		if number, err = c.uint32(); err != nil {
			return frame{}, err
		}
	}
	if number != sequence {
		return frame{}, fmt.Errorf("%w: frame %d where %d should be", ErrMalformed, number, sequence)
	}
	if f.iv, err = c.take(ivSize); err != nil {
		return frame{}, err
	}
	length := h.FrameLength
	if f.part == finalFrame {
		if length, err = c.uint32(); err != nil {
			return frame{}, err
		}
	}
	if length > h.FrameLength {
		return frame{}, fmt.Errorf("%w: last frame of %d bytes, frame length is %d", ErrMalformed, length, h.FrameLength)
	}
	f.sealed, err = c.take(int(length) + tagSize)
	return f, err
}

// singleFrame reads a body without frames.
func singleFrame(c *cursor) (frame, error) {
	iv, err := c.take(ivSize)
	if err != nil {
		return frame{}, err
	}
	b, err := c.take(8)
	if err != nil {
		return frame{}, err
	}
	length := binary.BigEndian.Uint64(b)
	if length > MaxNonFramedSize {
		return frame{}, fmt.Errorf("%w: body of %d bytes without frames, at most %d", ErrLimit, length, MaxNonFramedSize)
	}
	sealed, err := c.take(int(length) + tagSize)
	return frame{part: singleBlock, sequence: 1, iv: iv, sealed: sealed}, err
}

// size is the length of the frame's plaintext.
func (f frame) size() int { return len(f.sealed) - tagSize }

// open appends the frame's plaintext to dst. It must run in inSecret.
func (c *messageCipher) open(dst []byte, f frame) ([]byte, error) {
	out, err := c.aead.Open(dst, f.iv, f.sealed, c.bind(f.part, f.sequence, f.size()))
	if err != nil {
		return nil, ErrDecrypt
	}
	return out, nil
}

// appendRegularHead appends what precedes a regular frame's ciphertext.
func (c *messageCipher) appendRegularHead(dst []byte, sequence uint32) []byte {
	dst = binary.BigEndian.AppendUint32(dst, sequence)
	return append(dst, c.sequenceIV(sequence)...)
}

// appendFinalHead appends what precedes the last frame's ciphertext.
func (c *messageCipher) appendFinalHead(dst []byte, sequence uint32, length int) []byte {
	dst = binary.BigEndian.AppendUint32(dst, finalMark)
	dst = c.appendRegularHead(dst, sequence)
	return binary.BigEndian.AppendUint32(dst, uint32(length))
}
