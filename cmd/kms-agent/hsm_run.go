package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/kms-agent/kms-agent/agent"
)

const (
	// maxHSMAnswer bounds what is read of the plugin's answer.
	maxHSMAnswer = 64 << 20
	// hsmGrace is how long a plugin that is told to end may take to bring a change to its
	// end: longer than a call of the library takes, unless it hangs.
	hsmGrace = 15 * time.Second
	// hsmWaiting and hsmWarning begin the lines of the plugin's standard error that the
	// operator sees.
	hsmWaiting = "waiting for the token: "
	hsmWarning = "warning: "
)

// askToken has the backend's plugin do what is asked.
func (a *app) askToken(c *cobra.Command, f *hsmFlags, r hsmRequest) (hsmAnswer, error) {
	if err := f.consistent(c); err != nil {
		return hsmAnswer{}, err
	}
	ctx := c.Context()
	cmd, settings, err := f.command(ctx)
	if err != nil {
		return hsmAnswer{}, err
	}
	defer closeFiles(cmd.ExtraFiles)
	r.Settings, r.RetryPIN, r.ByFlags = settings, f.retryPIN, f.module != ""
	in, err := json.Marshal(r)
	if err != nil {
		return hsmAnswer{}, err
	}
	var out, diagnostics bytes.Buffer
	cmd.Stdin, cmd.Stdout = bytes.NewReader(in), &limitedWriter{w: &out, left: maxHSMAnswer}
	cmd.Stderr = &linesForOperator{to: a.errOut, rest: &limitedWriter{w: &diagnostics, left: 1 << 20}}
	failed := runUntilDone(cmd)
	var answer hsmAnswer
	if err := json.Unmarshal(out.Bytes(), &answer); err != nil {
		if ctx.Err() != nil && cmd.ProcessState != nil {
			_, _ = fmt.Fprintln(a.errOut, "the change may have been made: kms-agent hsm list shows what is on the token")
		}
		return answer, pluginUnanswered(cmd, errors.Join(failed, err), diagnostics.Bytes())
	}
	if answer.Error != "" {
		return answer, &codedError{code: hsmCode(answer.Class), hint: f.hint(c, r, answer.Error), err: errors.New(f.named(answer.Error))}
	}
	if cmd.ProcessState != nil && cmd.ProcessState.Success() {
		return answer, nil // interrupted or not: it is done
	}
	return answer, failed
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// runUntilDone runs the plugin. One that is interrupted brings its change to its end,
// and it does not outlive this process.
func runUntilDone(cmd *exec.Cmd) error {
	runtime.LockOSThread() // the kernel takes the thread for the parent
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = hsmGrace
	return cmd.Run()
}

// hsmCode is the exit code of each class of the plugin's errors.
func hsmCode(class string) exitCode {
	switch class {
	case "unavailable":
		return exitUnavailable
	case "unauthenticated":
		return exitDenied
	case "unconfirmed":
		return exitUsage
	case "invalid", "key not found", "key unusable":
		return exitInvalid
	default:
		return exitFailure
	}
}

// crashSignal finds the signal in what the Go runtime prints of a crash.
var crashSignal = regexp.MustCompile(`(?m)^(?:\[signal )?(SIG[A-Z]+): `)

// pluginUnanswered is what is known of a plugin that ended without an answer. The
// runtime's trace of a crash is of no use to an operator.
func pluginUnanswered(cmd *exec.Cmd, failed error, diagnostics []byte) error {
	const hint = "nothing is known of the change, it may have been made: kms-agent hsm list shows what is on the token"
	if cmd.ProcessState == nil { // it never began
		return fmt.Errorf("the plugin: %w", failed)
	}
	signal := ""
	if m := crashSignal.FindSubmatch(diagnostics); m != nil {
		signal = string(m[1])
	} else if s, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && s.Signaled() && s.Signal() == syscall.SIGKILL {
		return &codedError{code: exitFailure, hint: hint, err: errors.New("the plugin's process was killed: by somebody, by the kernel for want of memory, or because it did not end in time")}
	} else if ok && s.Signaled() {
		signal = s.Signal().String()
	}
	if signal != "" {
		return &codedError{code: exitFailure, hint: hint, err: fmt.Errorf("the vendor's library crashed (%s)", signal)}
	}
	return &codedError{code: exitFailure, hint: hint, err: fmt.Errorf("the plugin %s gave no answer: %w%s", cmd.Args[0], failed, lastLines(diagnostics))}
}

// lastLines are the last of what a plugin printed.
func lastLines(b []byte) string {
	const most = 10
	b = bytes.TrimSpace(b)
	if len(b) == 0 {
		return ""
	}
	lines := strings.Split(string(b), "\n")
	return "\n" + strings.Join(lines[max(0, len(lines)-most):], "\n")
}

// linesForOperator passes on what the operator should know meanwhile, and the rest to rest.
type linesForOperator struct {
	to, rest io.Writer
	line     []byte
}

func (w *linesForOperator) Write(p []byte) (int, error) {
	const longest = 4096
	for _, c := range p {
		w.line = append(w.line, c)
		if c != '\n' && len(w.line) < longest {
			continue
		}
		if bytes.HasPrefix(w.line, []byte(hsmWaiting)) || bytes.HasPrefix(w.line, []byte(hsmWarning)) {
			_, _ = fmt.Fprintln(w.to, printable(string(bytes.TrimSpace(w.line))))
		}
		_, _ = w.rest.Write(w.line)
		w.line = w.line[:0]
	}
	return len(p), nil
}

// limitedWriter forgets what is too much.
type limitedWriter struct {
	w    io.Writer
	left int
}

func (l *limitedWriter) Write(p []byte) (int, error) {
	n := min(len(p), l.left)
	l.left -= n
	if _, err := l.w.Write(p[:n]); err != nil {
		return 0, err
	}
	return len(p), nil
}

// consistent refuses flags that would be without effect: another token is not acted on
// by mistake.
func (f *hsmFlags) consistent(c *cobra.Command) error {
	others, without := []string{"token", "pin-file", "state-dir", "module-config", "plugin"}, "without"
	if f.module != "" {
		others, without = []string{"config", "backend"}, "with"
	}
	for _, name := range others {
		if c.Flags().Changed(name) {
			return usagef("--%s has no meaning %s --module: the token is that of the configuration, or that of the flags", name, without)
		}
	}
	return nil
}

// command is the plugin's program, and the settings that it is given.
func (f *hsmFlags) command(ctx context.Context) (*exec.Cmd, json.RawMessage, error) {
	if f.module != "" {
		return f.commandByFlags(ctx)
	}
	cfg, err := agent.LoadConfig(f.config)
	if errors.Is(err, agent.ErrConfigFile) && errors.Is(err, fs.ErrNotExist) {
		return nil, nil, &codedError{code: exitInvalid, err: err,
			hint: "name the agent's configuration with --config, or the token without one: --module, --token, --pin-file and --state-dir"}
	}
	if err != nil {
		return nil, nil, err
	}
	b, err := f.find(cfg)
	if err != nil {
		return nil, nil, err
	}
	if err := ownState(cfg.StateDir, false); err != nil {
		return nil, nil, err
	}
	env, err := cfg.PluginEnv(*b)
	if err != nil {
		return nil, nil, err
	}
	files, settings, err := f.handed(b)
	if err != nil {
		return nil, nil, err
	}
	cmd, err := verified(ctx, b.Path, b.SHA256)
	if err != nil {
		return nil, nil, err
	}
	cmd.Env = env
	handOver(cmd, files)
	return cmd, settings, nil
}

// ownState makes sure that what is written to the agent's state stays the agent's.
// Where the directory may be missing, it is made: in one of this user, if that is root.
func ownState(dir string, mayBeMissing bool) error {
	info, err := os.Stat(dir)
	for mayBeMissing && errors.Is(err, fs.ErrNotExist) {
		if os.Geteuid() != 0 {
			return nil // the kernel says what it may
		}
		dir = filepath.Dir(dir)
		info, err = os.Stat(dir)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return &codedError{code: exitInvalid, err: fmt.Errorf("%s does not exist", dir),
			hint: "make it for the agent's user, as with install -d -m 0700 -o kms-agent " + dir}
	}
	denied := err
	for errors.Is(err, fs.ErrPermission) && dir != "/" { // whoever has what is above has it
		dir = filepath.Dir(dir)
		info, err = os.Stat(dir)
	}
	if err != nil {
		return err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok || int(owner.Uid) == os.Geteuid() {
		return denied
	}
	hint := fmt.Sprintf("run it as that user: sudo -u '#%d' kms-agent hsm ...", owner.Uid)
	if denied != nil {
		if owner.Uid == 0 {
			hint = "name a directory of the agent's user, in one that this user may pass"
		}
		return &codedError{code: exitDenied, hint: hint, err: fmt.Errorf("%w: %s belongs to uid %d, and the state is to be the agent's user's, as which this command runs", denied, dir, owner.Uid)}
	}
	return &codedError{code: exitUsage, hint: hint, err: fmt.Errorf("%s belongs to uid %d: what is written there must stay the agent's", dir, owner.Uid)}
}

// isHSM tells whether a backend is the one for PKCS#11 tokens.
func isHSM(b *agent.BackendConfig) bool {
	var settings struct {
		Module string `json:"module"`
	}
	return b.Path != "" && json.Unmarshal(b.Settings, &settings) == nil && settings.Module != ""
}

// hsmBackends are the names of the PKCS#11 backends of a configuration.
func hsmBackends(config string) []string {
	cfg, err := agent.LoadConfig(config)
	if err != nil {
		return nil
	}
	var names []string
	for i := range cfg.Backends {
		if isHSM(&cfg.Backends[i]) {
			names = append(names, cfg.Backends[i].Name)
		}
	}
	return names
}

func (f *hsmFlags) find(cfg *agent.Config) (*agent.BackendConfig, error) {
	var found *agent.BackendConfig
	for i := range cfg.Backends {
		b := &cfg.Backends[i]
		mine := isHSM(b)
		if f.backend != "" && b.Name != f.backend || f.backend == "" && !mine {
			continue
		}
		if !mine {
			return nil, usagef("backend %q is no PKCS#11 backend: it has no path, or its settings no module", b.Name)
		}
		if found != nil {
			return nil, usagef("there are several PKCS#11 backends: name one with --backend, such as %s", b.Name)
		}
		found = b
	}
	if found == nil && f.backend != "" {
		return nil, usagef("%s has no backend %q; its PKCS#11 backends are: %s", f.config, f.backend, strings.Join(hsmBackends(f.config), ", "))
	}
	if found == nil {
		return nil, usagef("%s has no PKCS#11 backend; docs/hsm.md shows one, and --module, --token and --pin-file do without", f.config)
	}
	return found, nil
}

func (f *hsmFlags) commandByFlags(ctx context.Context) (*exec.Cmd, json.RawMessage, error) {
	raw, err := f.settings()
	if err != nil {
		return nil, nil, err
	}
	path := f.plugin
	if path == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, nil, err
		}
		path = filepath.Join(filepath.Dir(self), hsmPlugin)
	}
	if path, err = filepath.Abs(path); err != nil {
		return nil, nil, err
	}
	var files []*os.File
	if f.pinFD != noPINFD {
		pin, err := inheritedFD(f.pinFD)
		if err != nil {
			return nil, nil, err
		}
		files = append(files, pin)
	}
	cmd := exec.CommandContext(ctx, path, "administer") //nolint:gosec // the operator names it, or it is beside this program
	cmd.Env = os.Environ()                              // the vendor's library may be configured by it
	handOver(cmd, files)
	return cmd, raw, nil
}

