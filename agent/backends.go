package agent

import (
	"context"
	"crypto/fips140"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
	"github.com/kms-agent/kms-agent/plugins/local"
)

const (
	backoffMin = time.Second
	backoffMax = time.Minute
)

// backend is one configured backend and its supervisor.
type backend struct {
	cfg        BackendConfig
	env        []string
	supervisor *host.Supervisor
	upstream   *upstream // calls supervisor, from when the configuration is in use
	cancel     context.CancelFunc
	done       chan struct{}
}

// startBackend starts a plugin process and goes on supervising it.
func (a *Agent) startBackend(cfg BackendConfig, env []string) (*backend, error) {
	hc := a.hostConfig(cfg, env)
	var err error
	if hc.Descriptors, err = a.descriptors.named(cfg.Descriptors); err != nil {
		return nil, fmt.Errorf("backend %q: %w", cfg.Name, err)
	}
	s, err := host.New(hc)
	if err != nil {
		return nil, fmt.Errorf("backend %q: %w", cfg.Name, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	b := &backend{cfg: cfg, env: env, supervisor: s, upstream: newUpstream(s), cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(b.done)
		if err := s.Run(ctx); ignoreEnd(err) != nil {
			a.logger.Error("backend ended", zap.String("backend", cfg.Name), zap.Error(err))
		}
	}()
	return b, nil
}

// stop ends the plugin process and waits for it.
func (b *backend) stop() {
	b.cancel()
	<-b.done
}

func (a *Agent) hostConfig(cfg BackendConfig, env []string) host.Config {
	hc := host.Config{
		Name: cfg.Name, Command: cfg.Path, Args: cfg.Args, Env: env, SHA256: cfg.SHA256,
		Settings: json.RawMessage(cfg.Settings), RuntimeDir: a.cfg.RuntimeDir,
		StartTimeout: cfg.StartTimeout, CallTimeout: cfg.CallTimeout, MaxConcurrent: cfg.MaxConcurrent,
		BackoffMin: backoffMin, BackoffMax: backoffMax, FIPS140: fips140.Enabled(),
		OnCall: a.upstreamCall(cfg.Name), StatsHandler: a.tracing.pluginHandler(), Logger: a.logger.Named("plugin"),
	}
	hc.Breaker = host.Breaker{
		Failures: cfg.Breaker.Failures, Rate: float64(cfg.Breaker.FailureRate), Slow: cfg.Breaker.Slow, MaxWait: cfg.Breaker.MaxWait,
	}
	hc.OnState = func(s host.Status) {
		if s.State == host.Up {
			a.service.Reached(s.Name)
		}
	}
	hc.Confine, hc.Access = host.Confinement(cfg.Confine), cfg.Access.access()
	if dir, ok := os.LookupEnv("CREDENTIALS_DIRECTORY"); ok {
		hc.Access.Read = append(hc.Access.Read, dir)
	}
	if cfg.Plugin == pluginLocal {
		hc.Access.Read = append(hc.Access.Read, local.Paths(json.RawMessage(cfg.Settings))...)
	}
	if cfg.Path != "" {
		hc.Access.Write = append(hc.Access.Write, a.cfg.PluginState(cfg.Name))
	}
	if cfg.Plugin != "" {
		hc.Self, hc.Command, hc.Args = true, "", []string{"plugin", "serve", cfg.Plugin}
	}
	return hc
}

// PluginState is the directory for what a plugin keeps across its processes. It is
// the plugin's own, and named to it by plugins.StateVariable.
func (c *Config) PluginState(backend string) string {
	return filepath.Join(c.StateDir, "plugins", backend)
}

// pluginDebug is GODEBUG for plugins: the agent's own, and no preemption by signals.
// A signal saves the registers of what it interrupts to a stack that is not erased,
// and a cipher has key material there.
func pluginDebug(own string) string {
	const noSignals = "asyncpreemptoff=1"
	if own == "" {
		return noSignals
	}
	return own + "," + noSignals
}

// PluginEnv is the whole environment of a backend's plugin, whose directory for its
// state it makes.
func (c *Config) PluginEnv(cfg BackendConfig) ([]string, error) {
	if cfg.Path != "" {
		if err := os.MkdirAll(c.PluginState(cfg.Name), stateMode); err != nil {
			return nil, fmt.Errorf("the plugin's directory for its state: %w", err)
		}
	}
	return c.PluginVariables(cfg)
}

// PluginVariables are what PluginEnv returns. systemd's credentials are passed on: they
// are how a plugin is given its own secrets. So is GODEBUG: a FIPS 140-3 mode is for the
// agent as a whole (see pluginDebug).
func (c *Config) PluginVariables(cfg BackendConfig) ([]string, error) {
	env := make([]string, 0, len(cfg.Env)+len(cfg.EnvFromFiles)+3)
	if cfg.Path != "" {
		env = append(env, plugins.StateVariable+"="+c.PluginState(cfg.Name))
	}
	if value, ok := os.LookupEnv("CREDENTIALS_DIRECTORY"); ok {
		env = append(env, "CREDENTIALS_DIRECTORY="+value)
	}
	env = append(env, "GODEBUG="+pluginDebug(os.Getenv("GODEBUG")))
	for _, name := range slices.Sorted(maps.Keys(cfg.Env)) {
		env = append(env, name+"="+cfg.Env[name])
	}
	for _, name := range slices.Sorted(maps.Keys(cfg.EnvFromFiles)) {
		value, err := os.ReadFile(cfg.EnvFromFiles[name])
		if err != nil {
			return nil, fmt.Errorf("environment variable %s: %w", name, err)
		}
		env = append(env, name+"="+strings.TrimRight(string(value), "\n"))
	}
	return env, nil
}

// nextBackends returns the backends that a configuration asks for: those that
// run already unchanged, and new ones. On an error nothing new is left running.
// It requires a.reloading.
func (a *Agent) nextBackends(ctx context.Context, cfg *Config) (map[string]*backend, error) {
	next, started := map[string]*backend{}, []*backend{}
	fail := func(err error) (map[string]*backend, error) {
		for _, b := range started {
			b.cancel()
		}
		for _, b := range started {
			b.stop()
		}
		return nil, err
	}
	for _, c := range cfg.Backends {
		if running := a.unchanged(c); running != nil {
			next[c.Name] = running
			continue
		}
		env, err := cfg.PluginEnv(c)
		if err != nil {
			return fail(fmt.Errorf("backend %q: %w", c.Name, err))
		}
		b, err := a.startBackend(c, env)
		if err != nil {
			return fail(err)
		}
		b.takesUp(a.backends[c.Name])
		started = append(started, b)
		next[c.Name] = b
	}
	for _, b := range started {
		if !a.takesOver(cfg, b.cfg.Name) {
			continue
		}
		// They start at the same time, so that the sum is what the slowest takes.
		ready, cancel := context.WithTimeout(ctx, b.cfg.StartTimeout)
		err := b.supervisor.Ready(ready)
		cancel()
		if err != nil {
			return fail(fmt.Errorf("backend %q does not start with its new configuration; what it was to replace goes on: %w", b.cfg.Name, err))
		}
	}
	return next, nil
}

// unchanged returns the running backend that is as c wants it; nil is none. The
// content of the files that its environment comes from counts, once it can be read.
func (a *Agent) unchanged(c BackendConfig) *backend {
	running := a.backends[c.Name]
	if running == nil || !reflect.DeepEqual(running.cfg, c) {
		return nil
	}
	env, err := a.cfg.PluginEnv(c)
	if err != nil {
		a.logger.Warn("backend goes on with the environment it has", zap.String("backend", c.Name), zap.Error(err))
		return running
	}
	if !slices.Equal(env, running.env) {
		return nil
	}
	return running
}

// takesOver tells whether a backend of the next configuration takes the place
// of one that runs, by its name or for one of its keys. Such a one must work
// first. What does not run is replaced at once: there is nothing to lose, and
// the rest of the configuration, a permission taken away, must not wait for it.
func (a *Agent) takesOver(next *Config, name string) bool {
	if a.backends[name].runs() {
		return true
	}
	before := map[string][]WrapConfig{}
	for _, k := range a.cfg.Keys {
		before[k.Name] = k.wraps()
	}
	return slices.ContainsFunc(next.Keys, func(k KeyConfig) bool {
		return k.in(name) && slices.ContainsFunc(append([]string{k.Name}, k.FormerNames...), func(key string) bool {
			return slices.ContainsFunc(before[key], func(w WrapConfig) bool { return a.backends[w.Backend].runs() })
		})
	})
}

// runs tells whether there is a process that serves calls; nil does not.
func (b *backend) runs() bool {
	if b == nil {
		return false
	}
	state := b.supervisor.Status().State
	return state == host.Up || state == host.Degraded
}

// stopBackends ends every plugin process.
func (a *Agent) stopBackends() {
	a.reloading.Lock()
	defer a.reloading.Unlock()
	for _, b := range a.backends {
		b.cancel()
	}
	for _, b := range a.backends {
		<-b.done
	}
}
