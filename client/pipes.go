package client

import (
	"context"
	"errors"
	"io"
	"sync"
)

var (
	errAborted = errors.New("kms-agent: the stream was given up")
	// ErrIncomplete is what closing a DecryptReader before its io.EOF gives: what
	// was read is authentic, and nobody knows whether it is the whole.
	ErrIncomplete = errors.New("kms-agent: the stream was closed before its end was verified; do not use what was read as if it were the whole")
)

// EncryptWriter is EncryptStream for those who write:
//
//	w := c.NewEncryptWriter(ctx, start, file)
//	defer w.Abort()
//	... write to w ...
//	return w.Close()
//
// Close ends the message. Without it the message is truncated, which every
// reader notices; without Close, Abort and an end of ctx it holds on to memory
// and a connection. It belongs to one goroutine at a time.
type EncryptWriter struct {
	pipe   *io.PipeWriter
	cancel context.CancelFunc
	done   chan struct{}
	use    *KeyUse // use and err are set before done is closed
	err    error
	end    sync.Once
}

// NewEncryptWriter encrypts what is written to it and writes the message to w.
// Errors of starting are those of the first Write, or of Close.
func (c *Client) NewEncryptWriter(ctx context.Context, start *EncryptStreamStart, w io.Writer) *EncryptWriter {
	return newEncryptWriter(ctx, func(ctx context.Context, r io.Reader) (*KeyUse, error) {
		return c.EncryptStream(ctx, start, r, w)
	})
}

// NewEncryptWriter is Client.NewEncryptWriter, in this process.
func (p *InProcess) NewEncryptWriter(ctx context.Context, start *EncryptStreamStart, w io.Writer) *EncryptWriter {
	return newEncryptWriter(ctx, func(ctx context.Context, r io.Reader) (*KeyUse, error) {
		return p.EncryptStream(ctx, start, r, w)
	})
}

func newEncryptWriter(ctx context.Context, encrypt func(context.Context, io.Reader) (*KeyUse, error)) *EncryptWriter {
	ctx, cancel := context.WithCancel(ctx)
	r, pipe := io.Pipe()
	w := &EncryptWriter{pipe: pipe, cancel: cancel, done: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { _ = r.CloseWithError(ended(ctx)) })
	go func() {
		defer close(w.done)
		defer stop()
		w.use, w.err = encrypt(ctx, r)
		if w.err != nil && ctx.Err() != nil {
			w.err = ended(ctx)
		}
		_ = r.CloseWithError(w.err) // for a Write under way; after success there is none
	}()
	return w
}

// Write encrypts p, which is not kept. Its error is why the stream failed, and
// that of Close then.
func (w *EncryptWriter) Write(p []byte) (int, error) { return w.pipe.Write(p) }

// Close ends the message and waits until all of it is written. Only when it
// returns nil is there a message. Later calls return the same.
func (w *EncryptWriter) Close() error {
	w.finish(nil)
	return w.err
}

// Abort gives the message up, waits until nothing writes any more, and leaves an
// end that no reader takes for one. After Close it does nothing.
func (w *EncryptWriter) Abort() { w.finish(errAborted) }

func (w *EncryptWriter) finish(cause error) {
	w.end.Do(func() {
		_ = w.pipe.CloseWithError(cause) // always nil
		<-w.done
		w.cancel()
	})
}

// KeyUse tells which key was used; nil before Close has returned nil.
func (w *EncryptWriter) KeyUse() *KeyUse {
	select {
	case <-w.done:
		return w.use
	default:
		return nil
	}
}

// DecryptReader is DecryptStream for those who read. Every byte that it gives has
// been verified, but only with io.EOF is the plaintext complete: nothing should
// act on it before. It must be closed, and belongs to one goroutine at a time.
type DecryptReader struct {
	pipe   *io.PipeReader
	cancel context.CancelFunc
	done   chan struct{}
	err    error // set before done is closed
	header *DecryptStreamHeader
	ended  error // what Read said at the end
}

// NewDecryptReader opens the message that r holds. It returns when the message's
// key has been found good, or the error why not.
func (c *Client) NewDecryptReader(ctx context.Context, start *DecryptStreamStart, r io.Reader) (*DecryptReader, error) {
	return newDecryptReader(ctx, func(ctx context.Context, w io.Writer, began func(*DecryptStreamHeader)) error {
		_, err := c.decryptStream(ctx, start, r, w, began)
		return err
	})
}

// NewDecryptReader is Client.NewDecryptReader, in this process where the message
// was made by an InProcess. Closing the reader waits for a Read of r under way.
func (p *InProcess) NewDecryptReader(ctx context.Context, start *DecryptStreamStart, r io.Reader) (*DecryptReader, error) {
	return newDecryptReader(ctx, func(ctx context.Context, w io.Writer, began func(*DecryptStreamHeader)) error {
		_, err := p.decryptStream(ctx, start, r, w, began)
		return err
	})
}

func newDecryptReader(ctx context.Context, decrypt func(context.Context, io.Writer, func(*DecryptStreamHeader)) error) (*DecryptReader, error) {
	ctx, cancel := context.WithCancel(ctx)
	pipe, w := io.Pipe()
	d := &DecryptReader{pipe: pipe, cancel: cancel, done: make(chan struct{})}
	headers := make(chan *DecryptStreamHeader, 1)
	stop := context.AfterFunc(ctx, func() { _ = w.CloseWithError(ended(ctx)) })
	go func() {
		defer close(d.done)
		defer stop()
		d.err = decrypt(ctx, w, func(h *DecryptStreamHeader) { headers <- h })
		_ = w.CloseWithError(d.err) // io.EOF where that is nil
	}()
	select {
	case d.header = <-headers:
	case <-d.done:
		select {
		case d.header = <-headers: // the whole came at once
		default:
			cancel()
			return nil, d.err
		}
	}
	return d, nil
}

// Header tells the key of the message and its whole context.
func (r *DecryptReader) Header() *DecryptStreamHeader { return r.header }

// Read gives verified plaintext. It returns io.EOF when all of it was given and
// the message has ended where it says.
func (r *DecryptReader) Read(p []byte) (int, error) {
	n, err := r.pipe.Read(p)
	if err != nil && r.ended == nil {
		r.ended = err
	}
	return n, err
}

// Close ends the stream. It returns nil when Read has returned io.EOF, the error
// of the stream when it failed, and ErrIncomplete otherwise. Later calls return
// the same.
func (r *DecryptReader) Close() error {
	if r.ended == nil {
		r.ended = ErrIncomplete
	}
	r.cancel()
	_ = r.pipe.CloseWithError(ErrIncomplete) // always nil
	<-r.done
	if errors.Is(r.ended, io.EOF) {
		return nil
	}
	return r.ended
}
