package serve

import (
	"context"
	"io"
	"time"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
)

// Controller is the agent as the admin door sees it. Errors of type *kms.Error
// are told as they are.
type Controller interface {
	// Status tells the state of the agent and of all that it depends on,
	// without asking anything upstream.
	Status() *adminv1.StatusResponse
	// Reload reads the configuration again and returns the generation of what
	// is then in use.
	Reload(ctx context.Context) (generation uint64, err error)
	// RestartPlugin replaces the process of a backend and returns the process ID
	// of the new one.
	RestartPlugin(ctx context.Context, backend string) (pid int, err error)
	// SetLogLevel sets what is logged, "" being the configured level, for a time
	// or, with zero, until the configuration says something else. It returns the
	// levels before and after.
	SetLogLevel(level string, lasts time.Duration) (previous, current string, err error)
	// KeysHealth tells how many messages of the past days carry which wraps, of one
	// key or, with "", of all.
	KeysHealth(key string, days int) *adminv1.KeysHealthResponse
	// Profile writes a profile of the process; d is for those that take time.
	Profile(ctx context.Context, name string, d time.Duration, to io.Writer) error
}
