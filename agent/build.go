package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/serve"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/identity"
	"github.com/kms-agent/kms-agent/plugins"
)

func (a *Agent) buildIdentity(cfg *Config) error {
	if cfg.Identity.WorkloadAPI != "" {
		source, err := identity.NewSource(identity.SourceConfig{
			Address: cfg.Identity.WorkloadAPI, TrustDomain: cfg.TrustDomain, BundleMaxAge: cfg.Identity.BundleMaxAge,
			JWTBundles: cfg.accepts(identity.ProofJWTSVID),
		})
		if err != nil {
			return fmt.Errorf("identity: %w", err)
		}
		a.source = source
	}
	creds, err := identity.NewCredentials(identity.Config{
		Source: a.source, StaticPeers: staticPeers(cfg),
		Audience: cfg.Identity.JWTAudience, Proofs: cfg.Listen.Native.Proofs,
		TrustDomain: cfg.TrustDomain, FederatedTrustDomains: cfg.Identity.FederatedTrustDomains,
		OnRefused: a.refusedConnection,
	})
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	a.creds = creds
	return nil
}

// accepts says whether callers may prove themselves so.
func (c *Config) accepts(p identity.Proof) bool {
	return len(c.Listen.Native.Proofs) == 0 || slices.Contains(c.Listen.Native.Proofs, p)
}

// refusedConnection puts a failed handshake on the record.
func (a *Agent) refusedConnection(r identity.Refusal) {
	call := kms.Call{Door: "native", Caller: identity.Caller{Peer: r.Peer}}
	if r.TLS {
		call.Caller.Proof = identity.ProofX509SVID
	}
	a.metrics.RefusedConnection("native", "handshake")
	_ = a.service.Refuse(context.Background(), call, "connect", &kms.Error{ // there is nobody to answer
		Reason: kms.ReasonUnidentified, Message: "handshake failed", Cause: r.Err,
	})
}

func staticPeers(cfg *Config) []identity.StaticPeer {
	peers := make([]identity.StaticPeer, 0, len(cfg.Identity.StaticPeers))
	for _, p := range cfg.Identity.StaticPeers {
		peers = append(peers, identity.StaticPeer{
			UID: (*uint32)(p.UID), GID: (*uint32)(p.GID), Group: (*uint32)(p.Group), Unit: p.Unit, ID: p.ID,
		})
	}
	return peers
}

func limits(cfg *Config) serve.Limits {
	return serve.Limits{
		MaxPayload:      int(cfg.Limits.MaxMessage),
		DefaultDeadline: cfg.Limits.DefaultDeadline, MaxDeadline: cfg.Limits.MaxDeadline,
		MaxConcurrent: cfg.Limits.MaxConcurrent, MaxConcurrentPerCaller: cfg.Limits.MaxConcurrentPerCaller,
		MaxConnections: cfg.Limits.MaxConnections, MaxConnectionsPerUser: cfg.Limits.MaxConnectionsPerUser,
	}
}

func serviceConfig(cfg *Config, backends map[string]*backend) kms.Config {
	c := kms.Config{
		Policy: cfg.compiled, Backends: map[string]plugins.Backend{}, Upstreams: map[string]string{},
		DataKeyUse: cfg.Limits.DataKeyUse, MaxStream: uint64(cfg.Limits.MaxStream),
	}
	for name, b := range backends {
		c.Backends[name], c.Upstreams[name] = b.upstream, b.cfg.upstreamID()
	}
	for _, r := range cfg.Admin.Allow {
		c.Administrators = append(c.Administrators, kms.Administrator{
			UID: (*uint32)(r.UID), GID: (*uint32)(r.GID), Operations: r.operations(),
		})
	}
	for _, k := range cfg.Keys {
		c.Keys = append(c.Keys, kms.Key{
			Name: k.Name, FormerNames: k.FormerNames, Labels: k.Labels,
			Wraps: wraps(k), MinWraps: k.MinWraps, BindContext: k.BindContext, MaxVersionAge: k.MaxVersionAge,
			Partition: kms.Partition(k.Cache.Partition),
			Limits: cache.Limits{
				MaxAge: k.Cache.MaxAge, MaxLifetime: k.Cache.MaxLifetime, MaxIdle: k.Cache.MaxIdle,
				MaxMessages: k.Cache.MaxMessages, MaxBytes: uint64(k.Cache.MaxBytes), Spares: k.Cache.Spares,
				Store: k.Cache.Store,
			},
			Grace: kms.Grace{Encrypt: k.Grace.Encrypt, Decrypt: k.Grace.Decrypt},
		})
	}
	return c
}

func wraps(k KeyConfig) []kms.Wrap {
	var all []kms.Wrap
	for _, w := range k.wraps() {
		all = append(all, kms.Wrap{Backend: w.Backend, WrappingKey: w.WrappingKey})
	}
	return all
}

// applyLocked puts a configuration to use: build, switch, close old. What did
// not change keeps running; on an error nothing has changed. It requires
// a.reloading.
func (a *Agent) applyLocked(ctx context.Context, cfg *Config) error {
	next, err := a.nextBackends(ctx, cfg)
	if err != nil {
		return err
	}
	old := a.backends
	if err = a.refuseRandom(cfg, next); err == nil {
		err = a.use(cfg, next)
	}
	if err != nil {
		err = errors.Join(err, a.creds.SetStaticPeers(staticPeers(a.cfg)), a.useRandom(a.cfg, old))
		for name, b := range next {
			if old[name] != b {
				b.stop()
			}
		}
		return err
	}
	for _, b := range next {
		b.upstream.current.Store(b.supervisor)
	}
	a.mu.Lock()
	a.cfg, a.backends, a.loaded = cfg, next, time.Now()
	a.generation++
	a.rejected = ""
	a.mu.Unlock()
	a.recordConfiguration(ctx, cfg)
	if level, err := zapcore.ParseLevel(string(cfg.Log.Level)); err == nil {
		a.level.configure(level)
	}
	for name, b := range old {
		if next[name] != b {
			a.logger.Info("backend stopped: the configuration has no use for it", zap.String("backend", name))
			b.stop()
		}
	}
	return nil
}

// use switches to a configuration. On an error a part of it may be in use.
func (a *Agent) use(cfg *Config, backends map[string]*backend) error {
	if err := a.creds.SetStaticPeers(staticPeers(cfg)); err != nil {
		return err
	}
	if err := a.useRandom(cfg, backends); err != nil {
		return err
	}
	return a.service.Apply(serviceConfig(cfg, backends))
}

// eventConfiguration is on the audit record whenever a configuration has been
// put to use, so that records tell under which policy they were decided.
const eventConfiguration = "configuration-in-use"

// recordConfiguration does not hold up the configuration where records cannot be
// written: it may be what takes a permission away, and without records nobody is
// given an answer anyway.
func (a *Agent) recordConfiguration(ctx context.Context, cfg *Config) {
	err := a.audit.Write(context.WithoutCancel(ctx), &audit.Record{
		Kind: audit.KindEvent, Operation: eventConfiguration,
		Detail: fmt.Sprintf("generation %d of %s, SHA-256 of its files %s", a.generation, a.path, cfg.Digest()),
	})
	if err != nil {
		a.logger.Error("the new configuration is in use and not on the audit record", zap.Error(err))
	}
}
