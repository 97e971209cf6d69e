package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/agent"
	"github.com/kms-agent/kms-agent/agent/audit"
)

func newRunCommand(a *app) *cobra.Command {
	var path string
	c := &cobra.Command{
		Use:   "run",
		Short: "Run the agent",
		Long: `Runs the agent until SIGTERM or SIGINT, then drains: calls under way are answered
first. SIGHUP, or a change of its files, makes it read its configuration again.

It takes part in systemd's Type=notify-reload. Exit code 5 means that the
configuration is not valid: RestartPreventExitStatus=5 2.`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error { return a.runAgent(c.Context(), path) },
	}
	c.Flags().StringVar(&path, "config", defaultConfigPath, "the configuration file")
	return c
}

// harden keeps what is in this process's memory inside it.
func harden() error {
	unix.Umask(0o077)
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("turn core dumps off: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid others to trace this process: %w", err)
	}
	return nil
}

// gcPercent trades memory for speed: requests make garbage, and the heap
// that lives is small. GOGC in the environment overrides it.
const gcPercent = 400

func tuneGarbageCollection() {
	if _, ok := os.LookupEnv("GOGC"); !ok {
		debug.SetGCPercent(gcPercent)
	}
}

func newLogger(c agent.LogConfig, to *os.File) (*zap.Logger, zap.AtomicLevel, error) {
	level, err := zap.ParseAtomicLevel(string(c.Level))
	if err != nil {
		return nil, level, err
	}
	encoding := zap.NewProductionEncoderConfig()
	encoding.EncodeTime, encoding.TimeKey = zapcore.RFC3339NanoTimeEncoder, "time"
	encoder := zapcore.NewJSONEncoder(encoding)
	if c.Format == agent.LogConsole {
		encoding.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(encoding)
	}
	return zap.New(zapcore.NewCore(encoder, zapcore.Lock(to), level)), level, nil
}

func (a *app) runAgent(ctx context.Context, path string) error {
	if err := harden(); err != nil {
		return err
	}
	tuneGarbageCollection()
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	cfg, err := agent.LoadConfig(path)
	if err != nil {
		return err
	}
	logger, level, err := newLogger(cfg.Log, a.errOut)
	if err != nil {
		return err
	}
	instance, err := agent.New(cfg, path, logger)
	if err != nil {
		return checkHint(err, path)
	}
	instance.UseLevel(level)
	instance.UseDescriptors(agent.InheritedDescriptors())
	s := &supervised{logger: logger}
	instance.OnReady(func() { s.notify(daemon.SdNotifyReady) })
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error {
		// The agent ends first, whatever it returns; then so do the others.
		return errors.Join(instance.Run(groupCtx), errEnded)
	})
	group.Go(func() error { return s.reloads(groupCtx, instance) })
	group.Go(func() error { return s.watchdog(groupCtx) })
	group.Go(func() error {
		<-groupCtx.Done()
		s.notify(daemon.SdNotifyStopping)
		return nil
	})
	return checkHint(withoutEnd(group.Wait()), path)
}

// checkHint says how to learn what keeps the agent from running: another one, or all that
// is missing.
func checkHint(err error, config string) error {
	if err == nil {
		return nil
	}
	f := classify(err)
	switch {
	case errors.Is(err, audit.ErrInUse):
		f.hint = "does an agent run already? kms-agent status --config " + config + " asks it"
	case f.hint == "":
		f.hint = "kms-agent check " + config + " tells, as this user, all that is missing on this host"
	}
	return &codedError{code: f.code, hint: f.hint, err: err}
}

// errEnded ends the errgroup when the agent has ended without an error.
var errEnded = errors.New("agent ended")

// withoutEnd removes errEnded from a joined error.
func withoutEnd(err error) error {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return err
	}
	var rest []error
	for _, e := range joined.Unwrap() {
		if e != errEnded { //nolint:errorlint // exactly this value marks the end
			rest = append(rest, e)
		}
	}
	return errors.Join(rest...)
}

// supervised talks to systemd, where that started the process.
type supervised struct{ logger *zap.Logger }

func (s *supervised) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		s.logger.Warn("systemd could not be told the state", zap.Error(err))
	}
}

// reloads reads the configuration again at each SIGHUP. What is wrong with it
// the agent logs and shows; the agent goes on with what it has.
func (s *supervised) reloads(ctx context.Context, instance *agent.Agent) error {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, unix.SIGHUP)
	defer signal.Stop(hangups)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hangups:
			var now unix.Timespec
			if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
				return fmt.Errorf("read the monotonic clock: %w", err)
			}
			s.notify(fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, now.Nano()/1000))
			_, _ = instance.Reload(ctx)
			s.notify(daemon.SdNotifyReady)
		}
	}
}

// watchdog tells systemd that the process lives, where it wants to know.
func (s *supervised) watchdog(ctx context.Context) error {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil || interval == 0 {
		return err
	}
	ticker := time.NewTicker(interval / 3)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			s.notify(daemon.SdNotifyWatchdog)
		}
	}
}
