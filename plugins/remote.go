package plugins

import (
	"context"
	"encoding/json"
	"slices"
	"sync/atomic"

	plugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	pluginv1 "github.com/kms-agent/kms-agent/api/plugin/v1"
)

// Remote is a Backend in another process, which it does not trust: every answer
// is held to the contract, and what breaks it is an error of class Internal.
// Calls end with their context; they are not repeated. It is safe for
// concurrent use.
type Remote struct {
	service pluginv1.BackendClient
	health  grpc_health_v1.HealthClient
	session atomic.Pointer[session]
	calls   atomic.Pointer[caller] // nil where each call is an RPC of its own
	random  atomic.Bool            // the plugin has CapabilityRandom
	alone   bool
}

// NewRemote returns the backend at the other end of conn, which stays the
// caller's. Open comes first.
func NewRemote(conn grpc.ClientConnInterface) *Remote {
	return &Remote{service: pluginv1.NewBackendClient(conn), health: grpc_health_v1.NewHealthClient(conn)}
}

// Alone makes an RPC of each call, for those who look at RPCs, as traces do. Otherwise
// calls share a stream where the plugin has one. It is called before Open.
func (r *Remote) Alone() { r.alone = true }

// Open configures the process and agrees with it on the session's key.
func (r *Remote) Open(ctx context.Context, config json.RawMessage) (Info, error) {
	own, err := newSessionKey()
	if err != nil {
		return Info{}, &Error{Class: Internal, Err: err}
	}
	answer, err := r.service.Open(ctx, &pluginv1.OpenRequest{ConfigJson: config, HostPublicKey: own.PublicKey().Bytes()})
	if err != nil {
		return Info{}, fromStatus(ctx, err)
	}
	info := Info{
		Name: answer.GetName(), Version: answer.GetVersion(), Capabilities: answer.GetCapabilities(), FIPS140: answer.GetFips140(),
	}
	if err := info.check(); err != nil {
		return Info{}, err
	}
	s, err := newSession(own, answer.GetPluginPublicKey(), true)
	if err != nil {
		return Info{}, &Error{Class: Internal, Detail: "malformed answer", Err: err}
	}
	if answer.GetCalls() && !r.alone {
		r.calls.Store(&caller{service: r.service})
	}
	r.random.Store(info.Gives(CapabilityRandom))
	r.session.Store(s)
	return info, nil
}

// Wrap implements Backend.
func (r *Remote) Wrap(ctx context.Context, key KeyRef, plaintext []byte, b Binding) ([]byte, error) {
	_, answer, err := r.wrapFor(ctx, key, plaintext, b, false)
	return answer.GetCiphertext(), err
}

// WrapProven is WrapProven in one call of the plugin, where it knows how.
func (r *Remote) WrapProven(ctx context.Context, key KeyRef, plaintext []byte, b Binding) ([]byte, error) {
	s, answer, err := r.wrapFor(ctx, key, plaintext, b, true)
	if err != nil {
		return nil, err
	}
	ciphertext := answer.GetCiphertext()
	switch {
	case answer.GetUnproven():
		return nil, unproven()
	case answer.GetOpened() == nil:
		if err := prove(ctx, r, key, plaintext, ciphertext, b); err != nil {
			return nil, err
		}
		return ciphertext, nil
	}
	opened, openErr := s.open(s.toHost, answer.GetOpened(), unwrapAAD(key, ciphertext, b))
	if openErr != nil {
		return nil, &Error{Class: Internal, Detail: "malformed answer", Err: openErr}
	}
	if !same(opened, plaintext) {
		return nil, unproven()
	}
	return ciphertext, nil
}

func (r *Remote) wrapFor(ctx context.Context, key KeyRef, plaintext []byte, b Binding, proof bool) (*session, *pluginv1.WrapResponse, error) {
	if err := firstError(key.check(), checkMaterial(plaintext)); err != nil {
		return nil, nil, err
	}
	s, err := r.open()
	if err != nil {
		return nil, nil, err
	}
	sealed, sealErr := s.seal(s.toPlugin, plaintext, wrapAAD(key, b))
	if sealErr != nil {
		return nil, nil, &Error{Class: Internal, Err: sealErr}
	}
	answer, callErr := r.wrap(ctx, &pluginv1.WrapRequest{Key: key.proto(), Plaintext: sealed, Binding: b.proto(), Prove: proof})
	if callErr != nil {
		return nil, nil, fromStatus(ctx, callErr)
	}
	if n := len(answer.GetCiphertext()); n == 0 || n > MaxCiphertextSize {
		return nil, nil, malformed("wrapped into %d bytes, 1 to %d are allowed", n, MaxCiphertextSize)
	}
	return s, answer, nil
}

