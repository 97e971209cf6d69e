package kms

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/agent/census"
	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/envelope"
)

// stream is what both directions share: the start record has been written, and
// the end record will be, once.
type stream struct {
	t         *transaction
	k         *key
	op        policy.Operation
	context   map[string]string
	use       *cache.Use
	authority cache.Authority
	keyUse    KeyUse
	// renew makes sure that upstream confirmed the key within its max_age, or that
	// its grace lasts; maxStale bounds that further, nil does not.
	renew func(k *key, maxStale *time.Duration) error
	// count counts payload that goes through against the limits of rules.
	count   func(bytes uint64) error
	checked time.Duration
	ended   bool
}

// KeyUse names the key behind the stream.
func (s *stream) KeyUse() KeyUse { return s.keyUse }

// openStream writes the start record; nothing has left the agent before it.
func (t *transaction) openStream(ctx context.Context, st *stream) error {
	t.record.Kind = audit.KindStart
	if err := t.write(ctx); err != nil {
		t.record.Kind = audit.KindOperation // it never started
		return err
	}
	t.record.Kind = audit.KindEnd
	st.checked = t.service.now()
	st.count = func(bytes uint64) error {
		return t.uncounted(ctx, st.k.Name, t.held.Add(ctx, t.service.now(), bytes))
	}
	st.renew = func(k *key, maxStale *time.Duration) error {
		f, err := t.service.cache.Renew(t.upstream(ctx), st.authority, k.limits(st.authority.Direction), maxStale)
		if err != nil {
			return failure(ctx, st.k.Name, err)
		}
		if f.Source == cache.Grace { // the record says so, also of a stream that began before the outage
			st.keyUse.Freshness = f
			t.used(k, st.keyUse.Version, f)
		}
		return nil
	}
	return nil
}

// mayGoOn asks again, now and then, whether the caller is still who it was,
// policy still gives the operation, and upstream has confirmed the key within
// its max_age: a stream that lasts learns of a revocation like everybody else.
func (s *stream) mayGoOn() error {
	service := s.t.service
	now := service.now()
	if now-s.checked < service.recheck {
		return nil
	}
	s.checked = now
	if s.t.call.Recheck != nil {
		if err := s.t.call.Recheck(); err != nil {
			return &Error{Reason: ReasonUnidentified, Key: s.k.Name, Cause: err, Message: "the caller's proof of identity ended during the stream: " + err.Error()}
		}
	}
	state := service.state.Load()
	k := state.keys[s.k.Name]
	if k == nil || k.group != s.k.group {
		return denied(s.k.Name)
	}
	decision := s.t.decide(state, k, s.op, s.context)
	if !decision.Allowed {
		s.t.decided(decision)
		return denied(s.k.Name)
	}
	return s.renew(k, s.staleness(k, decision.MaxStale))
}

// staleness is how old the last confirmation may be while the stream lasts, by
// policy and by what the request said. A bound of zero was for its beginning: it
// cannot be met again and again, but there is no grace for it.
func (s *stream) staleness(k *key, policy *time.Duration) *time.Duration {
	own := s.t.call.MaxStale
	switch {
	case own == nil:
		return policy
	case *own <= 0:
		own = &k.Limits.MaxAge
	}
	if policy == nil {
		return own
	}
	return smaller(policy, own)
}

// end releases the data key and writes the end record. It returns err, or why
// the record could not be written.
func (s *stream) end(ctx context.Context, err error) error {
	if s.ended {
		return err
	}
	s.ended = true
	s.use.Release()
	if auditErr := s.t.finish(ctx, err); auditErr != nil {
		return auditErr
	}
	return err
}

// EncryptStreamRequest asks for a message of a length not known yet.
type EncryptStreamRequest struct {
	Key     string
	Context map[string]string
	// LengthLimit is how many bytes of plaintext may follow; 0: the configured
	// bound for streams. It is counted against the data key's limit at once, and
	// what was not used of it is given back at the end.
	LengthLimit uint64
}

// EncryptStream makes one message from what is written to it. It is for one
// goroutine. Close must be called, with the error that ended the plaintext
// early or nil; only a nil answer of Close makes the message complete.
type EncryptStream struct {
	stream
	w    *envelope.Writer
	left uint64
}

