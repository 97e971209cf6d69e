package serve

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/identity"
)

// maxConnectionAge is how long a connection takes new requests: its client then
// makes another and shows the SVID that it has by then, long before the first one
// expires and without a failed call. gRPC spreads it by a tenth; streams that are
// open go on.
const maxConnectionAge = 10 * time.Minute

// Door is one gRPC listener's way in: every call is identified, counted, bounded
// and given a request ID before its payload is read.
type Door struct {
	// Name stands in the audit record: "native", "admin".
	Name string
	// Service refuses on the record.
	Service *kms.Service
	Limits  Limits
	Logger  *zap.Logger
	// identify says who is at the other end, or why nobody known is.
	identify func(context.Context) (identity.Caller, error)

	gate *Gate
	// healthGate counts requests about health by user.
	healthGate *Gate

	prefix string
	next   atomic.Uint64
	// streams counts handlers that run beside their RPC.
	streams sync.WaitGroup
	// methods are those of the server, without the slash before them; it is
	// asked once requests come, when every service is registered.
	methods func() map[string]bool
}

// NewDoor returns a door for one listener. identify is asked for every call,
// and again during streams: it must be cheap.
func NewDoor(name string, s *kms.Service, l Limits, identify func(context.Context) (identity.Caller, error), logger *zap.Logger) *Door {
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails: crypto/rand
	return &Door{
		Name: name, Service: s, Limits: l, Logger: logger, identify: identify,
		gate: NewGate(l), healthGate: NewGate(l), prefix: hex.EncodeToString(id[:]) + "-",
	}
}

// streamWorkers is how many goroutines wait for calls at least. Each keeps some KiB.
const streamWorkers = 32

// Server returns a gRPC server behind this door.
func (d *Door) Server(creds credentials.TransportCredentials, more ...grpc.ServerOption) *grpc.Server {
	server := grpc.NewServer(append(more,
		grpc.Creds(creds),
		// Twice the payload, so that what is a little too large is told so in
		// the terms of the API rather than by the transport.
		grpc.MaxRecvMsgSize(2*d.Limits.MaxPayload+128<<10),
		grpc.MaxSendMsgSize(2*d.Limits.MaxPayload+128<<10),
		grpc.MaxHeaderListSize(32<<10),
		grpc.MaxConcurrentStreams(uint32(d.Limits.MaxConcurrentPerCaller)),
		grpc.ConnectionTimeout(10*time.Second),
		// Goroutines that have grown their stacks already, for ordinary calls and for
		// those that wait for a backend.
		grpc.NumStreamWorkers(uint32(max(streamWorkers, 2*runtime.GOMAXPROCS(0)))),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 2 * time.Minute, Timeout: 20 * time.Second, MaxConnectionAge: maxConnectionAge}),
		grpc.InTapHandle(d.tap),
		grpc.UnaryInterceptor(d.unary),
		grpc.StreamInterceptor(d.stream),
	)...)
	d.methods = sync.OnceValue(func() map[string]bool { return methodsOf(server) })
	return server
}

func methodsOf(s *grpc.Server) map[string]bool {
	methods := map[string]bool{}
	for service, info := range s.GetServiceInfo() {
		for _, m := range info.Methods {
			methods[service+"/"+m.Name] = true
		}
	}
	return methods
}

// CallFrom returns who calls, as the door found out. It panics outside a door.
func CallFrom(ctx context.Context) kms.Call {
	return *entryFrom(ctx).call
}

// unary is the way in of one request.
func (d *Door) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (answer any, err error) {
	if isHealth(info.FullMethod) {
		return next(ctx, req)
	}
	e := entryFrom(ctx)
	if !e.disarm() {
		return nil, d.over(ctx, e, info.FullMethod)
	}
	defer e.leave()
	defer d.recovered(e.call, info.FullMethod, &err)
	ctx, cancel := context.WithDeadline(ctx, d.deadline(ctx))
	defer cancel()
	answer, err = next(ctx, req)
	return answer, Status(err, e.call.RequestID)
}

func isHealth(method string) bool {
	return strings.HasPrefix(method, "/"+grpc_health_v1.Health_ServiceDesc.ServiceName+"/")
}

func (d *Door) newCall() *kms.Call {
	return &kms.Call{Door: d.Name, RequestID: d.prefix + strconv.FormatUint(d.next.Add(1), 10)}
}

// deadline is the caller's own, within the door's bounds.
func (d *Door) deadline(ctx context.Context) time.Time {
	now := time.Now()
	asked, ok := ctx.Deadline()
	if !ok {
		return now.Add(d.Limits.DefaultDeadline)
	}
	if latest := now.Add(d.Limits.MaxDeadline); asked.After(latest) {
		return latest
	}
	return asked
}

// unknownMethod stands on record for what the server does not have.
const unknownMethod = "unknown-method"

// operation is the operation behind a method. Whoever reaches the socket can ask
// for a method of any name: none that they made up gets into records or metrics.
func (d *Door) operation(method string) string {
	if !d.methods()[strings.TrimPrefix(method, "/")] {
		return unknownMethod
	}
	return operationOf(method)
}

// operationOf is the operation behind a method, as policy and audit call it.
func operationOf(method string) string {
	name := method[strings.LastIndexByte(method, '/')+1:]
	switch name {
	case "EncryptStream":
		return "encrypt"
	case "DecryptStream":
		return "decrypt"
	case "ReEncrypt", "WhoAmI":
		return strings.ToLower(name)
	case "DescribeKey":
		return "describe"
	}
	var b strings.Builder
	for i, r := range name {
		if unicode.IsUpper(r) && i > 0 {
			b.WriteByte('-')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}
