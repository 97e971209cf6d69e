package plugins

import (
	"context"
	"encoding/json"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	pluginv1 "github.com/kms-agent/kms-agent/api/plugin/v1"
)

// server is a Backend as the RPC service of one process.
type server struct {
	pluginv1.UnimplementedBackendServer

	backend Backend
	session atomic.Pointer[session]
	// random is written before session, and read after it; nil without the
	// capability.
	random RandomSource
	// each is around every call that comes by the stream, but for what sees to its time.
	// It may be nil.
	each grpc.UnaryServerInterceptor

	mu     sync.Mutex
	opened bool // mu guards opened: Open was called
}

// Open implements the RPC.
func (s *server) Open(ctx context.Context, r *pluginv1.OpenRequest) (*pluginv1.OpenResponse, error) {
	if !s.first() {
		return nil, toStatus(Errorf(Invalid, "the plugin was opened already"))
	}
	own, err := newSessionKey()
	if err != nil {
		return nil, toStatus(&Error{Class: Internal, Err: err})
	}
	session, err := newSession(own, r.GetHostPublicKey(), false)
	if err != nil {
		return nil, toStatus(&Error{Class: Invalid, Err: err})
	}
	info, err := s.backend.Open(ctx, json.RawMessage(r.GetConfigJson()))
	if err != nil {
		return nil, toStatus(err)
	}
	if info.FIPS140 == "" {
		info.FIPS140 = FIPS140Module()
	}
	if err := info.check(); err != nil {
		return nil, toStatus(err)
	}
	source, noSource := randomOf(s.backend, info)
	if noSource != nil {
		return nil, toStatus(noSource)
	}
	s.random = source
	s.session.Store(session)
	return &pluginv1.OpenResponse{
		Name: info.Name, Version: info.Version, PluginPublicKey: own.PublicKey().Bytes(),
		Capabilities: info.Capabilities, Fips140: info.FIPS140, Calls: true,
	}, nil
}

func (s *server) first() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	first := !s.opened
	s.opened = true
	return first
}

// Wrap implements the RPC.
func (s *server) Wrap(ctx context.Context, r *pluginv1.WrapRequest) (*pluginv1.WrapResponse, error) {
	session, err := s.ready()
	if err != nil {
		return nil, err
	}
	key, binding := keyRefOf(r.GetKey()), bindingOf(r.GetBinding())
	if err := key.check(); err != nil {
		return nil, toStatus(err)
	}
	plaintext, err := session.open(session.toPlugin, r.GetPlaintext(), wrapAAD(key, binding))
	if err != nil { // the two ends disagree: the process is of no use
		return nil, toStatus(&Error{Class: Internal, Err: err})
	}
	defer clear(plaintext)
	ciphertext, err := s.backend.Wrap(ctx, key, plaintext, binding)
	if err != nil {
		return nil, toStatus(err)
	}
	answer := &pluginv1.WrapResponse{Ciphertext: ciphertext}
	if r.GetProve() {
		if err := s.prove(ctx, session, key, binding, answer); err != nil {
			return nil, err
		}
	}
	return answer, nil
}

// prove lets the backend open what it made and adds what it gave to the answer: the
// agent compares.
func (s *server) prove(ctx context.Context, session *session, key KeyRef, binding Binding, answer *pluginv1.WrapResponse) error {
	opened, err := s.backend.Unwrap(ctx, key, answer.GetCiphertext(), binding)
	defer clear(opened)
	if err != nil {
		answer.Unproven = ClassOf(err) == BadCiphertext
		if answer.GetUnproven() {
			return nil
		}
		return toStatus(err)
	}
	if answer.Opened, err = session.seal(session.toHost, opened, unwrapAAD(key, answer.GetCiphertext(), binding)); err != nil {
		return toStatus(&Error{Class: Internal, Err: err})
	}
	return nil
}

// Unwrap implements the RPC.
func (s *server) Unwrap(ctx context.Context, r *pluginv1.UnwrapRequest) (*pluginv1.UnwrapResponse, error) {
	session, err := s.ready()
	if err != nil {
		return nil, err
	}
	key, binding := keyRefOf(r.GetKey()), bindingOf(r.GetBinding())
	if err := firstError(key.check(), checkCiphertext(r.GetCiphertext())); err != nil {
		return nil, toStatus(err)
	}
	plaintext, err := s.backend.Unwrap(ctx, key, r.GetCiphertext(), binding)
	defer clear(plaintext)
	if err != nil {
		return nil, toStatus(err)
	}
	sealed, err := session.seal(session.toHost, plaintext, unwrapAAD(key, r.GetCiphertext(), binding))
	if err != nil {
		return nil, toStatus(&Error{Class: Internal, Err: err})
	}
	return &pluginv1.UnwrapResponse{Plaintext: sealed}, nil
}

// Describe implements the RPC.
func (s *server) Describe(ctx context.Context, r *pluginv1.DescribeRequest) (*pluginv1.DescribeResponse, error) {
	if _, err := s.ready(); err != nil {
		return nil, err
	}
	d, err := s.backend.Describe(ctx, r.GetUri())
	if err != nil {
		return nil, toStatus(err)
	}
	return d.proto(), nil
}

// Check implements the RPC.
func (s *server) Check(ctx context.Context, _ *pluginv1.CheckRequest) (*pluginv1.CheckResponse, error) {
	if _, err := s.ready(); err != nil {
		return nil, err
	}
	h, err := s.backend.Check(ctx)
	if err != nil {
		return nil, toStatus(err)
	}
	return &pluginv1.CheckResponse{Detail: h.Detail, UpstreamLatency: durationpb.New(h.UpstreamLatency)}, nil
}

func (s *server) ready() (*session, error) {
	if session := s.session.Load(); session != nil {
		return session, nil
	}
	return nil, toStatus(Errorf(Internal, "the plugin was not opened"))
}
