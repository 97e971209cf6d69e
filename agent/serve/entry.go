package serve

import (
	"context"
	"errors"
	"runtime/debug"
	"strconv"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc/tap"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/identity"
)

// entry is one request that the door has let in.
type entry struct {
	call   *kms.Call
	caller string
	gate   *Gate
	// disarm takes back that the end of the request's context leaves the gate: a
	// handler now stands for the request and will leave it, however early the
	// context ends. It returns false when that has happened.
	disarm func() bool
}

type entryKey struct{}

func entryFrom(ctx context.Context) *entry {
	e, _ := ctx.Value(entryKey{}).(*entry)
	return e
}

func (e *entry) leave() { e.gate.Leave(e.caller) }

// tap sees a request when its headers are there and before its payload is read:
// who is not known, or has too much under way, gets no memory of the agent's.
// What it refuses is on the record. It runs on the connection's own goroutine
// and holds up nobody else.
func (d *Door) tap(ctx context.Context, info *tap.Info) (_ context.Context, err error) {
	if isHealth(info.FullMethodName) {
		return ctx, d.admitHealth(ctx)
	}
	call := d.newCall()
	// Unlike in a handler, a panic here would end the process.
	defer d.recovered(call, info.FullMethodName, &err)
	if err := d.admit(ctx, call, info.FullMethodName); err != nil {
		return ctx, Status(err, call.RequestID)
	}
	e := &entry{call: call, caller: call.Caller.ID.String(), gate: d.gate}
	ctx = context.WithValue(ctx, entryKey{}, e)
	// A request may end before it has a handler: cut off, or of no known method.
	e.disarm = context.AfterFunc(ctx, e.leave)
	return ctx, nil
}

// admitHealth counts a request about health, which anybody may make. It counts by
// the host's user, and apart from the operations: neither does one user pin memory
// with requests that are half sent, nor do they keep callers out.
func (d *Door) admitHealth(ctx context.Context) error {
	peer, ok := identity.PeerFromContext(ctx)
	if !ok {
		return Status(&kms.Error{Reason: kms.ReasonUnidentified, Message: "the kernel does not say whose connection this is"}, "")
	}
	user := strconv.FormatUint(uint64(peer.UID), 10)
	if err := d.healthGate.Enter(user); err != nil {
		return Status(err, "")
	}
	context.AfterFunc(ctx, func() { d.healthGate.Leave(user) })
	return nil
}

// admit identifies the caller and counts the call.
func (d *Door) admit(ctx context.Context, call *kms.Call, method string) error {
	operation := d.operation(method)
	caller, err := d.identify(ctx)
	call.Caller = caller
	if err != nil {
		return d.Service.Refuse(ctx, *call, operation, unidentified(err))
	}
	call.Recheck = func() error { _, err := d.identify(ctx); return err }
	if err := d.gate.Enter(caller.ID.String()); err != nil {
		var refusal *kms.Error
		if errors.As(err, &refusal) {
			err = d.Service.Refuse(ctx, *call, operation, refusal)
		}
		return err
	}
	return nil
}

// unidentified is what a caller is told whom nobody vouches for.
func unidentified(err error) *kms.Error {
	refusal := &kms.Error{Reason: kms.ReasonUnidentified, Cause: err, Message: "the agent does not know this caller: " + err.Error()}
	if errors.Is(err, identity.ErrThrottled) {
		refusal.Reason, refusal.RetryAfter = kms.ReasonTooManyRequests, time.Second
	}
	return refusal
}

// over puts on record a request that ended just before its handler began, and
// returns what its caller is told.
func (d *Door) over(ctx context.Context, e *entry, method string) error {
	return Status(d.Service.Refuse(ctx, *e.call, d.operation(method), unexpected(context.Cause(ctx))), e.call.RequestID)
}

// recovered turns a panic, which is a bug of ours, into an error of this one
// request. The panic's value may hold anything and is not logged.
func (d *Door) recovered(call *kms.Call, method string, err *error) {
	v := recover()
	if v == nil {
		return
	}
	d.Logger.Error("request panicked", zap.String("request_id", call.RequestID), zap.String("method", method),
		zap.ByteString("stack", debug.Stack()))
	*err = Status(d.Service.Refuse(context.Background(), *call, d.operation(method), &kms.Error{
		Reason: kms.ReasonInternal, Message: "internal error; the agent's log has it under the request ID", Cause: errors.New("panic"),
	}), call.RequestID)
}
