package agent

import (
	"context"
	"encoding/json"
	"reflect"
	"slices"
	"sync/atomic"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
)

// upstream is what keys hold of a backend. It stays the same while a reload gives
// the backend another program or other limits, so that what is cached of it stays
// too and no call under way fails.
type upstream struct {
	current atomic.Pointer[host.Supervisor]
}

func newUpstream(s *host.Supervisor) *upstream {
	u := &upstream{}
	u.current.Store(s)
	return u
}

// through makes a call, and makes it again where its supervisor gave way to another
// meanwhile and therefore failed: every call is idempotent.
func through[T any](u *upstream, call func(*host.Supervisor) (T, error)) (T, error) {
	for {
		s := u.current.Load()
		answer, err := call(s)
		if err == nil || plugins.ClassOf(err) != plugins.Unavailable || u.current.Load() == s {
			return answer, err
		}
	}
}

// Open implements plugins.Backend; each process is opened by its supervisor.
func (u *upstream) Open(ctx context.Context, settings json.RawMessage) (plugins.Info, error) {
	return u.current.Load().Open(ctx, settings)
}

// Wrap implements plugins.Backend.
func (u *upstream) Wrap(ctx context.Context, key plugins.KeyRef, plaintext []byte, b plugins.Binding) ([]byte, error) {
	return through(u, func(s *host.Supervisor) ([]byte, error) { return s.Wrap(ctx, key, plaintext, b) })
}

// WrapProven is plugins.WrapProven in one turn.
func (u *upstream) WrapProven(ctx context.Context, key plugins.KeyRef, plaintext []byte, b plugins.Binding) ([]byte, error) {
	return through(u, func(s *host.Supervisor) ([]byte, error) { return s.WrapProven(ctx, key, plaintext, b) })
}

// Unwrap implements plugins.Backend.
func (u *upstream) Unwrap(ctx context.Context, key plugins.KeyRef, ciphertext []byte, b plugins.Binding) ([]byte, error) {
	return through(u, func(s *host.Supervisor) ([]byte, error) { return s.Unwrap(ctx, key, ciphertext, b) })
}

// Describe implements plugins.Backend.
func (u *upstream) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	return through(u, func(s *host.Supervisor) (plugins.Description, error) { return s.Describe(ctx, uri) })
}

// Check implements plugins.Backend.
func (u *upstream) Check(ctx context.Context) (plugins.Health, error) {
	return through(u, func(s *host.Supervisor) (plugins.Health, error) { return s.Check(ctx) })
}

// SeesContext implements plugins.ContextAware.
func (u *upstream) SeesContext() (sees, known bool) { return u.current.Load().SeesContext() }

// Close implements plugins.Backend; backend.stop ends the process.
func (u *upstream) Close() error { return nil }

// reach is the part of a backend's configuration that says which keys it reaches.
func (b BackendConfig) reach() BackendConfig {
	return BackendConfig{
		Plugin: b.Plugin, Path: b.Path, Args: b.Args, Env: b.Env, EnvFromFiles: b.EnvFromFiles, Settings: b.Settings,
	}
}

// takesUp makes b, which was just started, go on with the upstream of a backend that
// reaches the same.
func (b *backend) takesUp(running *backend) {
	if running != nil && reflect.DeepEqual(running.cfg.reach(), b.cfg.reach()) && slices.Equal(running.env, b.env) {
		b.upstream = running.upstream
	}
}
