package client

import (
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

// chunkSize is how much is read and sent at a time: one frame of a stream.
const chunkSize = 64 << 10

// EncryptStream encrypts what r holds and writes the message to w, for data of
// any length: at no time is more held than a few chunks, and when w is slow, r
// is not read. It returns which key was used.
//
// When it returns an error, what was written to w is not a message and must be
// thrown away. Errors of the agent are *Error; those of r and w are wrapped. It
// returns when ctx ends, except that it waits for a Read or Write under way.
func (c *Client) EncryptStream(ctx context.Context, start *kmsagentv1.EncryptStreamStart, r io.Reader, w io.Writer) (*kmsagentv1.KeyUse, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
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
	var use *kmsagentv1.KeyUse
	err = p.run(first, r, func(m *kmsagentv1.EncryptStreamResponse) error {
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
func (c *Client) DecryptStream(ctx context.Context, start *kmsagentv1.DecryptStreamStart, r io.Reader, w io.Writer) (*kmsagentv1.DecryptStreamHeader, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
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
	var header *kmsagentv1.DecryptStreamHeader
	err = p.run(first, r, func(m *kmsagentv1.DecryptStreamResponse) error {
		switch part := m.GetPart().(type) {
		case *kmsagentv1.DecryptStreamResponse_Header:
			if header != nil {
				return errOutOfOrder
			}
			header = part.Header
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
	errIncomplete = errors.New("kms-agent: the agent ended the stream before it had answered")
	// errEnded tells the sender that the stream is over; why, the receiver knows.
	errEnded = errors.New("kms-agent: the stream is over")
)

func writeChunk(w io.Writer, chunk []byte, expected bool) error {
	if !expected {
		return errOutOfOrder
	}
	if _, err := w.Write(chunk); err != nil {
		return fmt.Errorf("write what the agent answered: %w", err)
	}
	return nil
}

// pump moves both directions of one stream: sending in a goroutine of its own,
// receiving in the caller's. gRPC's flow control is the backpressure.
type pump[Q, A any] struct {
	stream grpc.BidiStreamingClient[Q, A]
	cancel context.CancelCauseFunc
	wrap   func([]byte) *Q
}

// run sends first, then r, and gives every answer to take. It returns after both
// directions have ended, with the error that came first.
func (p *pump[Q, A]) run(first *Q, r io.Reader, take func(*A) error) error {
	sent := make(chan error, 1)
	go func() {
		err := p.send(first, r)
		if err != nil && !errors.Is(err, errEnded) {
			p.cancel(err)
		}
		sent <- err
	}()
	received := p.receive(take)
	if received != nil {
		p.cancel(received)
	}
	unsent := <-sent
	switch {
	case unsent != nil && !errors.Is(unsent, errEnded):
		// r failed; that the stream was cancelled is its consequence.
		return unsent
	case received == nil && unsent != nil:
		// The agent said OK before it had read everything.
		return errIncomplete
	default:
		return received
	}
}

func (p *pump[Q, A]) send(first *Q, r io.Reader) error {
	if p.stream.Send(first) != nil {
		return errEnded
	}
	for {
		// A new buffer each time: gRPC may hold the message after Send returned.
		chunk := make([]byte, chunkSize)
		n, err := io.ReadFull(r, chunk)
		if n > 0 && p.stream.Send(p.wrap(chunk[:n])) != nil {
			return errEnded
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return p.stream.CloseSend()
		case err != nil:
			return fmt.Errorf("read what to send to the agent: %w", err)
		}
	}
}

func (p *pump[Q, A]) receive(take func(*A) error) error {
	for {
		answer, err := p.stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return decodeError(err)
		}
		if err := take(answer); err != nil {
			return err
		}
	}
}
