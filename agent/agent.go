// Package agent builds a running agent from one configuration and keeps it
// matching that file.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/agent/census"
	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/metrics"
	"github.com/kms-agent/kms-agent/agent/quota"
	"github.com/kms-agent/kms-agent/agent/random"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/identity"
)

// confirmTimeout bounds one confirmation upstream.
const confirmTimeout = 10 * time.Second

// Agent is one agent. New builds it, Run serves until its context ends.
type Agent struct {
	path    string
	logger  *zap.Logger
	started time.Time
	audit   *audit.Log
	quota   *quota.Keeper
	census  *census.Census // nil where its file cannot be read
	random  *random.Pool
	// prewarmed is what is held ready.
	prewarmed prewarmer
	service   *kms.Service
	store     *store           // nil without
	source    *identity.Source // nil without a Workload API
	creds     *identity.Credentials
	metrics   *metrics.Metrics
	tracing   *tracing // nil without
	level     logLevel
	// descriptors are what the service manager handed to this process.
	descriptors Descriptors
	// metricsAddress is where they are read once that is open.
	metricsAddress atomic.Pointer[string]

	// reloading is held while a configuration is put to use, which may take as
	// long as a backend takes to start; it is locked before mu. Only who holds it
	// writes cfg and backends.
	reloading  sync.Mutex
	mu         sync.Mutex // guards what follows
	cfg        *Config
	backends   map[string]*backend
	loaded     time.Time
	generation uint64
	rejected   string
	doors      map[string]*door // that serve, by name
	health     grpc_health_v1.HealthCheckResponse_ServingStatus

	// upper and serving are of the doors; only who holds reloading uses them.
	upper   *errgroup.Group
	serving context.Context //nolint:containedctx // the life of what serves

	// ready is called once when every door is open.
	ready func()
}

// New builds an agent from a configuration that LoadConfig accepted. It opens
// the audit log, and starts nothing. path is the file that cfg came from.
func New(cfg *Config, path string, logger *zap.Logger) (*Agent, error) {
	if err := makeDirectories(cfg); err != nil {
		return nil, fmt.Errorf("directory of the agent: %w", err)
	}
	configured, err := zapcore.ParseLevel(string(cfg.Log.Level))
	if err != nil {
		return nil, fmt.Errorf("log level: %w", err)
	}
	a := &Agent{path: path, logger: logger, cfg: cfg, started: time.Now(), backends: map[string]*backend{}, doors: map[string]*door{}, ready: func() {}, prewarmed: newPrewarmer()}
	a.UseLevel(zap.NewAtomicLevelAt(configured))
	a.metrics = metrics.New(cfg.Metrics.MaxCallers, a.Status)
	if err := a.buildIdentity(cfg); err != nil {
		return nil, err
	}
	log, err := audit.Open(cfg.AuditLog())
	if err != nil {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	a.audit = log
	for _, note := range log.Notes() {
		logger.Warn("audit log opened with a note", zap.String("note", note))
	}
	// The audit log's lock on the state directory keeps another agent out.
	if a.quota, err = quota.Open(cfg.StateDir, bootTime, time.Now); err != nil {
		return nil, errors.Join(err, log.Close())
	}
	if a.census, err = census.Open(cfg.StateDir, time.Now); err != nil {
		logger.Warn("messages are not counted by their wraps", zap.Error(err))
		a.census = nil
	}
	a.random = random.New(a.randomChanged)
	if a.store, err = openStore(cfg, logger); err != nil {
		return nil, errors.Join(err, log.Close())
	}
	a.service, err = kms.New(kms.Options{
		Audit: log, Quota: a.quota, Census: a.census, Random: a.random, MaxEntries: cfg.Cache.MaxEntries, Now: bootTime, ConfirmTimeout: confirmTimeout, Alarm: a.alarm,
		Observe: a.operationEnded, Outage: a.outage, Store: a.store.config(cfg),
	})
	if err != nil {
		a.store.close()
		return nil, errors.Join(err, log.Close())
	}
	if a.tracing, err = newTracing(cfg.Tracing, logger); err != nil {
		a.service.Close()
		a.store.close()
		return nil, errors.Join(err, log.Close())
	}
	return a, nil
}

// Modes of the directories that the agent makes. Callers pass through that of
// the sockets, which have modes of their own, and see nothing of what is in it.
const (
	stateMode   = 0o700
	runtimeMode = 0o711
)

func makeDirectories(cfg *Config) error {
	if err := os.MkdirAll(cfg.StateDir, stateMode); err != nil {
		return err
	}
	if _, err := os.Stat(cfg.RuntimeDir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(cfg.RuntimeDir, runtimeMode); err != nil {
		return err
	}
	return os.Chmod(cfg.RuntimeDir, runtimeMode) // whatever the umask
}

// bootTime is CLOCK_BOOTTIME: it runs on while the host is suspended.
func bootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("CLOCK_BOOTTIME: " + err.Error()) // every Linux since 2.6.39 has it
	}
	return time.Duration(ts.Nano())
}

