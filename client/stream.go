package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"google.golang.org/grpc"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

// chunkSize is how much is read and sent at a time: one frame of a stream.
const chunkSize = 64 << 10

// maxIdleReads is how often a reader may give neither data nor an error.
const maxIdleReads = 100

// EncryptStream encrypts what r holds and writes the message to w, for data of
// any length: at no time is more held than a few chunks, and when w is slow, r
// is not read. It returns which key was used.
//
// When it returns an error, what was written to w is not a message and must be
// thrown away. Errors of the agent are *Error; those of r and w are wrapped. It
// fails as soon as the agent or ctx does, even while r blocks: a Read that is
// under way then goes on until it returns, so r must not be used any more. A
// Write under way is waited for.
func (c *Client) EncryptStream(ctx context.Context, start *EncryptStreamStart, r io.Reader, w io.Writer) (*KeyUse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.connected(ctx)
	stream, err := c.rpc.EncryptStream(ctx)
	if err != nil {
		return nil, decodeError(err)
	}
	first := &kmsagentv1.EncryptStreamRequest{Part: &kmsagentv1.EncryptStreamRequest_Start{Start: start}}
	p := pump[kmsagentv1.EncryptStreamRequest, kmsagentv1.EncryptStreamResponse]{
		stream: stream, cancel: cancel,
		wrap: func(b []byte) *kmsagentv1.EncryptStreamRequest {
			return &kmsagentv1.EncryptStreamRequest{Part: &kmsagentv1.EncryptStreamRequest_Chunk{Chunk: b}}
		},
	}
	var use *KeyUse
	err = p.run(ctx, first, r, func(m *kmsagentv1.EncryptStreamResponse) error {
		switch part := m.GetPart().(type) {
		case *kmsagentv1.EncryptStreamResponse_KeyUse:
			if use != nil {
				return errOutOfOrder
			}
			use = part.KeyUse
			return nil
		case *kmsagentv1.EncryptStreamResponse_Chunk:
			return writeChunk(w, part.Chunk, use != nil)
		default:
			return errOutOfOrder
		}
	})
	if err == nil && use == nil {
		err = errIncomplete
	}
	if err != nil {
		return nil, err
	}
	return use, nil
}

// DecryptStream opens the message that r holds and writes its plaintext to w, as
// EncryptStream does the opposite. It returns the key and the message's whole
// context.
//
// Every byte that it writes has been verified, but only when it returns no error
// is the plaintext complete. Before that, nothing should act on it.
func (c *Client) DecryptStream(ctx context.Context, start *DecryptStreamStart, r io.Reader, w io.Writer) (*DecryptStreamHeader, error) {
	return c.decryptStream(ctx, start, r, w, func(*DecryptStreamHeader) {})
}

// decryptStream is DecryptStream, which calls began before it writes anything.
func (c *Client) decryptStream(ctx context.Context, start *DecryptStreamStart, r io.Reader, w io.Writer, began func(*DecryptStreamHeader)) (*DecryptStreamHeader, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.connected(ctx)
	stream, err := c.rpc.DecryptStream(ctx)
	if err != nil {
		return nil, decodeError(err)
	}
	first := &kmsagentv1.DecryptStreamRequest{Part: &kmsagentv1.DecryptStreamRequest_Start{Start: start}}
	p := pump[kmsagentv1.DecryptStreamRequest, kmsagentv1.DecryptStreamResponse]{
		stream: stream, cancel: cancel,
		wrap: func(b []byte) *kmsagentv1.DecryptStreamRequest {
			return &kmsagentv1.DecryptStreamRequest{Part: &kmsagentv1.DecryptStreamRequest_Chunk{Chunk: b}}
		},
	}
	var header *DecryptStreamHeader
	err = p.run(ctx, first, r, func(m *kmsagentv1.DecryptStreamResponse) error {
		switch part := m.GetPart().(type) {
		case *kmsagentv1.DecryptStreamResponse_Header:
			if header != nil {
				return errOutOfOrder
			}
			if part.Header == nil {
				return errOutOfOrder
			}
			header = part.Header
			began(header)
			return nil
		case *kmsagentv1.DecryptStreamResponse_Chunk:
			return writeChunk(w, part.Chunk, header != nil)
		default:
			return errOutOfOrder
		}
	})
	if err == nil && header == nil {
		err = errIncomplete
	}
	if err != nil {
		return nil, err
	}
	return header, nil
}

