package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc/codes"

	"github.com/kms-agent/kms-agent/envelope"
)

// EncryptStream is Client.EncryptStream, in this process. A stream that says its
// length limit shares a data key with others; without one it gets a data key of
// its own, which CacheLimits.MaxBytes bounds. A Read that blocks is waited for:
// what ctx ends is the next.
func (p *InProcess) EncryptStream(ctx context.Context, start *EncryptStreamStart, r io.Reader, w io.Writer) (*KeyUse, error) {
	most, limit := start.GetLengthLimit(), p.encryption.limits.MaxBytes
	if most > limit {
		return nil, failed(codes.InvalidArgument, ErrTooLarge, start.GetKey(), fmt.Sprintf("a stream of up to %d bytes, where one data key encrypts %d at most", most, limit))
	}
	k, use, release, err := p.keyToStream(ctx, start)
	if err != nil {
		return nil, err
	}
	defer release()
	if most == 0 {
		most = limit
	}
	out := &sink{ctx: ctx, w: w}
	stream, err := envelope.NewWriter(out, k.key, k.edks, start.GetContext())
	if err != nil {
		return nil, out.explain(err)
	}
	in := &source{ctx: ctx, r: r, left: most, limited: true}
	if _, err := stream.ReadFrom(in); err != nil {
		return nil, in.explain(out.explain(err))
	}
	if err := stream.Close(); err != nil {
		return nil, out.explain(err)
	}
	return use, nil
}

// keyToStream returns a data key for one stream.
func (p *InProcess) keyToStream(ctx context.Context, start *EncryptStreamStart) (*dataKey, *KeyUse, func(), error) {
	if start.GetLengthLimit() > 0 {
		k, freshness, err := p.keyToEncrypt(ctx, start.GetKey(), start.GetContext(), start.GetMaxStale(), start.GetLengthLimit())
		if err != nil {
			return nil, nil, nil, err
		}
		return k, k.use(freshness), func() { p.encryption.release(k) }, nil
	}
	if err := envelope.CheckContext(start.GetContext()); err != nil {
		return nil, nil, nil, failed(codes.InvalidArgument, ErrInvalidRequest, start.GetKey(), err.Error())
	}
	k, err := p.generate(ctx, keyID{}, &GenerateDataKeyRequest{Key: start.GetKey(), Context: start.GetContext(), MaxStale: start.GetMaxStale()})
	if err != nil {
		return nil, nil, nil, err
	}
	return k, k.use(k.freshness), func() { clear(k.key) }, nil
}

// DecryptStream is Client.DecryptStream, in this process where the message was
// made by an InProcess. A Read that blocks is waited for: what ctx ends is the
// next.
func (p *InProcess) DecryptStream(ctx context.Context, start *DecryptStreamStart, r io.Reader, w io.Writer) (*DecryptStreamHeader, error) {
	return p.decryptStream(ctx, start, r, w, func(*DecryptStreamHeader) {})
}

func (p *InProcess) decryptStream(ctx context.Context, start *DecryptStreamStart, r io.Reader, w io.Writer, began func(*DecryptStreamHeader)) (*DecryptStreamHeader, error) {
	in := &source{ctx: ctx, r: r, seen: &bytes.Buffer{}}
	message, err := envelope.NewReader(in)
	if err != nil {
		return nil, in.explain(unreadableStream(err))
	}
	name, own := exported(message.Header())
	if !own {
		return p.client.decryptStream(ctx, start, io.MultiReader(in.seen, r), w, began)
	}
	in.seen = nil
	header := &DecryptStreamHeader{Context: message.Header().Context}
	err = p.open(ctx, message.Header(), name, start.GetExpectedContext(), start.GetMaxStale(), func(k *dataKey, f Freshness) error {
		header.KeyUse = k.use(f)
		return message.Unlock(k.key)
	})
	if err != nil {
		return nil, err
	}
	began(header)
	out := &sink{ctx: ctx, w: w}
	if _, err := message.WriteTo(out); err != nil {
		return nil, in.explain(out.explain(unreadableStream(err)))
	}
	return header, nil
}

// unreadableStream gives errors of the format their reason; others stay.
func unreadableStream(err error) error {
	switch {
	case errors.Is(err, envelope.ErrTruncated):
		return failed(codes.InvalidArgument, ErrStreamTruncated, "", "the message ended before its last frame; what was decrypted is not the whole")
	case errors.Is(err, envelope.ErrDecrypt):
		return undecryptable("")
	case errors.Is(err, envelope.ErrMalformed), errors.Is(err, envelope.ErrLimit):
		return unreadable(err)
	}
	return err
}

// source reads for a stream: until ctx ends, and no more than it may.
type source struct {
	ctx     context.Context //nolint:containedctx // of one call, which it does not outlive
	r       io.Reader
	left    uint64
	limited bool
	seen    *bytes.Buffer // takes what is read; nil for nothing
	err     error         // why it failed; nil for io.EOF
}

// Read implements io.Reader.
func (s *source) Read(p []byte) (int, error) {
	if s.ctx.Err() != nil {
		s.err = ended(s.ctx)
		return 0, s.err
	}
	n, err := s.r.Read(p)
	if s.limited && uint64(n) > s.left {
		s.err = failed(codes.InvalidArgument, ErrTooLarge, "", "the stream is longer than its length limit")
		return 0, s.err
	}
	s.left -= min(uint64(n), s.left)
	if s.seen != nil {
		s.seen.Write(p[:n])
	}
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = fmt.Errorf("read the stream: %w", err)
		return n, s.err
	}
	return n, err
}

// explain puts the reason why s failed in the place of what others made of it.
func (s *source) explain(err error) error {
	if s.err != nil {
		return s.err
	}
	return err
}

// sink writes for a stream: until ctx ends, and all or an error.
type sink struct {
	ctx context.Context //nolint:containedctx // of one call, which it does not outlive
	w   io.Writer
	err error
}

// Write implements io.Writer.
func (s *sink) Write(p []byte) (int, error) {
	if s.ctx.Err() != nil {
		s.err = ended(s.ctx)
		return 0, s.err
	}
	n, err := s.w.Write(p)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		s.err = fmt.Errorf("write the stream: %w", err)
		return n, s.err
	}
	return n, nil
}

// explain puts the reason why s failed in the place of what others made of it.
func (s *sink) explain(err error) error {
	if s.err != nil {
		return s.err
	}
	return err
}
