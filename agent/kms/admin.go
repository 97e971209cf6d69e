package kms

import (
	"context"

	"github.com/kms-agent/kms-agent/agent/policy"
)

// Administer runs act for a local administrator, whom the configuration must
// name, and audits it. Nobody is an administrator by default.
func (s *Service) Administer(ctx context.Context, call Call, operation string, act func() error) error {
	op := policy.Operation(operation)
	_, err := perform(ctx, s, call, op, func(_ context.Context, t *transaction) (struct{}, error) {
		for _, a := range t.state.Administrators {
			if a.may(call.Caller.Peer, op) {
				return struct{}{}, act()
			}
		}
		return struct{}{}, &Error{
			Reason:  ReasonAccessDenied,
			Message: "this user may not administer the agent; the admin.allow section of its configuration names those who may",
		}
	})
	return err
}
