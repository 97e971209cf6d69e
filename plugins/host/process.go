package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	plugin "github.com/hashicorp/go-plugin"
	pluginrunner "github.com/hashicorp/go-plugin/runner"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/kms-agent/kms-agent/plugins"
)

const (
	// stopTimeout is how long a process may take to end when asked to.
	stopTimeout = 2 * time.Second
	// maxCause bounds the text of why a plugin did not start: the plugin may
	// have written it.
	maxCause = 512
	// handshakeSlack keeps go-plugin's own timeout out of the way of ours.
	handshakeSlack = 10 * time.Second
)

// process is one running plugin.
type process struct {
	remote *plugins.Remote
	info   plugins.Info
	outcomes
	// serving counts the calls in flight. It grows under Supervisor.mu, while the
	// process is the current one.
	serving sync.WaitGroup

	client *plugin.Client
	runner *runner
	relays []*relay // that go-plugin writes to
	dir    *socketDir
	// nextMove is when it may be replaced for want of a socket; Run's own.
	nextMove time.Time
	// worked: it has wrapped or unwrapped, in good time.
	worked atomic.Bool
	// confined: the plugin reaches only what its configuration names.
	confined bool
}

// launch starts a plugin and opens it.
func launch(ctx context.Context, cfg Config, program *program) (*process, error) {
	ctx, cancel := context.WithTimeout(ctx, cfg.StartTimeout)
	defer cancel()
	p := &process{outcomes: newOutcomes()}
	err := p.start(ctx, cfg, program)
	if err == nil {
		err = p.open(ctx, cfg)
	}
	if err == nil {
		return p, nil
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("not ready within %s: %w", cfg.StartTimeout, err)
	}
	return nil, errors.Join(p.withEnd(err), p.stop(false))
}

// start executes the program and waits for its handshake.
func (p *process) start(ctx context.Context, cfg Config, program *program) error {
	dir, err := newSocketDir(cfg.RuntimeDir)
	if err != nil {
		return err
	}
	p.dir = dir
	path, err := program.path()
	if err != nil {
		return fmt.Errorf("%w: %w", errProgram, err)
	}
	rules, err := newRuleset(cfg, path, dir.path)
	if err != nil {
		return err
	}
	defer func() { _ = rules.close() }()
	p.confined = rules != nil
	cmd := command(cfg, path)
	if err := handOver(cmd, cfg.Descriptors); err != nil {
		return err
	}
	defer closeAll(cmd.ExtraFiles) // the process has its own by then
	p.runner = newRunner(cmd, dir.path, rules, cfg.Logger)
	p.client = plugin.NewClient(p.clientConfig(cfg))
	defer context.AfterFunc(ctx, p.runner.kill)()
	return p.connect(cfg.StatsHandler != nil)
}

func (p *process) clientConfig(cfg Config) *plugin.ClientConfig {
	stdout := newRelay(cfg.Logger, "stdout", zapcore.ErrorLevel)
	stderr := newRelay(cfg.Logger, "stderr", zapcore.ErrorLevel)
	own := newRelay(cfg.Logger, "go-plugin", zapcore.DebugLevel)
	p.relays = []*relay{stdout, stderr, own}
	options := []grpc.DialOption{grpc.WithDefaultCallOptions(
		grpc.MaxCallRecvMsgSize(plugins.MaxMessageSize), grpc.MaxCallSendMsgSize(plugins.MaxMessageSize))}
	if cfg.StatsHandler != nil {
		options = append(options, grpc.WithStatsHandler(cfg.StatsHandler))
	}
	return &plugin.ClientConfig{
		HandshakeConfig: plugins.Handshake(), VersionedPlugins: plugins.Sets(nil),
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC}, AutoMTLS: true, SkipHostEnv: true,
		StartTimeout: cfg.StartTimeout + handshakeSlack, UnixSocketConfig: &plugin.UnixSocketConfig{TempDir: p.dir.path},
		RunnerFunc: p.prepare, Logger: quietLogger(cfg.Logger, own), SyncStdout: stdout, SyncStderr: stderr,
		GRPCDialOptions: options,
	}
}

// prepare adds the environment of the handshake to that of the plugin.
func (p *process) prepare(_ hclog.Logger, handshake *exec.Cmd, _ string) (pluginrunner.Runner, error) {
	p.runner.cmd.Env = slices.Concat(p.runner.cmd.Env, handshake.Env, []string{plugin.EnvUnixSocketDir + "=" + p.dir.path})
	return p.runner, nil
}