// Unwrap implements Backend.
func (r *Remote) Unwrap(ctx context.Context, key KeyRef, ciphertext []byte, b Binding) ([]byte, error) {
	if err := firstError(key.check(), checkCiphertext(ciphertext)); err != nil {
		return nil, err
	}
	s, err := r.open()
	if err != nil {
		return nil, err
	}
	answer, callErr := r.unwrap(ctx, &pluginv1.UnwrapRequest{Key: key.proto(), Ciphertext: ciphertext, Binding: b.proto()})
	if callErr != nil {
		return nil, fromStatus(ctx, callErr)
	}
	plaintext, openErr := s.open(s.toHost, answer.GetPlaintext(), unwrapAAD(key, ciphertext, b))
	if openErr != nil {
		return nil, &Error{Class: Internal, Detail: "malformed answer", Err: openErr}
	}
	return plaintext, nil
}

func (r *Remote) wrap(ctx context.Context, q *pluginv1.WrapRequest) (*pluginv1.WrapResponse, error) {
	calls := r.calls.Load()
	if calls == nil || proto.Size(q) > maxShared/2 {
		return r.service.Wrap(ctx, q)
	}
	a, err := calls.do(ctx, &pluginv1.Call{Request: &pluginv1.Call_Wrap{Wrap: q}})
	return a.GetWrap(), err
}

func (r *Remote) unwrap(ctx context.Context, q *pluginv1.UnwrapRequest) (*pluginv1.UnwrapResponse, error) {
	calls := r.calls.Load()
	if calls == nil || proto.Size(q) > maxShared/2 {
		return r.service.Unwrap(ctx, q)
	}
	a, err := calls.do(ctx, &pluginv1.Call{Request: &pluginv1.Call_Unwrap{Unwrap: q}})
	return a.GetUnwrap(), err
}

// Describe implements Backend.
func (r *Remote) Describe(ctx context.Context, uri string) (Description, error) {
	if !validName(uri) {
		return Description{}, Errorf(Invalid, "the URI of a wrapping key is 1 to %d bytes of UTF-8", MaxNameSize)
	}
	answer, callErr := r.service.Describe(ctx, &pluginv1.DescribeRequest{Uri: uri})
	if callErr != nil {
		return Description{}, fromStatus(ctx, callErr)
	}
	d, err := descriptionOf(answer)
	if err != nil {
		return Description{}, err
	}
	return d, nil
}

// Check implements Backend.
func (r *Remote) Check(ctx context.Context) (Health, error) {
	answer, callErr := r.service.Check(ctx, &pluginv1.CheckRequest{})
	if callErr != nil {
		return Health{}, fromStatus(ctx, callErr)
	}
	h := Health{
		Detail: Printable(answer.GetDetail(), maxHealthDetail), UpstreamLatency: answer.GetUpstreamLatency().AsDuration(),
	}
	if err := h.check(); err != nil {
		return Health{}, err
	}
	return h, nil
}

// Ping tells whether the process answers at all.
func (r *Remote) Ping(ctx context.Context) error {
	answer, err := r.health.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: plugin.GRPCServiceName})
	if err != nil {
		return fromStatus(ctx, err)
	}
	if answer.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		return Errorf(Unavailable, "the plugin says that it is %s", answer.GetStatus())
	}
	return nil
}

// Close implements Backend; the process closes its backend when it ends.
func (r *Remote) Close() error { return nil }

func (r *Remote) open() (*session, error) {
	if s := r.session.Load(); s != nil {
		return s, nil
	}
	return nil, Errorf(Internal, "the plugin was not opened")
}

// firstError returns the first that is one, as a nil interface where none is.
func firstError(errs ...*Error) error {
	if i := slices.IndexFunc(errs, func(e *Error) bool { return e != nil }); i >= 0 {
		return errs[i]
	}
	return nil
}