// EncryptStream authorises the caller and begins a message on w.
func (s *Service) EncryptStream(ctx context.Context, call Call, req EncryptStreamRequest, w io.Writer) (*EncryptStream, error) {
	t := s.begin(call, policy.Encrypt)
	begun := false
	defer t.releaseUnless(&begun)
	st, err := t.beginEncrypt(ctx, req, w)
	for t.anew(ctx, err) {
		st, err = t.beginEncrypt(ctx, req, w)
	}
	if begun = err == nil; begun {
		return st, nil
	}
	if auditErr := t.finish(ctx, err); auditErr != nil {
		err = auditErr
	}
	return nil, err
}

func (t *transaction) beginEncrypt(ctx context.Context, req EncryptStreamRequest, w io.Writer) (*EncryptStream, error) {
	k, err := t.authoriseWith(ctx, req.Key, policy.Encrypt, req.Context, 0)
	if err != nil {
		return nil, err
	}
	limit := min(t.state.MaxStream, k.Limits.MaxBytes)
	if req.LengthLimit > limit {
		return nil, &Error{Reason: ReasonTooLarge, Key: k.Name, Message: fmt.Sprintf("a stream may hold %d bytes, not %d; split the data, or raise limits.max_stream", limit, req.LengthLimit)}
	}
	if req.LengthLimit > 0 {
		limit = req.LengthLimit
	}
	use, err := t.encryptionKey(ctx, k, req.Context, limit, true)
	if err != nil {
		return nil, err
	}
	origin, _ := use.Origin().(*made)
	st := &EncryptStream{left: limit, stream: stream{
		t: t, k: k, op: policy.Encrypt, context: req.Context, use: use,
		authority: use.Authority(),
		keyUse:    t.used(k, origin.version, use.Freshness()),
	}}
	if err := t.openStream(ctx, &st.stream); err != nil {
		st.giveBack()
		use.Release()
		return nil, err
	}
	st.w, err = envelope.NewWriter(countingWriter{w, &t.record.BytesOut}, use.DataKey(), origin.edks, req.Context)
	if err != nil {
		st.giveBack()
		use.Release()
		return nil, &Error{Reason: ReasonInternal, Key: k.Name, Message: "the message could not be begun", Cause: err}
	}
	t.record.MessageID = messageID(st.w.Header().MessageID)
	t.service.census.Add(census.Kind{Key: k.Name, Purpose: census.Message, Wraps: origin.wraps})
	return st, nil
}

// Write encrypts p. After an error the stream is over; Close it with the error.
func (s *EncryptStream) Write(p []byte) (int, error) {
	if err := s.mayGoOn(); err != nil {
		return 0, err
	}
	if uint64(len(p)) > s.left {
		return 0, &Error{Reason: ReasonTooLarge, Key: s.k.Name, Message: "the stream is longer than its length limit; the message is not complete"}
	}
	if err := s.count(uint64(len(p))); err != nil {
		return 0, err
	}
	n, err := s.w.Write(p)
	s.left -= uint64(len(p)) // what could not be written may have been encrypted
	s.t.record.BytesIn += uint64(n)
	return n, err
}

// giveBack ends what may be written, and the data key is no longer charged for it.
func (s *EncryptStream) giveBack() {
	s.t.service.cache.GiveBack(s.use, s.left)
	s.left = 0
}

// Close ends the message when cause is nil, and leaves it incomplete when it is
// not. The end record is written before it returns.
func (s *EncryptStream) Close(ctx context.Context, cause error) error {
	if cause == nil && !s.ended {
		cause = s.finish()
	}
	s.giveBack()
	return s.end(ctx, streamFailure(ctx, s.k.Name, cause))
}

// finish makes the last frame, if the stream may still go on.
func (s *EncryptStream) finish() error {
	if err := s.mayGoOn(); err != nil {
		return err
	}
	return s.w.Close()
}

// DecryptStream gives the plaintext of one message. It is for one goroutine.
// Close must be called; only a nil answer makes the plaintext complete.
type DecryptStream struct {
	stream
	r *envelope.Reader
	// free gives the memory for frames back.
	free func()
}

// countingReader and countingWriter add the bytes of a message to a record.
type countingReader struct {
	from  io.Reader
	count *uint64
}

func (r countingReader) Read(p []byte) (int, error) {
	n, err := r.from.Read(p)
	*r.count += uint64(n)
	return n, err
}

type countingWriter struct {
	to    io.Writer
	count *uint64
}

