// Package admin translates the kmsagent.admin.v1 protocol for those who
// operate the agent.
package admin

import (
	"context"

	"google.golang.org/grpc"

	"github.com/kms-agent/kms-agent/agent/serve"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
)

// Register puts the kmsagent.admin.v1 service on a server made by the door.
func Register(s *grpc.Server, d *serve.Door, c serve.Controller) {
	adminv1.RegisterAdminServer(s, &server{door: d, controller: c})
}

type server struct {
	adminv1.UnimplementedAdminServer
	door       *serve.Door
	controller serve.Controller
}

func (s *server) Status(ctx context.Context, _ *adminv1.StatusRequest) (*adminv1.StatusResponse, error) {
	var status *adminv1.StatusResponse
	err := s.door.Service.Administer(ctx, serve.CallFrom(ctx), "status", func() error {
		status = s.controller.Status()
		return nil
	})
	if err != nil {
		return nil, err
	}
	return status, nil
}
