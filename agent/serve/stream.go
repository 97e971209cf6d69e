package serve

import (
	"context"
	"time"

	"google.golang.org/grpc"

	"github.com/kms-agent/kms-agent/agent/kms"
)

// stream is the way in of one stream. It ends when no message passes for
// MaxDeadline. A send or a receive that stands still is given up by gRPC only when
// this returns, and that must not be before the handler has recorded the end: so
// the handler runs beside it, and each message passes beside the handler.
func (d *Door) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if isHealth(info.FullMethod) {
		return next(srv, ss)
	}
	e := entryFrom(ss.Context())
	if !e.disarm() {
		return d.over(ss.Context(), e, info.FullMethod)
	}
	ctx, cancel := context.WithCancelCause(ss.Context())
	defer cancel(nil)
	watched := &watchedStream{
		ServerStream: ss, ctx: ctx, patience: d.Limits.MaxDeadline,
		passing: make(chan passage), passed: make(chan error, 1),
	}
	watched.timer = time.AfterFunc(watched.patience, func() { cancel(stoodStill(watched.patience)) })
	defer watched.timer.Stop()
	done := make(chan error, 1)
	d.streams.Go(watched.pass)
	d.streams.Go(func() {
		defer e.leave()
		defer close(watched.passing)
		done <- d.handle(srv, watched, e.call, info.FullMethod, next)
	})
	return Status(<-done, e.call.RequestID)
}

func (d *Door) handle(srv any, ss grpc.ServerStream, call *kms.Call, method string, next grpc.StreamHandler) (err error) {
	defer d.recovered(call, method, &err)
	return next(srv, ss)
}

// Wait returns when no stream's handler runs any more. Call it after the
// server has stopped.
func (d *Door) Wait() { d.streams.Wait() }

func stoodStill(patience time.Duration) error {
	return &kms.Error{
		Reason:  kms.ReasonDeadlineExceeded,
		Message: "the stream stood still for " + patience.String() + "; it is over and what came before is incomplete",
	}
}

// watchedStream carries the call in its context. Its sends and receives, which
// are a handler's and one at a time, end with the context at the latest, with its
// cause; none passes after that.
type watchedStream struct {
	grpc.ServerStream
	ctx      context.Context //nolint:containedctx // grpc.ServerStream hands its context out this way
	patience time.Duration
	timer    *time.Timer // ends the context
	passing  chan passage
	passed   chan error
}

// passage is one message on its way.
type passage struct {
	message any
	out     bool
}

func (s *watchedStream) Context() context.Context { return s.ctx }

func (s *watchedStream) SendMsg(m any) error { return s.move(passage{m, true}) }

func (s *watchedStream) RecvMsg(m any) error { return s.move(passage{m, false}) }

func (s *watchedStream) move(p passage) error {
	if s.ctx.Err() != nil {
		return context.Cause(s.ctx)
	}
	s.passing <- p
	select {
	case err := <-s.passed:
		s.timer.Reset(s.patience)
		return err
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	}
}

// pass moves messages until there will be no more. The last may stand still until
// gRPC gives up.
func (s *watchedStream) pass() {
	for p := range s.passing {
		if p.out {
			s.passed <- s.ServerStream.SendMsg(p.message)
		} else {
			s.passed <- s.ServerStream.RecvMsg(p.message)
		}
	}
}
