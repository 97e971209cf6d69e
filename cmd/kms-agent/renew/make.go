package renew

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/envelope"
)

// MaxInside is the longest message that the agent is asked to renew inside
// itself: 1 MiB of plaintext, more than which it takes only where it is
// configured so, and what the format adds.
const MaxInside = 2 << 20

// ErrTooLong is a message of more than MaxInside, for which the agent is not
// asked.
var ErrTooLong = fail(string(client.ErrTooLarge), errors.New("it is too long for the agent to renew inside itself"))

// make writes the new message to the draft: made inside the agent where that
// takes it, else by decrypting and encrypting in this process's memory.
func (r *run) make(ctx context.Context, p *piece, d *draft) error {
	if p.was.size < r.tooLarge.Load() {
		err := r.inside(ctx, p, d)
		if !TooLarge(err) {
			return err
		}
		r.tooLarge.Store(min(r.tooLarge.Load(), p.was.size)) // a lost update costs one more refusal
	}
	if r.NoStream {
		return ErrTooLong
	}
	return r.patience.call(ctx, p.old.label.String(), func() error {
		if err := d.restart(); err != nil {
			return err
		}
		return r.through(ctx, p, d)
	})
}

// TooLarge tells whether the agent refused a message for its length, or gRPC
// did so before.
func TooLarge(err error) bool {
	var e *client.Error
	return errors.Is(err, ErrTooLong) || errors.As(err, &e) && (e.Reason == client.ErrTooLarge || e.Reason == "" && e.Code == codes.ResourceExhausted)
}

// inside has the agent make the new message.
func (r *run) inside(ctx context.Context, p *piece, d *draft) error {
	old, err := io.ReadAll(io.NewSectionReader(p.source, 0, p.was.size))
	if err != nil {
		return fail(ReasonUnreadable, err)
	}
	parsed, err := envelope.Parse(old)
	if err != nil {
		return fail(ReasonDamaged, err)
	}
	request := r.Request(old)
	var answer *client.ReEncryptResponse
	err = r.patience.call(ctx, p.old.label.String(), func() error {
		ctx, cancel := r.begun(ctx)
		defer cancel()
		var err error
		answer, err = r.agent.ReEncrypt(ctx, request)
		return err
	})
	if err != nil {
		return err
	}
	made, err := envelope.Parse(answer.GetMessage())
	if err != nil || made.PlaintextSize() != parsed.PlaintextSize() {
		return fail(ReasonMismatch, errors.Join(errors.New("the agent's answer is not a message of the same length"), err))
	}
	_, err = d.Write(answer.GetMessage())
	return err
}

// through makes the new message by way of this process's memory.
func (r *run) through(ctx context.Context, p *piece, d *draft) error {
	ctx, watch := r.watch(ctx)
	defer watch.stop()
	_, _, err := Through(ctx, r.agent, &r.Options, watch.reading(p.source, p.was.size), p.was.size, d)
	return watch.blame(err)
}

// Through decrypts the message that from holds, of any length, into the
// encryption of a new one, which it writes to w. Of the plaintext a few pieces at
// a time are in this process's memory. size is how long the message is at most;
// 0 where that is not known. Only when the error is nil is there a message.
func Through(ctx context.Context, agent *client.Client, o *Options, from io.Reader, size int64, w io.Writer) (source, made *client.KeyUse, err error) {
	plaintext, err := agent.NewDecryptReader(ctx, o.opening(), from)
	if err != nil {
		return nil, nil, err
	}
	source = plaintext.Header().GetKeyUse()
	key := source.GetKey()
	if o.ToKey != "" {
		key = o.ToKey
	}
	made, err = agent.EncryptStream(ctx, &kmsagentv1.EncryptStreamStart{
		Key: key, Context: o.contextOf(plaintext.Header().GetContext()), MaxStale: o.maxStale(),
		LengthLimit: uint64(max(size, 0)), // the plaintext is shorter than its message
	}, plaintext, w)
	if closing := plaintext.Close(); err == nil {
		err = closing
	}
	return source, made, err
}

func (o *Options) opening() *kmsagentv1.DecryptStreamStart {
	return &kmsagentv1.DecryptStreamStart{ExpectedContext: o.Expected, MaxStale: o.maxStale()}
}

func (o *Options) maxStale() *durationpb.Duration {
	if o.MaxStale == nil {
		return nil
	}
	return durationpb.New(*o.MaxStale)
}

// verify decrypts both messages and compares what comes out.
func (r *run) verify(ctx context.Context, p *piece, d *draft) error {
	made, err := snapshotFile(d.file)
	if err != nil {
		return err
	}
	old, err := r.digest(ctx, p.old.label, r.opening(), p.source, p.was.size)
	if err != nil {
		return err
	}
	is, err := r.digest(ctx, p.target, &kmsagentv1.DecryptStreamStart{MaxStale: r.maxStale()}, d.file, made.size)
	if err != nil {
		return fmt.Errorf("verify the new message: %w", err)
	}
	if old != is {
		return fail(ReasonMismatch, errors.New("the new message is not used: it decrypts to something else"))
	}
	return nil
}

// digest is the hash of what a message decrypts to.
func (r *run) digest(ctx context.Context, label Label, start *kmsagentv1.DecryptStreamStart, file *os.File, size int64) (sum [sha256.Size]byte, err error) {
	err = r.patience.call(ctx, label.String(), func() error {
		ctx, watch := r.watch(ctx)
		defer watch.stop()
		hash := sha256.New()
		_, err := r.agent.DecryptStream(ctx, start, watch.reading(file, size), hash)
		hash.Sum(sum[:0])
		return watch.blame(err)
	})
	return sum, err
}

// watch ends a stream in which nothing moves any more.
type watch struct {
	timer   *time.Timer
	limit   time.Duration
	cancel  context.CancelFunc
	stalled atomic.Bool
}

var errStalled = errors.New("nothing of the stream has moved for too long")

// watch begins to watch the stream that the returned context is for. A stream
// that was begun is finished, whatever ends the run.
func (r *run) watch(ctx context.Context) (context.Context, *watch) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	w := &watch{limit: r.Timeout, cancel: cancel}
	w.timer = time.AfterFunc(r.Timeout, func() {
		w.stalled.Store(true)
		cancel()
	})
	return ctx, w
}

func (w *watch) stop() {
	w.timer.Stop()
	w.cancel()
}

// reading reads the file for the stream from its beginning.
func (w *watch) reading(file *os.File, size int64) io.Reader {
	return &watched{io.NewSectionReader(file, 0, size), w}
}

// blame says that the stream stalled where that is why it failed.
func (w *watch) blame(err error) error {
	if err != nil && w.stalled.Load() {
		return fail(string(client.ErrDeadlineExceeded), errStalled)
	}
	return err
}

type watched struct {
	io.Reader
	watch *watch
}

func (w *watched) Read(p []byte) (int, error) {
	w.watch.timer.Reset(w.watch.limit)
	return w.Reader.Read(p)
}