// settings are those that the flags stand for.
func (f *hsmFlags) settings() (json.RawMessage, error) {
	settings := map[string]string{"token": f.token, "module_config": f.moduleConfig}
	paths := map[string]string{"module": f.module, "pin_file": f.pin, "state_dir": f.stateDir}
	if f.pinFD != noPINFD && f.pin == "" {
		delete(paths, "pin_file")
		settings["pin_descriptor"] = pinFD
	}
	for name, path := range paths {
		if path == "" || f.token == "" || f.pinFD != noPINFD && f.pin != "" {
			return nil, usagef("--module, --token, --state-dir and one of --pin-file and --pin-fd belong together")
		}
		absolute, err := filepath.Abs(path)
		if err != nil {
			return nil, err
		}
		settings[name] = absolute
	}
	if err := ownState(settings["state_dir"], true); err != nil {
		return nil, err
	}
	return json.Marshal(settings)
}

// named has the flags in an error that names settings, where these stand for flags.
func (f *hsmFlags) named(text string) string {
	if f.module == "" {
		return text
	}
	return strings.NewReplacer("settings.module_config:", "--module-config:", "settings.module:", "--module:", "settings.token:", "--token:",
		"settings.pin_file:", "--pin-file:", "settings.pin_descriptor:", "--pin-fd:", "settings.state_dir:", "--state-dir:").Replace(text)
}

// verified runs what was compared with its digest, and nothing else.
func verified(ctx context.Context, path, digest string) (*exec.Cmd, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("the plugin: %w", err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, file); err != nil {
		return nil, errors.Join(fmt.Errorf("the plugin: %w", err), file.Close())
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != digest {
		return nil, errors.Join(&codedError{code: exitInvalid, err: fmt.Errorf("the plugin %s has SHA-256 %s, the configuration wants %s", path, got, digest),
			hint: "if it was updated on purpose, put its new digest into the configuration"}, file.Close())
	}
	cmd := exec.CommandContext(ctx, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), file.Fd()), "administer") //nolint:gosec // it was verified
	cmd.Args[0] = path
	cmd.ExtraFiles = []*os.File{file} // stays open until it runs
	return cmd, nil
}
