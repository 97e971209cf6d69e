package host_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

// modeVariable makes the test binary something else than a test.
const modeVariable = "KMS_AGENT_HOST_TEST"

// modes are processes that are not plugins, or no good ones before the
// handshake, and hosts to be killed.
func modes() map[string]func() {
	never := func() { select {} }
	line := func(format string, a ...any) {
		fmt.Printf(format+"\n", a...)
		time.Sleep(time.Hour) // until the host kills it
	}
	return map[string]func(){
		"exit-0":         func() {},
		"exit-3":         func() { os.Exit(3) },
		"silent":         never,
		"rubbish":        func() { line("rubbish \x1b[31m on stdout") },
		"long-rubbish":   func() { line("%s", strings.Repeat("x", 1<<20)) },
		"half-handshake": func() { fmt.Print("1|1|unix|/tm"); never() },
		"other-core":     func() { line("2|1|unix|/x|grpc|") },
		"other-protocol": func() { line("1|99|unix|/x|grpc|") },
		"net-rpc":        func() { line("1|1|unix|%s/x|netrpc|", os.Getenv("PLUGIN_UNIX_SOCKET_DIR")) },
		"tcp":            func() { line("1|1|tcp|127.0.0.1:1|grpc|") },
		"other-socket":   func() { line("1|1|unix|/run/other.sock|grpc|") },
		"no-socket":      func() { line("1|1|unix|%s/x|grpc|", os.Getenv("PLUGIN_UNIX_SOCKET_DIR")) },
		"mute":           func() { mute(); never() },
		"mute-and-gone":  mute,
		"crash-at-once":  func() { panic("crash") },
		"ignores-term":   func() { signal.Ignore(unix.SIGTERM, unix.SIGINT); never() },
		"host":           runHost,
		"by-hand":        serveByHand,
		"huge-answers":   serveHugeAnswers,
	}
}

// mute ends when somebody has connected to its socket, and says nothing there.
func mute() {
	path := filepath.Join(os.Getenv("PLUGIN_UNIX_SOCKET_DIR"), "mute")
	l, err := net.Listen("unix", path)
	if err != nil {
		panic(err)
	}
	fmt.Printf("1|1|unix|%s|grpc|\n", path)
	if _, err := l.Accept(); err != nil {
		panic(err)
	}
}

func TestMain(m *testing.M) {
	if mode, ok := modes()[os.Getenv(modeVariable)]; ok {
		mode()
		return
	}
	plugintest.ServeIfChild(map[string]func() plugins.Backend{"puppet": func() plugins.Backend { return &puppet{} }})
	goleak.VerifyTestMain(m)
}

// puppet is a backend that does what the URI of a Describe says, and that opens
// as its settings say.
type puppet struct {
	plugintest.Memory

	weather string // a file, from Open
	stuck   bool   // in Close, from Open

	mu       sync.Mutex
	down     bool // mu guards down: Check and "state" are Unavailable
	attempts int
}

type puppetSettings struct {
	plugintest.MemorySettings

	Open  string `json:"open"`
	Check string `json:"check"`
	Close string `json:"close"`
	// Weather is the file that says how upstream is, for Check.
	Weather string `json:"weather"`
}

func (p *puppet) Open(ctx context.Context, config json.RawMessage) (plugins.Info, error) {
	var s puppetSettings
	if err := json.Unmarshal(config, &s); err != nil {
		return plugins.Info{}, err
	}
	p.down, p.weather, p.stuck = s.Check == "unavailable", s.Weather, s.Close == "hang"
	if path, ok := strings.CutPrefix(s.Check, "unavailable if "); ok {
		_, err := os.Stat(path)
		p.down = err == nil
	}
	if _, err := p.obey(ctx, s.Open); err != nil {
		return plugins.Info{}, err
	}
	return p.Memory.Open(ctx, config)
}

