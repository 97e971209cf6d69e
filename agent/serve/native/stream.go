package native

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/serve"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

// chunkSize is how much ciphertext or plaintext one answer of a stream holds.
const chunkSize = 64 << 10

var errPanicked = errors.New("panic")

const noStart = "the first request of a stream must be its start"

func (s *server) EncryptStream(ss grpc.BidiStreamingServer[kmsagentv1.EncryptStreamRequest, kmsagentv1.EncryptStreamResponse]) error {
	ctx := ss.Context()
	first, err := ss.Recv()
	if err != nil && !errors.Is(err, io.EOF) {
		return s.notBegun(ctx, "encrypt", err)
	}
	start := first.GetStart()
	if start == nil {
		return s.invalid(ctx, serve.CallFrom(ctx), "encrypt", noStart)
	}
	c, err := s.call(ctx, "encrypt", start.GetMaxStale())
	if err != nil {
		return err
	}
	out := &chunkWriter{send: func(b []byte) error {
		return ss.Send(&kmsagentv1.EncryptStreamResponse{Part: &kmsagentv1.EncryptStreamResponse_Chunk{Chunk: b}})
	}}
	st, err := s.service.EncryptStream(ctx, c, kms.EncryptStreamRequest{
		Key: start.GetKey(), Context: start.GetContext(), LengthLimit: start.GetLengthLimit(),
	}, out)
	if err != nil {
		return err
	}
	// For a panic: a stream that began has an end on record, and its key goes.
	defer func() { _ = st.Close(ctx, errPanicked) }()
	err = ss.Send(&kmsagentv1.EncryptStreamResponse{Part: &kmsagentv1.EncryptStreamResponse_KeyUse{KeyUse: keyUse(st.KeyUse())}})
	for err == nil {
		err = s.encryptChunk(ss, st)
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	if err = st.Close(ctx, streamEnd(ctx, err)); err != nil {
		return err
	}
	return out.flush()
}

func (s *server) encryptChunk(ss grpc.BidiStreamingServer[kmsagentv1.EncryptStreamRequest, kmsagentv1.EncryptStreamResponse], st *kms.EncryptStream) error {
	r, err := ss.Recv()
	if err != nil {
		return err
	}
	if r.GetStart() != nil {
		return &kms.Error{Reason: kms.ReasonInvalidRequest, Message: "start may be sent once only"}
	}
	if err := s.fitsChunk(len(r.GetChunk())); err != nil {
		return err
	}
	_, err = st.Write(r.GetChunk())
	clear(r.GetChunk())
	return err
}

func (s *server) fitsChunk(size int) error {
	if size <= s.limits.MaxPayload {
		return nil
	}
	return &kms.Error{Reason: kms.ReasonTooLarge, Message: fmt.Sprintf("a chunk of %d bytes is more than one may hold (%d); send smaller ones", size, s.limits.MaxPayload)}
}

func (s *server) DecryptStream(ss grpc.BidiStreamingServer[kmsagentv1.DecryptStreamRequest, kmsagentv1.DecryptStreamResponse]) error {
	ctx := ss.Context()
	first, err := ss.Recv()
	if err != nil && !errors.Is(err, io.EOF) {
		return s.notBegun(ctx, "decrypt", err)
	}
	start := first.GetStart()
	if start == nil {
		return s.invalid(ctx, serve.CallFrom(ctx), "decrypt", noStart)
	}
	c, err := s.call(ctx, "decrypt", start.GetMaxStale())
	if err != nil {
		return err
	}
	in := &chunkReader{next: func() ([]byte, error) {
		r, err := ss.Recv()
		if err != nil {
			return nil, streamEnd(ctx, err)
		}
		if r.GetStart() != nil {
			return nil, &kms.Error{Reason: kms.ReasonInvalidRequest, Message: "start may be sent once only"}
		}
		return r.GetChunk(), s.fitsChunk(len(r.GetChunk()))
	}}
	st, err := s.service.DecryptStream(ctx, c, start.GetExpectedContext(), in)
	if err != nil {
		return err
	}
	defer func() { _ = st.Close(ctx, errPanicked) }()
	err = ss.Send(&kmsagentv1.DecryptStreamResponse{Part: &kmsagentv1.DecryptStreamResponse_Header{
		Header: &kmsagentv1.DecryptStreamHeader{KeyUse: keyUse(st.KeyUse()), Context: st.Context()},
	}})
	// A fresh buffer for each answer: gRPC may still be sending the last one.
	for err == nil {
		chunk := make([]byte, chunkSize)
		var n int
		if n, err = st.Read(chunk); n > 0 {
			sendErr := ss.Send(&kmsagentv1.DecryptStreamResponse{Part: &kmsagentv1.DecryptStreamResponse_Chunk{Chunk: chunk[:n]}})
			err = cmp.Or(sendErr, err) // plaintext that was not sent is no success
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return st.Close(ctx, streamEnd(ctx, err))
}

// notBegun puts a stream on record whose start did not come.
func (s *server) notBegun(ctx context.Context, operation string, err error) error {
	var refusal *kms.Error
	switch end := ended(ctx, err); {
	case errors.As(err, &refusal), errors.As(end, &refusal):
	case errors.Is(end, context.DeadlineExceeded):
		refusal = &kms.Error{Reason: kms.ReasonDeadlineExceeded, Cause: err, Message: "the caller's deadline passed before the stream's start came; allow more time"}
	case end != nil:
		refusal = &kms.Error{Reason: kms.ReasonCancelled, Cause: err, Message: "the caller cancelled the stream before its start came"}
	default:
		refusal = &kms.Error{Reason: kms.ReasonInvalidRequest, Cause: err, Message: "the first request of the stream cannot be read: it is too large or no message"}
	}
	return s.service.Refuse(ctx, serve.CallFrom(ctx), operation, refusal)
}

// streamEnd keeps the caller's own end apart from other errors.
func streamEnd(ctx context.Context, err error) error {
	if errors.Is(err, io.EOF) {
		return err
	}
	return cmp.Or(ended(ctx, err), err)
}

// ended says why a stream whose transport failed with err was ended from outside; nil where
// it was not. Of a cancelled stream, gRPC may tell Recv before it ends the context.
func ended(ctx context.Context, err error) error {
	var own *kms.Error
	switch {
	case err == nil, errors.As(err, &own):
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	switch status.Code(err) {
	case codes.Canceled:
		return context.Canceled
	case codes.DeadlineExceeded:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

// chunkWriter collects ciphertext into answers of chunkSize.
type chunkWriter struct {
	send func([]byte) error
	buf  []byte
}

func (w *chunkWriter) Write(p []byte) (int, error) {
	written := len(p)
	for len(p) > 0 {
		if w.buf == nil {
			w.buf = make([]byte, 0, chunkSize)
		}
		n := min(len(p), chunkSize-len(w.buf))
		w.buf = append(w.buf, p[:n]...)
		p = p[n:]
		if len(w.buf) == chunkSize {
			if err := w.flush(); err != nil {
				return 0, err
			}
		}
	}
	return written, nil
}

// flush sends what is left. The buffer is gRPC's from then on.
func (w *chunkWriter) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	b := w.buf
	w.buf = nil
	return w.send(b)
}

// chunkReader reads what the caller sends as one stream of bytes.
type chunkReader struct {
	next func() ([]byte, error)
	rest []byte
}

func (r *chunkReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		chunk, err := r.next()
		if err != nil {
			return 0, err
		}
		r.rest = chunk
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}