func (p *process) connect(alone bool) error {
	if _, err := p.client.Start(); err != nil {
		return fmt.Errorf("start the plugin: %s", plugins.Printable(err.Error(), maxCause))
	}
	protocol, err := p.client.Client()
	if err != nil {
		return fmt.Errorf("connect to the plugin: %s", plugins.Printable(err.Error(), maxCause))
	}
	raw, err := protocol.Dispense(plugins.PluginName)
	if err != nil {
		return fmt.Errorf("connect to the plugin: %s", plugins.Printable(err.Error(), maxCause))
	}
	remote, ok := raw.(*plugins.Remote)
	if !ok {
		return fmt.Errorf("connect to the plugin: unexpected %T", raw)
	}
	if alone { // somebody looks at RPCs
		remote.Alone()
	}
	p.remote = remote
	return nil
}

// withEnd adds to the fault of a start how the process ended, if it did.
func (p *process) withEnd(fault error) error {
	if p.runner == nil || p.runner.processID() == 0 {
		return fault
	}
	select {
	case <-p.runner.ended:
		return fmt.Errorf("%w (the process ended: %w)", fault, p.runner.end())
	case <-time.After(pipeDelay):
		return fault // it runs, it only does the wrong things
	}
}

func (p *process) open(ctx context.Context, cfg Config) error {
	info, err := p.remote.Open(ctx, cfg.Settings)
	if err != nil && p.confined && strings.Contains(err.Error(), unix.EACCES.Error()) {
		return fmt.Errorf("open the backend: %w (the plugin reaches only what access names in the configuration of its backend)", err)
	}
	if err != nil {
		return fmt.Errorf("open the backend: %w", err)
	}
	if cfg.FIPS140 && info.FIPS140 == plugins.NoFIPS140 {
		return fmt.Errorf("the plugin %s %s runs without a FIPS 140-3 module while the agent runs with one: use a build of the plugin with GOFIPS140=certified, or the agent's ordinary build",
			info.Name, info.Version)
	}
	p.info = info
	ctx, cancel := context.WithTimeout(ctx, cfg.CallTimeout)
	defer cancel()
	if _, err = p.remote.Check(ctx); plugins.ClassOf(err) == plugins.Internal {
		return fmt.Errorf("first check of the backend: %w", err)
	}
	p.noteCheck(err, false) // an upstream that is away, or refuses, is no fault of the process
	return nil
}

// gone tells whether the process has ended.
func (p *process) gone() bool {
	select {
	case <-p.runner.ended:
		return true
	default:
		return false
	}
}

// idle returns a channel that is closed once the process serves no call. It must
// not be the current one any more.
func (p *process) idle() <-chan struct{} {
	idle := make(chan struct{})
	go func() {
		defer close(idle)
		p.serving.Wait()
	}()
	return idle
}

// stop ends the process, with grace where asked, and removes what it leaves.
func (p *process) stop(grace bool) error {
	if p.runner != nil {
		p.end(grace)
	}
	for _, r := range p.relays {
		_ = r.Close()
	}
	if p.dir == nil {
		return nil
	}
	return p.dir.remove()
}

// end returns when the process is gone. go-plugin's Kill asks the process
// without a deadline, so the deadline is here.
func (p *process) end(grace bool) {
	if !grace {
		p.runner.kill()
	}
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		p.client.Kill()
	}()
	select {
	case <-killed:
	case <-time.After(stopTimeout):
	}
	p.runner.kill()
	<-killed
	if p.runner.processID() != 0 {
		<-p.runner.ended
	}
}

func command(cfg Config, path string) *exec.Cmd {
	name := cfg.Command
	if cfg.Self {
		name = os.Args[0]
	}
	return &exec.Cmd{
		Path: path, Args: append([]string{name}, cfg.Args...), Env: slices.Clone(cfg.Env), Dir: "/",
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true},
	}
}

// quietLogger is go-plugin's: what it has to say matters only to those who look
// for faults in it.
func quietLogger(logger *zap.Logger, out *relay) hclog.Logger {
	if !logger.Core().Enabled(zapcore.DebugLevel) {
		return hclog.NewNullLogger()
	}
	return hclog.New(&hclog.LoggerOptions{Level: hclog.Debug, Output: out, JSONFormat: true})
}