func (p *puppet) Check(ctx context.Context) (plugins.Health, error) {
	if p.weather != "" && !strings.HasPrefix(readWeather(p.weather), "lying") {
		return plugins.Health{}, weather(ctx, p.weather)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.down {
		return plugins.Health{}, plugins.Errorf(plugins.Unavailable, "upstream is away")
	}
	return plugins.Health{}, nil
}

func (p *puppet) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	order, ok := strings.CutPrefix(uri, "do:")
	if !ok {
		return p.Memory.Describe(ctx, uri)
	}
	text, err := p.obey(ctx, order)
	return plugins.Description{Current: text, Versions: []plugins.KeyVersion{{Version: text, State: plugins.Enabled}}}, err
}

// Close hangs where it is told to.
func (p *puppet) Close() error {
	if p.stuck {
		select {}
	}
	return p.Memory.Close()
}

func (p *puppet) obey(ctx context.Context, order string) (string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	verb, argument, _ := strings.Cut(order, " ")
	for _, class := range plugins.Classes() {
		if verb == class.String() {
			return "", plugins.Errorf(class, "as ordered")
		}
	}
	switch verb {
	case "ill":
		return "", &plugins.Error{Class: plugins.Unavailable, KeyOnly: true, RetryAfter: time.Hour, Detail: "the key is ill"}
	case "upstream":
		p.mu.Unlock()
		defer p.mu.Lock()
		return "ok", weather(ctx, argument)
	case "up":
		p.down = false
	case "down":
		p.down = true
	case "hang":
		p.mu.Unlock()
		defer p.mu.Lock()
		select {}
	case "wait":
		p.mu.Unlock()
		defer p.mu.Lock()
		<-ctx.Done()
		return "", ctx.Err()
	case "sleep":
		d, _ := time.ParseDuration(argument)
		p.mu.Unlock()
		defer p.mu.Lock()
		time.Sleep(d) // it stands for an upstream's time
	case "exit":
		unix.Exit(7)
	case "panic":
		panic(secretText)
	case "die":
		go panic("outside of a request")
		select {}
	case "read":
		f, err := os.Open(argument)
		if err == nil {
			_ = f.Close()
		}
		return "read", refusal(err)
	case "write":
		return "written", refusal(os.WriteFile(argument, []byte("x"), 0o600))
	case "control": // ENOTTY says that the device was asked
		f, err := os.OpenFile(argument, os.O_RDWR, 0)
		if err != nil {
			return "", refusal(err)
		}
		defer func() { _ = f.Close() }()
		_, err = unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
		if errors.Is(err, unix.ENOTTY) {
			err = nil
		}
		return "controlled", refusal(err)
	case "dial":
		network, address, _ := strings.Cut(argument, " ")
		conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
		if err == nil {
			_ = conn.Close()
		}
		return "connected", refusal(err)
	case "signal":
		pid, _ := strconv.Atoi(argument)
		return "sent", refusal(unix.Kill(pid, 0))
	case "unless": // a file is there
		if _, err := os.Stat(argument); err == nil {
			return "", plugins.Errorf(plugins.Denied, "%s is there", filepath.Base(argument))
		}
	case "second":
		if p.attempts++; p.attempts == 1 {
			return "", plugins.Errorf(plugins.Unavailable, "not at the first time")
		}
	case "env":
		return matching(strings.Join(os.Environ(), "\n"), argument), nil
	case "log":
		fmt.Fprintln(os.Stderr, argument)
	case "raw":
		_, _ = unix.Write(2, []byte(argument+"\n"))
	case "dumpable":
		value, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
		return fmt.Sprint(value), err
	case "proc":
		return p.proc(argument)
	case "descriptor":
		return handed(argument)
	case "files": // that a process which this one starts has open
		out, err := exec.CommandContext(ctx, "/bin/ls", "-l", "/proc/self/fd").Output()
		return fmt.Sprint(strings.Count(string(out), argument)), err
	case "child":
		cmd := exec.Command("/bin/sleep", "1000")
		if err := cmd.Start(); err != nil {
			return "", err
		}
		return fmt.Sprint(cmd.Process.Pid), nil
	}
	return "ok", nil
}

// refusal is an error that does not speak against the process.
func refusal(err error) error {
	if err == nil {
		return nil
	}
	return plugins.Errorf(plugins.Denied, "%v", err)
}

