package plugins

import (
	"context"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pluginv1 "github.com/kms-agent/kms-agent/api/plugin/v1"
)

// answering is one stream of calls at the plugin's end.
type answering struct {
	server *server
	out    chan *pluginv1.Answer
	work   chan task // to goroutines that wait for some
	idle   atomic.Int32
	under  sync.WaitGroup

	mu      sync.Mutex
	cancels map[uint64]context.CancelFunc // mu guards cancels
}

// maxIdle is how many goroutines wait for calls: they have grown their stacks, which a
// new one does in the midst of its call.
const maxIdle = 64

// task is one call and the time that it has.
type task struct {
	ctx    context.Context //nolint:containedctx // it is the argument of a goroutine
	cancel context.CancelFunc
	call   *pluginv1.Call
}

// Calls implements the RPC.
func (s *server) Calls(stream grpc.BidiStreamingServer[pluginv1.CallsRequest, pluginv1.CallsResponse]) error {
	a := &answering{server: s, out: make(chan *pluginv1.Answer, 2*batchSize), work: make(chan task), cancels: map[uint64]context.CancelFunc{}}
	ctx, cancel := context.WithCancel(stream.Context())
	var sender sync.WaitGroup
	sender.Go(func() {
		defer cancel() // who cannot be answered need not be worked for
		a.send(ctx, stream)
	})
	defer sender.Wait()
	defer a.under.Wait()
	defer cancel()
	context.AfterFunc(ctx, a.cancelAll)
	for {
		calls, err := stream.Recv()
		if err != nil {
			return nil // the agent has gone; there is nobody to tell
		}
		for _, call := range calls.GetCalls() {
			if err := a.take(ctx, call); err != nil {
				return err
			}
		}
	}
}

// take begins a call, or cancels one.
func (a *answering) take(ctx context.Context, call *pluginv1.Call) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	running, known := a.cancels[call.GetId()]
	if call.GetCancel() {
		if known {
			running()
		}
		return nil
	}
	if known || len(a.cancels) >= maxCalls {
		return status.Errorf(codes.InvalidArgument, "call %d: its number is in use, or more than %d calls are under way", call.GetId(), maxCalls)
	}
	if err := ctx.Err(); err != nil {
		return status.FromContextError(err).Err() // cancelAll does not come twice
	}
	own, cancel := lifetime(ctx, call.GetTimeout())
	a.cancels[call.GetId()] = cancel
	t := task{own, cancel, call}
	select {
	case a.work <- t:
	default:
		a.under.Go(func() { a.serve(ctx, t) })
	}
	return nil
}

// lifetime returns the context of one call, with what ctx says of the stream. It ends
// after timeout, a little before its caller gives up, or by hand: answering has all
// of them in its table, ctx need not have another.
func lifetime(ctx context.Context, timeout *durationpb.Duration) (context.Context, context.CancelFunc) {
	own := context.WithoutCancel(ctx)
	if timeout == nil {
		return context.WithCancel(own)
	}
	has := timeout.AsDuration()
	return context.WithTimeout(own, has-AnswerMargin(has))
}

// cancelAll ends the calls under way.
func (a *answering) cancelAll() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, cancel := range a.cancels {
		cancel()
	}
}

// serve makes a call and then those that come while few others wait for them, until
// ctx ends.
func (a *answering) serve(ctx context.Context, t task) {
	for {
		a.complete(ctx, t)
		if a.idle.Add(1) > maxIdle {
			a.idle.Add(-1)
			return
		}
		select {
		case t = <-a.work:
			a.idle.Add(-1)
		case <-ctx.Done():
			return
		}
	}
}

// complete makes a call and has it answered, while there is somebody to answer.
func (a *answering) complete(ctx context.Context, t task) {
	answer := a.server.answer(t.ctx, t.call)
	t.cancel()
	a.mu.Lock()
	delete(a.cancels, t.call.GetId())
	a.mu.Unlock()
	select {
	case a.out <- answer:
	case <-ctx.Done():
	}
}

// send sends the answers, together where they came together, until ctx ends.
func (a *answering) send(ctx context.Context, stream grpc.BidiStreamingServer[pluginv1.CallsRequest, pluginv1.CallsResponse]) {
	for {
		var batch []*pluginv1.Answer
		select {
		case answer := <-a.out:
			batch = append(batch, answer)
		case <-ctx.Done():
			return
		}
		if err := stream.Send(&pluginv1.CallsResponse{Answers: more(batch, a.out)}); err != nil {
			return
		}
	}
}

// answer makes one call as if it had come by itself.
func (s *server) answer(ctx context.Context, call *pluginv1.Call) *pluginv1.Answer {
	out := &pluginv1.Answer{Id: call.GetId()}
	var err error
	switch r := call.GetRequest().(type) {
	case *pluginv1.Call_Wrap:
		var w *pluginv1.WrapResponse
		if w, err = intercepted(ctx, s, "Wrap", r.Wrap, s.Wrap); err == nil {
			out.Result = &pluginv1.Answer_Wrap{Wrap: w}
		}
	case *pluginv1.Call_Unwrap:
		var u *pluginv1.UnwrapResponse
		if u, err = intercepted(ctx, s, "Unwrap", r.Unwrap, s.Unwrap); err == nil {
			out.Result = &pluginv1.Answer_Unwrap{Unwrap: u}
		}
	default:
		err = status.Error(codes.Unimplemented, "a call that this plugin does not know")
	}
	if n := proto.Size(out); err == nil && n > maxShared {
		err = status.Errorf(codes.ResourceExhausted, "an answer of %d bytes, %d are possible", n, maxShared)
	}
	if err == nil {
		return out
	}
	encoded, marshalErr := proto.Marshal(status.Convert(err).Proto())
	if marshalErr != nil {
		encoded = nil // no status: the agent takes it for a fault of ours, which it is
	}
	out.Result = &pluginv1.Answer_Error{Error: encoded}
	return out
}

// intercepted calls a method as the RPC server does.
func intercepted[Q, A any](ctx context.Context, s *server, name string, request *Q, method func(context.Context, *Q) (*A, error)) (*A, error) {
	if s.each == nil {
		return method(ctx, request)
	}
	answer, err := s.each(ctx, request, &grpc.UnaryServerInfo{FullMethod: pluginv1.Backend_ServiceDesc.ServiceName + "/" + name},
		func(ctx context.Context, _ any) (any, error) { return method(ctx, request) })
	if err != nil {
		return nil, err
	}
	typed, ok := answer.(*A)
	if !ok {
		return nil, status.Errorf(codes.Internal, "%s answered %T", name, answer)
	}
	return typed, nil
}
