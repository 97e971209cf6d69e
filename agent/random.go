package agent

import (
	"context"
	"fmt"

	"go.uber.org/zap"

	"github.com/kms-agent/kms-agent/agent/random"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
)

// backendRandom is the random of a backend once that has been up: until then nobody
// knows whether its plugin gives any, and asking would count as calls that failed.
type backendRandom struct{ *host.Supervisor }

// Random implements plugins.RandomSource.
func (b backendRandom) Random(ctx context.Context, dst []byte) error {
	if err := b.Ready(ctx); err != nil {
		return &plugins.Error{Class: plugins.Unavailable, Err: err}
	}
	return b.Supervisor.Random(ctx, dst)
}

// refuseRandom refuses a change to the random of a backend whose plugin is known not to
// give any. What was so before holds up no other change, and a plugin that has not been
// opened yet is found out later: status and log tell.
func (a *Agent) refuseRandom(cfg *Config, backends map[string]*backend) error {
	b := backends[cfg.Random.Backend]
	if b == nil || cfg.Random == a.cfg.Random {
		return nil
	}
	info := b.supervisor.Status().Plugin
	if info.Name == "" || info.Gives(plugins.CapabilityRandom) {
		return nil
	}
	return fmt.Errorf("random.backend: backend %q gives no random: its plugin %s %s does not have that capability; name another backend, or leave random out",
		b.cfg.Name, info.Name, info.Version)
}

// useRandom has the random of the configured backend mixed in.
func (a *Agent) useRandom(cfg *Config, backends map[string]*backend) error {
	b := backends[cfg.Random.Backend]
	if b == nil {
		return a.random.Use("", nil)
	}
	return a.random.Use(b.cfg.Name, backendRandom{b.supervisor})
}

// randomChanged logs that a backend stops giving random, or gives it again.
func (a *Agent) randomChanged(backend string, err error) {
	if err == nil {
		a.logger.Info("random of the backend is mixed with the system's again", zap.String("backend", backend))
		return
	}
	a.logger.Warn("the backend gives no random; once what is at hand is used up the system's is used alone", zap.String("backend", backend), zap.Error(err))
}

// randomStatus is nil where no backend's random is mixed in.
func (a *Agent) randomStatus() *adminv1.RandomStatus {
	s := a.random.Stats()
	if s.Backend == "" {
		return nil
	}
	r := &adminv1.RandomStatus{Backend: s.Backend, PooledBytes: uint64(s.Held), PoolSize: uint64(s.Size)}
	if s.LastError != nil {
		r.LastError = s.LastError.Error()
	}
	for use, c := range s.Counts {
		r.Uses = append(r.Uses, &adminv1.RandomUse{
			Use: random.Use(use).String(), Mixed: c.Mixed, MixedBytes: c.MixedBytes, Unmixed: c.Unmixed, UnmixedBytes: c.UnmixedBytes,
		})
	}
	return r
}
