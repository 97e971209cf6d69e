package host

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc/stats"
)

// Defaults of Config.
const (
	DefaultStartTimeout  = 30 * time.Second
	DefaultCallTimeout   = 10 * time.Second
	DefaultPingInterval  = 5 * time.Second
	DefaultMaxConcurrent = 64
	DefaultBackoffMin    = time.Second
	DefaultBackoffMax    = time.Minute
)

const (
	// maxRuntimeDir leaves room in a socket's address, 107 bytes, for a private
	// directory and the socket's name in it.
	maxRuntimeDir = 70
	// maxSettings bounds Settings; they cross in one message.
	maxSettings = 512 << 10
)

// Call is one call to a backend that ended.
type Call struct {
	// Method is "wrap", "unwrap", "describe" or "check".
	Method string
	// Err is how it ended: nil, an error of a class, or that of its caller's
	// context.
	Err error
	// Caller is who the call was made for (plugins.WithCaller).
	Caller string
	// Made is false where the backend was spared the call (plugins.ErrBreakerOpen,
	// plugins.ErrThrottled).
	Made bool
	// Took is the whole time: the wait for the call's turn and its repeat too.
	Took time.Duration
}

// Config says how one plugin is run. Only Name, RuntimeDir, Logger and either
// Self or Command with SHA256 are required.
type Config struct {
	// Name is the backend's name in the agent's configuration; for logs.
	Name string
	// Command is the absolute path of the plugin's program and Args what follows
	// it. Only native programs can be executed from what was checked: no scripts.
	Command string
	Args    []string
	// Env is the plugin's whole environment, beside what the handshake needs.
	Env []string
	// Descriptors are handed to the plugin under their names (plugins.Descriptor). It
	// inherits no others. They stay the caller's, who keeps them open while the plugin
	// may be started.
	Descriptors []*os.File
	// SHA256 is the program's digest, 64 hexadecimal digits.
	SHA256 string
	// Self runs this very program again, with Args; Command and SHA256 are empty.
	Self bool
	// Settings are given to the backend's Open, as they are.
	Settings json.RawMessage
	// RuntimeDir holds the private directory of the plugin's socket. It is made
	// where it is missing. Its path is at most 70 bytes long.
	RuntimeDir string
	// StartTimeout bounds a start from the execution to the end of the first
	// Check, CallTimeout each call with its time in the queue and its retry.
	StartTimeout, CallTimeout time.Duration
	// PingInterval is how often the process is asked whether it answers at all,
	// and how long it may take to.
	PingInterval time.Duration
	// MaxConcurrent is how many calls the plugin gets at a time; others queue.
	MaxConcurrent int
	// Breaker says when the plugin gets no calls for a while.
	Breaker Breaker
	// Confine says whether the plugin is kept to Access.
	Confine Confinement
	Access  Access
	// FIPS140 refuses a plugin that runs without a FIPS 140-3 module, by its own
	// word.
	FIPS140 bool
	// BackoffMin and BackoffMax bound the wait before a replacement is started.
	BackoffMin, BackoffMax time.Duration
	Logger                 *zap.Logger
	// OnCall is told of every call that ended. It must not block. Optional.
	OnCall func(Call)
	// StatsHandler sees every RPC to the plugin, for traces. Optional.
	StatsHandler stats.Handler
	// OnState is told every change of state, in order, without locks held. It
	// must return soon. Optional.
	OnState func(Status)
}

// withDefaults returns cfg with defaults, or every fault at once.
func (cfg Config) withDefaults() (Config, error) {
	orDefault(&cfg.StartTimeout, DefaultStartTimeout)
	orDefault(&cfg.CallTimeout, DefaultCallTimeout)
	orDefault(&cfg.PingInterval, DefaultPingInterval)
	orDefault(&cfg.MaxConcurrent, DefaultMaxConcurrent)
	orDefault(&cfg.BackoffMin, DefaultBackoffMin)
	orDefault(&cfg.BackoffMax, DefaultBackoffMax)
	cfg.Breaker = cfg.Breaker.withDefaults(cfg.CallTimeout)
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	return cfg, errors.Join(cfg.checkProgram(), cfg.checkRest())
}

func (cfg Config) checkProgram() error {
	if cfg.Self {
		if cfg.Command != "" || cfg.SHA256 != "" {
			return errors.New("a plugin inside this program has neither a command nor a SHA-256 of its own")
		}
		return nil
	}
	var errs []error
	if !filepath.IsAbs(cfg.Command) {
		errs = append(errs, fmt.Errorf("the command %q is not an absolute path", cfg.Command))
	}
	if sum, err := hex.DecodeString(cfg.SHA256); err != nil || len(sum) != 32 {
		errs = append(errs, fmt.Errorf("the SHA-256 %q is not 64 hexadecimal digits: take them from `sha256sum %s`", cfg.SHA256, cfg.Command))
	}
	return errors.Join(errs...)
}

func (cfg Config) checkRest() error {
	var errs []error
	if cfg.Name == "" {
		errs = append(errs, errors.New("the plugin has no name"))
	}
	if !filepath.IsAbs(cfg.RuntimeDir) || len(cfg.RuntimeDir) > maxRuntimeDir {
		errs = append(errs, fmt.Errorf("the runtime directory %q is not an absolute path of at most %d bytes, which sockets need",
			cfg.RuntimeDir, maxRuntimeDir))
	}
	if len(cfg.Descriptors) > MaxDescriptors {
		errs = append(errs, fmt.Errorf("%d descriptors, %d are possible", len(cfg.Descriptors), MaxDescriptors))
	}
	if len(cfg.Settings) > maxSettings {
		errs = append(errs, fmt.Errorf("the settings are %d bytes long, %d are possible", len(cfg.Settings), maxSettings))
	}
	if cfg.StartTimeout < 0 || cfg.CallTimeout < 0 || cfg.PingInterval < 0 || cfg.MaxConcurrent < 0 {
		errs = append(errs, errors.New("timeouts, intervals and the number of calls at a time must be positive"))
	}
	errs = append(errs, cfg.Breaker.check())
	switch cfg.Confine {
	case ConfineWhereKnown, ConfineAlways, ConfineNever:
	default:
		errs = append(errs, fmt.Errorf("the confinement %q is not known", cfg.Confine))
	}
	if cfg.BackoffMin < 0 || cfg.BackoffMax < cfg.BackoffMin {
		errs = append(errs, fmt.Errorf("the backoff of %s to %s is no range", cfg.BackoffMin, cfg.BackoffMax))
	}
	return errors.Join(errs...)
}

func orDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}
