// Package admin translates the kmsagent.admin.v1 protocol for those who
// operate the agent.
package admin

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/serve"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
)

// profileChunk bounds one message of a profile, in bytes.
const profileChunk = 64 << 10

// Register puts the kmsagent.admin.v1 service on a server made by the door.
func Register(s *grpc.Server, d *serve.Door, c serve.Controller) {
	adminv1.RegisterAdminServer(s, &server{service: d.Service, controller: c})
}

type server struct {
	adminv1.UnimplementedAdminServer
	service    *kms.Service
	controller serve.Controller
}

// administer lets act answer an administrator who may do what req says.
func administer[R any](ctx context.Context, s *server, req kms.AdminRequest, act func() (R, error)) (R, error) {
	var answer, none R
	err := s.service.Administer(ctx, serve.CallFrom(ctx), req, func() (err error) {
		answer, err = act()
		return err
	})
	if err != nil {
		return none, err
	}
	return answer, nil
}

func (s *server) Status(ctx context.Context, _ *adminv1.StatusRequest) (*adminv1.StatusResponse, error) {
	return administer(ctx, s, kms.AdminRequest{Operation: kms.AdminStatus}, func() (*adminv1.StatusResponse, error) {
		return s.controller.Status(), nil
	})
}

func (s *server) Evict(ctx context.Context, r *adminv1.EvictRequest) (*adminv1.EvictResponse, error) {
	req := kms.AdminRequest{Operation: kms.AdminEvict, Key: r.GetKey(), Changes: true}
	if r.GetAll() {
		req.Detail = "every key"
	}
	return administer(ctx, s, req, func() (*adminv1.EvictResponse, error) {
		if (r.GetKey() == "") != r.GetAll() {
			return nil, invalid("name one key, or say that all are meant")
		}
		evicted, known, err := s.service.Evict(r.GetKey())
		if !known {
			return nil, invalid("there is no key %.128q; kms-agent status lists them", r.GetKey())
		}
		if err != nil {
			return nil, &kms.Error{Reason: kms.ReasonInternal, Cause: err, Message: err.Error()}
		}
		return &adminv1.EvictResponse{Evicted: uint64(evicted)}, nil
	})
}

func (s *server) KeysHealth(ctx context.Context, r *adminv1.KeysHealthRequest) (*adminv1.KeysHealthResponse, error) {
	req := kms.AdminRequest{Operation: kms.AdminStatus, Key: r.GetKey(), Detail: "messages by their wraps"}
	return administer(ctx, s, req, func() (*adminv1.KeysHealthResponse, error) {
		return s.controller.KeysHealth(r.GetKey(), int(r.GetDays())), nil
	})
}

func (s *server) Reload(ctx context.Context, _ *adminv1.ReloadRequest) (*adminv1.ReloadResponse, error) {
	return administer(ctx, s, kms.AdminRequest{Operation: kms.AdminReload, Changes: true}, func() (*adminv1.ReloadResponse, error) {
		generation, err := s.controller.Reload(ctx)
		if err != nil {
			return nil, &kms.Error{Reason: kms.ReasonConfigRejected, Cause: err, Message: err.Error()}
		}
		return &adminv1.ReloadResponse{Generation: generation}, nil
	})
}

func (s *server) RestartPlugin(ctx context.Context, r *adminv1.RestartPluginRequest) (*adminv1.RestartPluginResponse, error) {
	req := kms.AdminRequest{Operation: kms.AdminRestartPlugin, Backend: r.GetBackend(), Changes: true}
	return administer(ctx, s, req, func() (*adminv1.RestartPluginResponse, error) {
		pid, err := s.controller.RestartPlugin(ctx, r.GetBackend())
		if err != nil {
			return nil, err
		}
		return &adminv1.RestartPluginResponse{Pid: int32(pid)}, nil
	})
}

func (s *server) SetLogLevel(ctx context.Context, r *adminv1.SetLogLevelRequest) (*adminv1.SetLogLevelResponse, error) {
	req := kms.AdminRequest{Operation: kms.AdminSetLogLevel, Changes: true, Detail: fmt.Sprintf("%.16q for %v", r.GetLevel(), r.GetFor().AsDuration())}
	return administer(ctx, s, req, func() (*adminv1.SetLogLevelResponse, error) {
		lasts := r.GetFor().AsDuration()
		if r.GetFor() != nil && (!r.GetFor().IsValid() || lasts <= 0) {
			return nil, invalid("the time must be longer than zero")
		}
		previous, current, err := s.controller.SetLogLevel(r.GetLevel(), lasts)
		if err != nil {
			return nil, invalid("%v", err)
		}
		return &adminv1.SetLogLevelResponse{Previous: previous, Level: current}, nil
	})
}

func (s *server) Profile(r *adminv1.ProfileRequest, out grpc.ServerStreamingServer[adminv1.ProfileResponse]) error {
	ctx := out.Context()
	req := kms.AdminRequest{Operation: kms.AdminProfile, Detail: fmt.Sprintf("%.16q", r.GetName()), Changes: true}
	profile, err := administer(ctx, s, req, func() ([]byte, error) {
		var b bytes.Buffer
		var d time.Duration
		if r.GetDuration() != nil {
			d = r.GetDuration().AsDuration()
		}
		if err := s.controller.Profile(ctx, r.GetName(), d, &b); err != nil {
			return nil, invalid("%v", err)
		}
		return b.Bytes(), nil
	})
	for len(profile) > 0 && err == nil {
		n := min(len(profile), profileChunk)
		err = out.Send(&adminv1.ProfileResponse{Data: profile[:n]})
		profile = profile[n:]
	}
	return err
}

func invalid(format string, a ...any) error {
	return &kms.Error{Reason: kms.ReasonInvalidRequest, Message: fmt.Sprintf(format, a...)}
}