var (
	errOutOfOrder = errors.New("kms-agent: the agent's answer is not one of its protocol; what was written is incomplete")
	errIncomplete = errors.New("kms-agent: the agent ended the stream before it had read and answered everything")
)

func writeChunk(w io.Writer, chunk []byte, expected bool) error {
	if !expected {
		return errOutOfOrder
	}
	n, err := w.Write(chunk)
	if err == nil && n < len(chunk) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("write what the agent answered: %w", err)
	}
	return nil
}

// pump moves both directions of one stream: sending in a goroutine of its own,
// receiving in the caller's. gRPC's flow control is the backpressure.
type pump[Q, A any] struct {
	stream grpc.BidiStreamingClient[Q, A]
	cancel context.CancelFunc
	wrap   func([]byte) *Q

	// finished is set before the sending side is closed: the agent cannot have
	// ended a stream well before that.
	finished atomic.Bool
	// unread is why the reader failed; nil while it has not.
	unread atomic.Pointer[error]
}

// run sends first, then what r holds, and gives every answer to take. It returns
// the error that came first. It does not wait for a Read under way when it fails:
// what r reads from may never say anything again.
func (p *pump[Q, A]) run(ctx context.Context, first *Q, r io.Reader, take func(*A) error) error {
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		p.send(first, r)
	}()
	err := p.receive(ctx, take)
	if err == nil && !p.finished.Load() {
		err = errIncomplete
	}
	if err != nil {
		p.cancel()
		if cause := p.unread.Load(); cause != nil {
			return *cause // the stream was cancelled for it
		}
		return err
	}
	<-sent
	return nil
}

// send ends when everything is sent, when r fails, or when the stream is over;
// why it is, receive knows.
func (p *pump[Q, A]) send(first *Q, r io.Reader) {
	if p.stream.Send(first) != nil {
		return
	}
	for {
		// A new buffer each time: gRPC may hold on to a message that it was given.
		chunk := make([]byte, chunkSize)
		n, err := fill(r, chunk)
		if n > 0 && p.stream.Send(p.wrap(chunk[:n])) != nil {
			return
		}
		if errors.Is(err, io.EOF) {
			p.finished.Store(true)
			_ = p.stream.CloseSend() // always nil
			return
		}
		if err != nil {
			err = fmt.Errorf("read what to send to the agent: %w", err)
			p.unread.Store(&err)
			p.cancel()
			return
		}
	}
}

// fill reads until b is full or r fails. Unlike io.ReadFull it returns r's own
// error, so that an r that was cut short (io.ErrUnexpectedEOF) is not taken for
// one that ended, and does not wait for one that has nothing forever.
func fill(r io.Reader, b []byte) (n int, err error) {
	for idle := 0; n < len(b) && err == nil; idle++ {
		var m int
		m, err = r.Read(b[n:])
		n += m
		switch {
		case m > 0:
			idle = 0
		case err == nil && idle == maxIdleReads:
			err = io.ErrNoProgress
		}
	}
	return n, err
}

func (p *pump[Q, A]) receive(ctx context.Context, take func(*A) error) error {
	for {
		answer, err := p.stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return decodeError(err)
		case ctx.Err() != nil:
			// gRPC hands out what it has received, also after the end.
			return ended(ctx)
		}
		if err := take(answer); err != nil {
			return err
		}
	}
}
