package envelope

import (
	"errors"
	"io"
)

var (
	errLocked   = errors.New("message is locked: call Unlock with its data key first")
	errUnlocked = errors.New("message was unlocked already")
)

// Reader decrypts one message from a stream. It holds one frame (for a message
// without frames: all of it, at most MaxNonFramedSize bytes), and memory grows
// with what arrives, not with what a header announces.
type Reader struct {
	cursor   *cursor
	header   Header
	cipher   *messageCipher
	plain    []byte // verified and not given out yet
	sequence uint32 // of the next frame
	last     bool   // the last frame was read
	err      error
}

// NewReader reads the header of a message from r. It may read ahead of the
// message, which must be all that r gives. Errors are those of Parse, or the
// wrapped error of r.
func NewReader(r io.Reader) (*Reader, error) {
	c := newStreamCursor(r)
	sr := &Reader{cursor: c, sequence: 1}
	if err := sr.header.parse(c); err != nil {
		return nil, err
	}
	c.b, c.off, c.limit = nil, 0, 0 // the header keeps its bytes
	return sr, nil
}

// Header returns the message's header, which is not authentic before Unlock
// succeeded. It must not be changed.
func (r *Reader) Header() *Header { return &r.header }

// Unlock checks that the data key is the message's and the header authentic. It
// fails with ErrDecrypt otherwise and may then be tried with another data key.
// The data key is read during the call only.
func (r *Reader) Unlock(dataKey []byte) error {
	if r.cipher != nil || r.err != nil {
		return errUnlocked
	}
	c := &messageCipher{}
	var err error
	inSecret(func() { err = c.unlock(&r.header, dataKey) })
	if err != nil {
		return err
	}
	r.cipher = c
	return nil
}

// Read gives verified plaintext only. It returns io.EOF after the last frame
// was verified and the stream has ended there. A stream that ends earlier gives
// ErrTruncated, one that goes on ErrMalformed, a changed frame ErrDecrypt: what
// was read before is then an authentic beginning and not the whole.
func (r *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := r.more(); err != nil {
		return 0, err
	}
	n := copy(p, r.plain)
	r.plain = r.plain[n:]
	return n, nil
}

// WriteTo writes all of the plaintext to w, frame by frame, each verified. The
// errors are those of Read, without io.EOF, and those of w.
func (r *Reader) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		if err := r.more(); errors.Is(err, io.EOF) {
			return total, nil
		} else if err != nil {
			return total, err
		}
		n, err := w.Write(r.plain)
		r.plain = r.plain[n:]
		total += int64(n)
		if err != nil {
			return total, err
		}
	}
}

// more makes sure that plaintext is there.
func (r *Reader) more() error {
	if r.err == nil && r.cipher == nil {
		return errLocked
	}
	for len(r.plain) == 0 && r.err == nil {
		if err := r.next(); err != nil {
			r.fail(err)
		}
	}
	if len(r.plain) == 0 {
		return r.err
	}
	return nil
}

// next reads, verifies and decrypts a frame where it lies.
func (r *Reader) next() error {
	if r.last {
		if err := r.cursor.end(); err != nil {
			return err
		}
		return io.EOF
	}
	r.cursor.reset()
	f, err := r.header.nextFrame(r.cursor, r.sequence)
	if err != nil {
		return err
	}
	r.sequence++
	r.last = f.part != regularFrame
	inSecret(func() { r.plain, err = r.cipher.open(f.sealed[:0], f) })
	return err
}

// fail ends the Reader and clears what it held.
func (r *Reader) fail(err error) {
	r.err, r.plain, r.cipher = err, nil, nil
	b := r.cursor.b
	clear(b[:cap(b)])
}