func (a *Agent) alarm(message string, err error, backend, wrappingKey string) {
	a.logger.Error(message, zap.String("backend", backend), zap.String("wrapping_key", wrappingKey), zap.Error(err))
}

// UseDescriptors sets what backends may be handed. Call it before Run.
func (a *Agent) UseDescriptors(d Descriptors) { a.descriptors = d }

// outage writes one line when an outage begins and one when it is over, with what it
// has cost.
func (a *Agent) outage(o cache.Outage) {
	fields := []zap.Field{
		zap.String("backend", o.Backend), zap.Duration("lasts", o.Lasts.Round(time.Second)),
		zap.Uint64("served_in_grace", o.Grace), zap.Uint64("not_served", o.Refused), zap.Error(o.Err),
	}
	if o.Over {
		a.logger.Info("outage of a backend is over", fields...)
		return
	}
	a.logger.Warn("backend does not answer: keys serve within their grace", fields...)
}

// OnReady sets what is called once, when every door is open. Call it before Run.
func (a *Agent) OnReady(f func()) { a.ready = f }

// Run serves until ctx ends, then drains: doors first, then data keys and their store,
// plugin processes, audit log. It returns nil after an ordered end.
func (a *Agent) Run(ctx context.Context) error {
	below, stopBelow := context.WithCancel(context.WithoutCancel(ctx))
	var lower errgroup.Group
	lower.Go(func() error { return a.service.Run(below) })
	if a.census != nil {
		lower.Go(func() error { return a.census.Run(below) })
	}
	if a.source != nil {
		lower.Go(func() error { return a.source.Run(below) })
	}
	err := a.serve(ctx)
	a.service.Close()
	a.store.close()
	stopBelow()
	a.random.Close()
	a.stopBackends()
	err = errors.Join(err, ignoreEnd(lower.Wait()), a.census.Save(), a.quota.Close(), a.audit.Close())
	a.tracing.close()
	a.level.close()
	a.logger.Info("agent stopped", zap.Error(err))
	return err
}

// configuration returns the one in use.
func (a *Agent) configuration() *Config {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cfg
}

// serve opens the doors and watches the configuration until ctx ends.
func (a *Agent) serve(ctx context.Context) error {
	a.reloading.Lock()
	cfg := a.configuration() // not before: a signal may have had it read again
	err := a.applyLocked(ctx, cfg)
	if err == nil {
		err = a.restore()
	}
	a.reloading.Unlock()
	if err != nil {
		return err
	}
	exporter, err := a.openMetrics(ctx)
	if err != nil {
		return err
	}
	doors, err := a.openDoors(ctx)
	if err != nil {
		if exporter != nil {
			_ = exporter.Close()
		}
		return err
	}
	upper, ctx := errgroup.WithContext(ctx)
	if exporter != nil {
		upper.Go(func() error { return a.serveMetrics(ctx, exporter) })
	}
	a.reloading.Lock() // until the doors serve nobody moves them
	a.upper, a.serving = upper, ctx
	for _, d := range doors {
		a.serveDoor(d)
	}
	a.reloading.Unlock()
	upper.Go(func() error { return a.watch(ctx) })
	upper.Go(func() error { return a.prewarm(ctx) })
	upper.Go(func() error { return a.tellHealth(ctx) })
	a.logger.Info("agent ready", zap.String("config", a.path), zap.String("native", cfg.Listen.Native.Socket),
		zap.Int("keys", len(cfg.Keys)), zap.Int("backends", len(cfg.Backends)))
	a.ready()
	return ignoreEnd(upper.Wait())
}

// ignoreEnd drops the errors that only say that a context ended.
func ignoreEnd(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	return err
}
