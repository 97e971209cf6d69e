package envelope

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
)

// maxIdleReads is how many empty reads ReadFrom bears, as many as bufio does.
const maxIdleReads = 100

var errWriterClosed = errors.New("write to a closed message")

// Writer encrypts a stream into one message of frames of StreamFrameLength
// bytes, of which it holds one.
type Writer struct {
	w        io.Writer
	header   *Header
	cipher   *messageCipher
	buf      []byte // the frame being encrypted: room for its head, text and tag
	pending  int    // bytes of plaintext that wait in buf
	sequence uint32 // number of the next frame
	err      error
}

// NewWriter writes the header of a new message to w and returns a Writer for
// its plaintext. The data key (DataKeySize bytes) must be the one that every
// EDK encrypts; it is read during the call only. context may be nil and must
// pass CheckContext.
func NewWriter(w io.Writer, dataKey []byte, edks []EDK, context map[string]string) (*Writer, error) {
	h := &Header{Context: context, EDKs: edks}
	_, _ = rand.Read(h.MessageID[:]) // it never fails: crypto/rand ends the program instead
	return h.newWriter(w, dataKey)
}

// newWriter is NewWriter for a header with a message ID that was never used
// before.
func (h *Header) newWriter(w io.Writer, dataKey []byte) (*Writer, error) {
	if len(dataKey) != DataKeySize {
		return nil, errDataKey
	}
	if err := checkHeader(h.EDKs, h.Context); err != nil {
		return nil, err
	}
	h.FrameLength = StreamFrameLength
	sw := &Writer{w: w, header: h.clone(), cipher: &messageCipher{}, sequence: 1}
	sw.buf = make([]byte, finalHeadSize+StreamFrameLength+tagSize)
	head := h.append(make([]byte, 0, headerSize(h.EDKs, h.Context)))
	var err error
	inSecret(func() {
		if err = sw.cipher.derive(dataKey, &h.MessageID); err == nil {
			head = sw.cipher.appendHeader(head, 0)
		}
	})
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(head); err != nil {
		return nil, fmt.Errorf("write message header: %w", err)
	}
	return sw, nil
}

// Header returns the header that was written; it is the caller's to keep, not
// to change.
func (w *Writer) Header() *Header { return w.header }

// Write encrypts p. Full frames are written out at once, except the latest,
// which may turn out to be the last. After an error the Writer is dead and the
// message incomplete, which every reader reports.
func (w *Writer) Write(p []byte) (int, error) {
	if w.err != nil {
		return 0, w.err
	}
	total := len(p)
	for len(p) > 0 {
		n, err := w.accept(p)
		p = p[n:]
		if err != nil {
			return total - len(p), err
		}
	}
	return total, nil
}

// accept takes the beginning of p, of at least one byte.
func (w *Writer) accept(p []byte) (int, error) {
	if w.pending == StreamFrameLength {
		if err := w.regular(w.text()); err != nil {
			return 0, err
		}
		w.pending = 0
	}
	if w.pending == 0 && len(p) > StreamFrameLength {
		return StreamFrameLength, w.regular(p[:StreamFrameLength]) // without a copy
	}
	n := copy(w.buf[finalHeadSize+w.pending:finalHeadSize+StreamFrameLength], p)
	w.pending += n
	return n, nil
}

// ReadFrom encrypts all that r gives, reading straight into the frame. It does
// not close the message.
func (w *Writer) ReadFrom(r io.Reader) (int64, error) {
	var total int64
	for idle := 0; w.err == nil && idle < maxIdleReads; idle++ {
		n, err := w.readSome(r)
		total += int64(n)
		if n > 0 {
			idle = 0
		}
		switch {
		case w.err != nil:
			return total, w.err
		case errors.Is(err, io.EOF):
			return total, nil
		case err != nil:
			return total, fmt.Errorf("read plaintext: %w", err)
		}
	}
	if w.err != nil {
		return total, w.err
	}
	return total, io.ErrNoProgress
}

// readSome reads once from r. Where the frame is full already, it reads into
// the room for the tag: whether the frame is the last shows only then.
func (w *Writer) readSome(r io.Reader) (int, error) {
	if w.pending < StreamFrameLength {
		n, err := r.Read(w.buf[finalHeadSize+w.pending : finalHeadSize+StreamFrameLength])
		w.pending += n
		return n, err
	}
	ahead := w.buf[finalHeadSize+StreamFrameLength:]
	n, err := r.Read(ahead)
	if n == 0 {
		return 0, err
	}
	var next [tagSize]byte
	copy(next[:], ahead[:n])
	if err := w.regular(w.text()); err != nil {
		return 0, err
	}
	w.pending = copy(w.buf[finalHeadSize:], next[:n])
	clear(next[:])
	return n, err
}

// Close writes the last frame, without which the message is truncated, and
// clears the plaintext it held. It does not close the underlying writer. To
// give a message up, do not call Close. A second Close reports an error.
func (w *Writer) Close() error {
	if w.err != nil {
		clear(w.buf)
		return w.err
	}
	n := w.pending
	inSecret(func() {
		head := w.cipher.appendFinalHead(w.buf[:0], w.sequence, n)
		w.buf = w.cipher.aead.Seal(head, w.cipher.iv[:], w.text(), w.cipher.bind(finalFrame, w.sequence, n))
	})
	_, err := w.w.Write(w.buf)
	clear(w.buf[:cap(w.buf)])
	w.cipher, w.err = nil, errWriterClosed
	if err != nil {
		w.err = fmt.Errorf("write last frame: %w", err)
		return w.err
	}
	return nil
}

// text is the plaintext that waits in buf.
func (w *Writer) text() []byte { return w.buf[finalHeadSize : finalHeadSize+w.pending] }

// regular writes a full frame. Its head is shorter than the last frame's, so it
// begins further in: thus a text that waits in buf is encrypted where it is.
func (w *Writer) regular(text []byte) error {
	if w.sequence == maxSequence {
		return w.fail(fmt.Errorf("%w: more than %d frames", ErrLimit, uint32(maxSequence)))
	}
	const start = finalHeadSize - regularHeadSize
	var out []byte
	inSecret(func() {
		head := w.cipher.appendRegularHead(w.buf[start:start], w.sequence)
		out = w.cipher.aead.Seal(head, w.cipher.iv[:], text, w.cipher.bind(regularFrame, w.sequence, len(text)))
	})
	if _, err := w.w.Write(out); err != nil {
		return w.fail(fmt.Errorf("write frame %d: %w", w.sequence, err))
	}
	w.sequence++
	return nil
}

// fail ends the Writer.
func (w *Writer) fail(err error) error {
	w.err, w.cipher, w.pending = err, nil, 0
	clear(w.buf)
	return err
}
