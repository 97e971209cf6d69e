package envelope

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// growStep bounds what is allocated ahead of bytes that have not arrived yet.
const growStep = 64 << 10

// lastFrameSlack is the room that the last frame's longer head needs: with it a
// buffer that held one frame holds them all, and no plaintext stays behind in
// an outgrown one.
const lastFrameSlack = finalHeadSize - regularHeadSize

// cursor walks over the bytes of a message: all of them where src is nil, else
// those read so far, of which take reads more.
type cursor struct {
	b     []byte
	off   int
	limit int // most bytes to be taken since the last reset; 0: no bound
	src   io.Reader
}

// take returns the next n bytes. They stay valid, but after reset are
// overwritten by what is read next.
func (c *cursor) take(n int) ([]byte, error) {
	if c.limit > 0 && n > c.limit-c.off {
		return nil, fmt.Errorf("%w: header of more than %d bytes", ErrLimit, c.limit)
	}
	if missing := n - (len(c.b) - c.off); missing > 0 {
		if err := c.fill(missing); err != nil {
			return nil, err
		}
	}
	c.off += n
	return c.b[c.off-n : c.off : c.off], nil
}

// fill reads n more bytes. Memory grows with what has arrived, never with what
// was merely announced.
func (c *cursor) fill(n int) error {
	if c.src == nil {
		return ErrTruncated
	}
	for n > 0 {
		step := min(n, max(growStep, len(c.b)))
		have := len(c.b)
		if cap(c.b)-have < step {
			c.b = slices.Grow(c.b, step+lastFrameSlack)
		}
		c.b = c.b[:have+step]
		if _, err := io.ReadFull(c.src, c.b[have:]); err != nil {
			c.b = c.b[:have]
			return readError(err)
		}
		n -= step
	}
	return nil
}

// readError tells the end of the source from its failure.
func readError(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return ErrTruncated
	}
	return fmt.Errorf("read message: %w", err)
}

// reset forgets what was taken and keeps the buffer for what comes next.
func (c *cursor) reset() { c.b, c.off, c.limit = c.b[:0], 0, 0 }

// end reports an error unless nothing is left.
func (c *cursor) end() error {
	if c.off < len(c.b) {
		return fmt.Errorf("%w: bytes follow its end", ErrMalformed)
	}
	if c.src == nil {
		return nil
	}
	var extra [1]byte
	switch _, err := io.ReadFull(c.src, extra[:]); {
	case err == nil:
		return fmt.Errorf("%w: bytes follow its end", ErrMalformed)
	case errors.Is(err, io.EOF):
		return nil
	default:
		return fmt.Errorf("read message: %w", err)
	}
}

func (c *cursor) uint8() (uint8, error) {
	b, err := c.take(1)
	if err != nil {
		return 0, err
	}
	return b[0], nil
}

func (c *cursor) uint16() (uint16, error) {
	b, err := c.take(2)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint16(b), nil
}

func (c *cursor) uint32() (uint32, error) {
	b, err := c.take(4)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint32(b), nil
}

// field takes a byte string behind its 16-bit length; name is for the error.
func (c *cursor) field(name string, most int) ([]byte, error) {
	n, err := c.uint16()
	if err != nil {
		return nil, err
	}
	if int(n) > most {
		return nil, fmt.Errorf("%w: %s of %d bytes, at most %d", ErrLimit, name, n, most)
	}
	return c.take(int(n))
}

func appendField[T string | []byte](dst []byte, v T) []byte {
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(v)))
	return append(dst, v...)
}

// newStreamCursor reads from r by way of a small buffer, so that short fields
// do not each cost a read.
func newStreamCursor(r io.Reader) *cursor {
	return &cursor{src: bufio.NewReaderSize(r, 4<<10), limit: MaxHeaderSize}
}
