package kms

import (
	"context"
	"errors"
	"slices"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/identity"
)

// AdminOperation is what a local administrator may do on the admin door.
type AdminOperation string

// The administrators' operations. The audit record names them so.
const (
	AdminStatus        AdminOperation = "status"
	AdminEvict         AdminOperation = "evict"
	AdminReload        AdminOperation = "reload"
	AdminRestartPlugin AdminOperation = "restart-plugin"
	AdminSetLogLevel   AdminOperation = "set-log-level"
	AdminProfile       AdminOperation = "profile"
)

// AdminOperations lists every operation of administrators.
func AdminOperations() []AdminOperation {
	return []AdminOperation{AdminStatus, AdminEvict, AdminReload, AdminRestartPlugin, AdminSetLogLevel, AdminProfile}
}

// AdminRoles names sets of operations that keep duties apart: who looks, who
// keeps the service up, who answers for keys, and who may do everything when it
// burns.
func AdminRoles() map[string][]AdminOperation {
	return map[string][]AdminOperation{
		"auditor":     {AdminStatus},
		"operator":    {AdminStatus, AdminReload, AdminRestartPlugin, AdminSetLogLevel},
		"key-admin":   {AdminStatus, AdminEvict},
		"break-glass": AdminOperations(),
	}
}

// Administrator gives operations on the admin door to the local peers that
// match every field that is set. One that sets none matches nobody.
type Administrator struct {
	UID, GID   *uint32
	Operations []AdminOperation
}

func (a Administrator) may(p identity.Peer, op AdminOperation) bool {
	if a.UID == nil && a.GID == nil {
		return false
	}
	return (a.UID == nil || *a.UID == p.UID) && (a.GID == nil || *a.GID == p.GID) && slices.Contains(a.Operations, op)
}

// AdminRequest says what an administrator wants done, for the record.
type AdminRequest struct {
	Operation AdminOperation
	// Key and Backend are what it is done to, if anything.
	Key, Backend string
	// Detail says what else there is to know, such as the new log level.
	Detail string
	// Changes: the operation changes something, so that there is a record of it
	// before it begins too.
	Changes bool
}

// Administer runs act for a local administrator, whom the configuration must
// name, and audits it. Nobody is an administrator by default.
func (s *Service) Administer(ctx context.Context, call Call, req AdminRequest, act func() error) error {
	known := false
	_, err := perform(ctx, s, call, policy.Operation(req.Operation), func(ctx context.Context, t *transaction) (struct{}, error) {
		t.record.Key, t.record.Backend = bounded(req.Key), bounded(req.Backend)
		if known = t.administrator(req.Operation); !known {
			return struct{}{}, &Error{
				Reason:  ReasonAccessDenied,
				Message: "this user may not do this to the agent; the admin.allow section of its configuration names those who may",
			}
		}
		if req.Changes {
			t.record.Kind, t.record.Detail = audit.KindStart, req.Detail
			if err := t.write(ctx); err != nil {
				t.record.Kind = audit.KindOperation // it never started
				return struct{}{}, err
			}
			t.record.Kind = audit.KindEnd
		}
		return struct{}{}, act()
	})
	var e *Error
	if known && errors.As(err, &e) && e.Reason == ReasonAuditUnavailable && e.Cause != nil {
		// Whoever must mend it cannot ask for the status either.
		e.Message = "no record, no answer, for administrators neither: " + e.Cause.Error()
	}
	return err
}

func (t *transaction) administrator(op AdminOperation) bool {
	return slices.ContainsFunc(t.state.Administrators, func(a Administrator) bool {
		return a.may(t.call.Caller.Peer, op)
	})
}

// Evict destroys the cached data keys of the key of that name, or of every key
// when the name is empty, also those in the store, and returns how many there were. What
// upstream has said of it before confirms nothing any more.
// known is false when there is no such key. An error wraps ErrNotOnDisk.
func (s *Service) Evict(name string) (n int, known bool, err error) {
	state := s.state.Load()
	if name == "" {
		for _, k := range state.keys {
			k.group.askAgain()
		}
		n := s.cache.EvictAll()
		s.cache.Unconfirm(func(cache.Authority) bool { return true })
		return n, true, s.evicted()
	}
	k := state.keys[name]
	if k == nil {
		return 0, false, nil
	}
	k.group.askAgain()
	n = s.cache.EvictKey(k.Name)
	s.cache.Unconfirm(func(a cache.Authority) bool {
		return a.Backend == k.group.id.backend && a.WrappingKey == k.group.id.uri
	})
	return n, true, s.evicted()
}
