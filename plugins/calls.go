package plugins

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	spb "google.golang.org/genproto/googleapis/rpc/status"

	pluginv1 "github.com/kms-agent/kms-agent/api/plugin/v1"
)

const (
	// batchSize is how many calls or answers share a message of the stream, at most,
	// and maxShared how many bytes each may have: together less than MaxMessageSize.
	batchSize = 32
	maxShared = MaxMessageSize / batchSize / 2
	// maxCalls is how many calls a plugin works on at a time for one stream.
	maxCalls = 1024
)

// caller makes calls on one stream, which it opens again when it has ended. What
// fails fails as an RPC by itself would.
type caller struct {
	service pluginv1.BackendClient

	mu      sync.Mutex
	current *callStream // mu guards current
}

// calls is the agent's end of a stream.
type calls = grpc.BidiStreamingClient[pluginv1.CallsRequest, pluginv1.CallsResponse]

// callStream is one stream with the calls that are under way on it.
type callStream struct {
	queue chan *pluginv1.Call
	ended chan struct{} // closed when the stream is over and err says why

	mu      sync.Mutex
	next    uint64 // mu guards next, waiting and err
	waiting map[uint64]chan *pluginv1.Answer
	err     error
}

// do makes one call and returns its answer or the status it ended with.
func (c *caller) do(ctx context.Context, call *pluginv1.Call) (*pluginv1.Answer, error) {
	s := c.stream()
	answer, err := s.begin(call)
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		call.Timeout = durationpb.New(time.Until(deadline))
	}
	select {
	case s.queue <- call:
	case <-s.ended:
		return nil, s.cause()
	case <-ctx.Done():
		s.forget(call.GetId())
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	select {
	case a := <-answer:
		return a, statusOf(a)
	case <-s.ended:
		return nil, s.cause()
	case <-ctx.Done():
		s.forget(call.GetId())
		select {
		case s.queue <- &pluginv1.Call{Id: call.GetId(), Request: &pluginv1.Call_Cancel{Cancel: true}}:
		default: // its time ends there too
		}
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// statusOf returns the error that an answer is.
func statusOf(a *pluginv1.Answer) error {
	failed, ok := a.GetResult().(*pluginv1.Answer_Error)
	if !ok {
		return nil
	}
	var s spb.Status
	if err := proto.Unmarshal(failed.Error, &s); err != nil || s.GetCode() == int32(codes.OK) {
		return toStatus(Errorf(Internal, "malformed answer: an error that is none"))
	}
	return status.ErrorProto(&s)
}

// stream returns the stream, where it has ended another one. It does not wait for it to
// be open: a process that hangs must not keep its callers.
func (c *caller) stream() *callStream {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.current; s != nil {
		select {
		case <-s.ended:
		default:
			return s
		}
	}
	c.current = &callStream{
		queue: make(chan *pluginv1.Call, 2*batchSize), ended: make(chan struct{}), waiting: map[uint64]chan *pluginv1.Answer{},
	}
	go c.current.run(c.service)
	return c.current
}

// run opens the stream and serves it until it ends, which the end of the connection
// sees to.
func (s *callStream) run(service pluginv1.BackendClient) {
	ctx, cancel := context.WithCancel(context.Background()) // it outlives every call
	defer cancel()
	stream, err := service.Calls(ctx)
	if err != nil {
		s.end(err)
		return
	}
	go s.send(stream)
	s.receive(stream)
}

func (s *callStream) begin(call *pluginv1.Call) (<-chan *pluginv1.Answer, error) {
	answer := make(chan *pluginv1.Answer, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	s.next++
	call.Id = s.next
	s.waiting[call.Id] = answer
	return answer, nil
}

func (s *callStream) forget(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.waiting, id)
}

func (s *callStream) cause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// send sends what is in the queue, together where it came together.
func (s *callStream) send(stream calls) {
	for {
		var batch []*pluginv1.Call
		select {
		case call := <-s.queue:
			batch = append(batch, call)
		case <-s.ended:
			return
		}
		batch = more(batch, s.queue)
		if err := stream.Send(&pluginv1.CallsRequest{Calls: batch}); err != nil {
			return // receive learns why
		}
	}
}

// more adds to a batch what waits already.
func more[T any](batch []T, queue <-chan T) []T {
	for len(batch) < batchSize {
		select {
		case next := <-queue:
			batch = append(batch, next)
		default:
			return batch
		}
	}
	return batch
}

// receive gives the answers to those who wait, until the stream ends.
func (s *callStream) receive(stream calls) {
	for {
		answers, err := stream.Recv()
		if err != nil {
			s.end(err)
			return
		}
		for _, a := range answers.GetAnswers() {
			s.mu.Lock()
			answer := s.waiting[a.GetId()]
			delete(s.waiting, a.GetId())
			s.mu.Unlock()
			if answer != nil { // else nobody waits any more
				answer <- a
			}
		}
	}
}

func (s *callStream) end(err error) {
	if errors.Is(err, io.EOF) {
		err = status.Error(codes.Unavailable, "the plugin has ended its stream of calls")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err, s.waiting = err, nil
	close(s.ended)
}