func (w countingWriter) Write(p []byte) (int, error) {
	n, err := w.to.Write(p)
	*w.count += uint64(n)
	return n, err
}

// DecryptStream reads the header of a message from r, authorises the caller for
// its key and opens it.
func (s *Service) DecryptStream(ctx context.Context, call Call, expected map[string]string, r io.Reader) (*DecryptStream, error) {
	t := s.begin(call, policy.Decrypt)
	begun := false
	defer t.releaseUnless(&begun)
	st, err := t.beginDecrypt(ctx, expected, r)
	if begun = err == nil; begun {
		return st, nil
	}
	if auditErr := t.finish(ctx, err); auditErr != nil {
		err = auditErr
	}
	return nil, err
}

func (t *transaction) beginDecrypt(ctx context.Context, expected map[string]string, r io.Reader) (*DecryptStream, error) {
	reader, err := envelope.NewReader(countingReader{r, &t.record.BytesIn})
	if err != nil {
		return nil, streamFailure(ctx, "", err)
	}
	st, err := t.openDecrypt(ctx, expected, reader)
	for t.anew(ctx, err) {
		st, err = t.openDecrypt(ctx, expected, reader)
	}
	return st, err
}

// openDecrypt begins a stream whose header has been read.
func (t *transaction) openDecrypt(ctx context.Context, expected map[string]string, reader *envelope.Reader) (*DecryptStream, error) {
	k, edks, err := t.admit(ctx, reader.Header(), expected, 0)
	if err != nil {
		return nil, err
	}
	free, err := t.service.frames.reserve(t.call.Caller.ID.String(), reader.Header())
	if err != nil {
		return nil, err
	}
	st := &DecryptStream{r: reader, free: free}
	if err := t.unlockStream(ctx, k, edks, st); err != nil {
		free()
		return nil, err
	}
	return st, nil
}

func (t *transaction) unlockStream(ctx context.Context, k *key, edks sealedKey, st *DecryptStream) error {
	use, v, err := t.unlock(ctx, k, edks, st.r.Unlock)
	if err != nil {
		return err
	}
	st.stream = stream{
		t: t, k: k, op: policy.Decrypt, context: st.r.Header().Context, use: use,
		authority: use.Authority(),
		keyUse:    t.used(k, v.String(), use.Freshness()),
	}
	if err := t.openStream(ctx, &st.stream); err != nil {
		use.Release()
		return err
	}
	return nil
}

// Context returns the message's encryption context.
func (s *DecryptStream) Context() map[string]string { return s.context }

// Read gives verified plaintext only. io.EOF means that the whole message was
// verified.
func (s *DecryptStream) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	// Not before: the source may keep the reader waiting for long.
	denial := s.mayGoOn()
	if denial == nil {
		denial = s.count(uint64(n))
	}
	if denial != nil {
		clear(p[:n])
		return 0, denial
	}
	s.t.record.BytesOut += uint64(n)
	return n, err
}

// Close ends the stream with the error that ended it, or nil after io.EOF. The
// end record is written before it returns.
func (s *DecryptStream) Close(ctx context.Context, cause error) error {
	if !s.ended {
		s.free()
	}
	return s.end(ctx, streamFailure(ctx, s.k.Name, cause))
}

// streamFailure explains what ended a stream.
func streamFailure(ctx context.Context, key string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, envelope.ErrTruncated):
		return &Error{Reason: ReasonTruncated, Key: key, Cause: err, Message: "the message ends too early: it is incomplete, and so is the plaintext before this error"}
	case errors.Is(err, envelope.ErrMalformed), errors.Is(err, envelope.ErrLimit):
		return foreign(err)
	case errors.Is(err, envelope.ErrDecrypt):
		return undecryptable(key, err)
	}
	var known *Error
	switch {
	case errors.As(err, &known), ctx.Err() != nil:
		return failure(ctx, key, err)
	case errors.Is(err, context.DeadlineExceeded):
		return &Error{Reason: ReasonDeadlineExceeded, Key: key, Cause: err, Message: outOfTime}
	case errors.Is(err, context.Canceled): // the transport knows it before ctx does
		return &Error{Reason: ReasonCancelled, Key: key, Cause: err, Message: cancelledByCaller}
	}
	return &Error{Reason: ReasonInternal, Key: key, Cause: err, Message: "the stream broke; what came before this error is incomplete"}
}