const secretText = "secret argument of a panic"

// matching returns the lines that begin with one of the words, divided by |.
func matching(text, words string) string {
	found := "found:"
	for line := range strings.Lines(text) {
		for word := range strings.SplitSeq(words, "|") {
			if strings.HasPrefix(line, word) {
				found += " " + strings.Join(strings.Fields(line), " ")
			}
		}
	}
	return found
}

// proc returns lines of a file of /proc/self, or where it points.
func (p *puppet) proc(argument string) (string, error) {
	name, words, _ := strings.Cut(argument, " ")
	path := filepath.Join("/proc/self", name)
	if target, err := os.Readlink(path); err == nil {
		return target, nil
	}
	b, err := os.ReadFile(path)
	return matching(string(b), words), err
}

// handed returns what a descriptor of the agent's holds.
func handed(name string) (string, error) {
	f, err := plugins.Descriptor(name)
	if err != nil {
		return "", refusal(err)
	}
	defer func() { _ = f.Close() }()
	content := make([]byte, 100)
	n, err := f.ReadAt(content, 0)
	if n == 0 {
		return "", refusal(err)
	}
	return string(content[:n]), nil
}

// serveByHand is a plugin that somebody starts in a shell.
func serveByHand() {
	if err := plugins.Serve(&puppet{}); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

// runHost supervises a plugin until it is killed. It prints the plugin's
// process ID, the error of a round trip, and the plugin's FIPS 140 module.
func runHost() {
	s, err := host.New(host.Config{
		Name: "puppet", Self: true, Env: strings.Split(os.Getenv("PLUGIN_ENV"), ","), Settings: settings(puppetSettings{}),
		RuntimeDir: os.Getenv("RUNTIME_DIR"), Logger: zap.NewNop(),
	})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	if err := s.Ready(ctx); err != nil {
		fmt.Println(err)
		return
	}
	b := plugins.Binding{Purpose: "message"}
	wrapped, err := s.Wrap(ctx, orders, make([]byte, 32), b)
	if err == nil {
		_, err = s.Unwrap(ctx, orders, wrapped, b)
	}
	fmt.Println(s.Status().PID, err, s.Status().Plugin.FIPS140)
	if err := <-done; !errors.Is(err, context.Canceled) {
		fmt.Println(err)
	}
}

var orders = plugins.KeyRef{URI: "memory:orders", Version: "1"}

func settings(s puppetSettings) json.RawMessage {
	s.Keys = map[string]int{"memory:orders": 1, "memory:other": 1}
	b, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return b
}

// config is that of a puppet, with short times.
func config(t testing.TB, s puppetSettings) host.Config {
	t.Helper()
	cfg := plugintest.Config(t, "puppet", settings(s))
	cfg.BackoffMin, cfg.BackoffMax = 10*time.Millisecond, 40*time.Millisecond
	cfg.PingInterval = 100 * time.Millisecond
	cfg.Logger = zaptest.NewLogger(t, zaptest.Level(zap.InfoLevel))
	return cfg
}

// modeConfig is that of a process which is no plugin.
func modeConfig(t testing.TB, mode string) host.Config {
	t.Helper()
	cfg := config(t, puppetSettings{})
	cfg.Env = []string{modeVariable + "=" + mode}
	return cfg
}

func bounded(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// order makes the puppet do something and returns what it said.
func order(t testing.TB, s *host.Supervisor, what string) (string, error) {
	t.Helper()
	d, err := s.Describe(bounded(t), "do:"+what)
	return d.Current, err
}

// eventually waits for something that other processes bring about.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if is() {
			return
		}
	}
	t.Fatalf("waited in vain for: %s", what)
}

func gone(pid int) bool { return errors.Is(unix.Kill(pid, 0), syscall.ESRCH) }

// start runs a supervisor that need not come up, and returns how to end it.
func start(t testing.TB, cfg host.Config) (s *host.Supervisor, end func() error) {
	t.Helper()
	s, err := host.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	end = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() { _ = end() })
	return s, end
}
