package host_test

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	plugin "github.com/hashicorp/go-plugin"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	pluginv1 "github.com/kms-agent/kms-agent/api/plugin/v1"
	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/host"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

// What go-plugin, or a plugin that is written without plugins.Serve, does to its
// host; docs/testing.md lists these and the other tests of them.

func TestTheListedTestsExist(t *testing.T) {
	page, err := os.ReadFile("../../docs/testing.md")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var tests strings.Builder
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		tests.Write(text)
	}
	names := regexp.MustCompile("`(Test[A-Za-z0-9]+)`").FindAllStringSubmatch(string(page), -1)
	for _, name := range names {
		if !strings.Contains(tests.String(), "func "+name[1]+"(") {
			t.Errorf("docs/testing.md lists %s, which there is not", name[1])
		}
	}
	if len(names) < 20 {
		t.Errorf("docs/testing.md lists %d tests", len(names))
	}
}

// huge is a plugin that knows no limits.
type huge struct {
	plugin.NetRPCUnsupportedPlugin
	pluginv1.UnimplementedBackendServer
}

func serveHugeAnswers() {
	sets := map[int]plugin.PluginSet{}
	for version := range plugins.Sets(nil) {
		sets[version] = plugin.PluginSet{plugins.PluginName: &huge{}}
	}
	plugin.Serve(&plugin.ServeConfig{HandshakeConfig: plugins.Handshake(), VersionedPlugins: sets, GRPCServer: plugin.DefaultGRPCServer})
}

func (h *huge) GRPCServer(_ *plugin.GRPCBroker, s *grpc.Server) error {
	pluginv1.RegisterBackendServer(s, h)
	return nil
}

func (*huge) GRPCClient(context.Context, *plugin.GRPCBroker, *grpc.ClientConn) (any, error) {
	return nil, errors.New("a plugin only")
}

func (*huge) Open(context.Context, *pluginv1.OpenRequest) (*pluginv1.OpenResponse, error) {
	key, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	return &pluginv1.OpenResponse{Name: "huge", Version: "1", Fips140: plugins.NoFIPS140, PluginPublicKey: key.PublicKey().Bytes()}, nil
}

func (*huge) Check(context.Context, *pluginv1.CheckRequest) (*pluginv1.CheckResponse, error) {
	return &pluginv1.CheckResponse{}, nil
}

func (*huge) Describe(context.Context, *pluginv1.DescribeRequest) (*pluginv1.DescribeResponse, error) {
	return &pluginv1.DescribeResponse{CurrentVersion: strings.Repeat("x", 2*plugins.MaxMessageSize)}, nil
}

// go-plugin lets messages of 2 GiB through.
func TestAnswersAreBounded(t *testing.T) {
	s := plugintest.Start(t, modeConfig(t, "huge-answers"))
	_, err := s.Describe(bounded(t), "x")
	if plugins.ClassOf(err) != plugins.Internal || !strings.Contains(err.Error(), "larger than max") {
		t.Errorf("an answer of twice the bound: %v, want Internal", err)
	}
}

// sockets are those of plugins in the runtime directory.
func sockets(t *testing.T, cfg host.Config) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(cfg.RuntimeDir, "plugin-*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(found, func(path string) bool {
		info, err := os.Lstat(path)
		return err != nil || info.Mode().Type() != os.ModeSocket
	})
}

// theSocket returns the plugin's socket and its private directory.
func theSocket(t *testing.T, cfg host.Config) (socket, dir string) {
	t.Helper()
	found := sockets(t, cfg)
	if len(found) != 1 {
		t.Fatalf("sockets in the runtime directory: %v, want one", found)
	}
	return found[0], filepath.Dir(found[0])
}

// The socket lies in a directory of its own, and nowhere that others clear up; and
// whoever gets at it all the same does not get in.
func TestOnlyTheHostReachesThePlugin(t *testing.T) {
	elsewhere := t.TempDir()
	t.Setenv("TMPDIR", elsewhere)
	cfg := config(t, puppetSettings{})
	plugintest.Start(t, cfg)
	socket, dir := theSocket(t, cfg)
	for path, want := range map[string]os.FileMode{dir: os.ModeDir | 0o700, socket: os.ModeSocket | 0o700} {
		info, err := os.Stat(path)
		if err != nil || info.Mode()&(os.ModeType|0o077) != want&(os.ModeType|0o077) {
			t.Errorf("%s: mode %v, %v; want it for its owner alone", path, info.Mode(), err)
		}
	}
	left, err := os.ReadDir(elsewhere)
	for _, entry := range left {
		if !strings.HasPrefix(entry.Name(), "kms") && !strings.HasPrefix(entry.Name(), "Test") {
			t.Errorf("in the directory for temporary files: %s, %v", entry.Name(), err)
		}
	}
	for name, creds := range map[string]credentials.TransportCredentials{
		"plain": insecure.NewCredentials(), "TLS without a certificate": credentials.NewTLS(anyServer()),
	} {
		conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(creds))
		if err != nil {
			t.Fatal(err)
		}
		_, err = pluginv1.NewBackendClient(conn).Check(bounded(t), &pluginv1.CheckRequest{})
		if status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v, want no connection", name, err)
		}
		_ = conn.Close()
	}
}

// The thread that forked a plugin with Pdeathsig must not end: here all others do.
func TestPluginsOutliveThreads(t *testing.T) {
	s := plugintest.Start(t, config(t, puppetSettings{}))
	pid := s.Status().PID
	for range 5 {
		var wg sync.WaitGroup
		var all sync.WaitGroup
		all.Add(30)
		for range 30 {
			wg.Go(func() {
				runtime.LockOSThread() // and never unlocked: the thread ends
				all.Done()
				all.Wait() // so that they are as many threads
			})
		}
		wg.Wait()
	}
	for range 20 {
		if _, err := s.Describe(bounded(t), "memory:orders"); err != nil || s.Status().PID != pid || zombie(pid) {
			t.Fatalf("error %v, process %d, before %d; want the same", err, s.Status().PID, pid)
		}
		time.Sleep(5 * time.Millisecond) // a kill is noticed
	}
}

// SecureConfig works once; here what was checked is what every replacement is, also
// when something else stands in its place since.
func TestReplacementsAreWhatWasChecked(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.Self = false
	cfg.Command, cfg.SHA256 = program(t)
	s := plugintest.Start(t, cfg)
	if err := os.WriteFile(cfg.Command+".new", []byte("#!/bin/false\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(cfg.Command+".new", cfg.Command); err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		pid := s.Status().PID
		if i%2 == 0 {
			_ = unix.Kill(pid, unix.SIGKILL)
		} else if err := s.Replace(bounded(t)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "another process", func() bool { return s.Status().State == host.Up && s.Status().PID != pid })
		if exe, err := order(t, s, "proc exe"); err != nil || !strings.HasPrefix(exe, "/memfd:plugin") {
			t.Errorf("executable: got %q and %v, want what was checked", exe, err)
		}
	}
}

// What ends does so in bounded time, in whatever state the process is: go-plugin
// asks without a deadline, and waits for a start to end.
func TestEndsAreBounded(t *testing.T) {
	for what, c := range map[string]struct {
		cfg     host.Config
		prepare func(*testing.T, *host.Supervisor)
	}{
		"stopped": {config(t, puppetSettings{}), func(_ *testing.T, s *host.Supervisor) { _ = unix.Kill(s.Status().PID, unix.SIGSTOP) }},
		"stuck in Close": {config(t, puppetSettings{Close: "hang"}), func(t *testing.T, s *host.Supervisor) {
			if _, err := s.Describe(bounded(t), "memory:orders"); err != nil {
				t.Error(err)
			}
		}},
		"in a handshake": {modeConfig(t, "half-handshake"), nil},
		"in Open":        {config(t, puppetSettings{Open: "hang"}), nil},
	} {
		t.Run(what, func(t *testing.T) {
			c.cfg.StartTimeout, c.cfg.PingInterval = time.Minute, time.Hour
			s, end := start(t, c.cfg)
			if c.prepare != nil {
				if err := s.Ready(bounded(t)); err != nil {
					t.Fatal(err)
				}
				c.prepare(t, s)
			} else {
				eventually(t, "the process", func() bool { return len(children(t)) > 0 })
			}
			began := time.Now()
			_ = end()
			if took := time.Since(began); took > 8*time.Second {
				t.Errorf("the end took %s", took)
			}
			nothingLeft(t, c.cfg)
		})
	}
}

// children are the processes of this one, as the kernel has them.
func children(t *testing.T) (pids []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil || len(files) == 0 {
		t.Fatalf("children: %v, %v", files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err == nil { // else the thread has ended
			pids = append(pids, strings.Fields(string(text))...)
		}
	}
	return pids
}

func nothingLeft(t *testing.T, cfg host.Config) {
	t.Helper()
	if left := children(t); len(left) != 0 {
		t.Errorf("processes left: %v", left)
	}
	if left, _ := filepath.Glob(filepath.Join(cfg.RuntimeDir, "*")); len(left) != 0 {
		t.Errorf("left in the runtime directory: %v", left)
	}
}

// A process that hangs is replaced on request while calls wait for it, and is gone.
func TestReplaceOfAStoppedProcess(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.PingInterval, cfg.CallTimeout = time.Hour, time.Second
	s := plugintest.Start(t, cfg)
	pid := s.Status().PID
	_ = unix.Kill(pid, unix.SIGSTOP)
	if err := s.Replace(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Describe(bounded(t), "memory:orders"); err != nil {
		t.Errorf("a call of the new process: %v", err)
	}
	eventually(t, "the old process's end", func() bool { return gone(pid) })
	eventually(t, "the end of its directory", func() bool {
		dirs, err := filepath.Glob(filepath.Join(cfg.RuntimeDir, "*"))
		return err == nil && len(dirs) == 1
	})
}

// systemd-tmpfiles and its like clear up what is old, sockets too. No call fails of
// it, and the process is replaced by one that can be reached.
func TestSocketsThatAreClearedUp(t *testing.T) {
	for what, clearUp := range map[string]func(socket, dir string) error{
		"the socket":    func(socket, _ string) error { return os.Remove(socket) },
		"its directory": func(_, dir string) error { return os.RemoveAll(dir) },
		"all of it":     func(_, dir string) error { return os.RemoveAll(filepath.Dir(dir)) },
	} {
		t.Run(what, func(t *testing.T) {
			cfg := config(t, puppetSettings{})
			s := plugintest.Start(t, cfg)
			stop := load(t, s)
			pid := s.Status().PID
			if err := clearUp(theSocket(t, cfg)); err != nil {
				t.Fatal(err)
			}
			eventually(t, "another process", func() bool { return s.Status().PID != pid && gone(pid) })
			if n := stop(); n == 0 {
				t.Error("there was no load")
			}
			theSocket(t, cfg)
			if got := s.Status().Restarts; got != 1 {
				t.Errorf("%d restarts, want 1", got)
			}
		})
	}
}

// load makes calls, none of which may fail, until it is stopped; stop returns how
// many there were.
func load(t *testing.T, s *host.Supervisor) (stop func() int64) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var calls atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				_, err := s.Wrap(ctx, orders, make([]byte, 32), plugins.Binding{Purpose: "message"})
				if err != nil && ctx.Err() == nil {
					t.Errorf("a call failed: %v", err)
					return
				}
				calls.Add(1)
			}
		})
	}
	return sync.OnceValue(func() int64 { cancel(); wg.Wait(); return calls.Load() })
}

// A hundred replacements in a row, some of processes that were killed, leave one
// process, one socket, and nothing else.
func TestAHundredReplacements(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.PingInterval = host.DefaultPingInterval
	s, end := start(t, cfg)
	if err := s.Ready(bounded(t)); err != nil {
		t.Fatal(err)
	}
	fds, goroutines := openFiles(t), runtime.NumGoroutine()
	began := time.Now()
	for i := range 100 {
		if i >= 20 && time.Since(began) > 15*time.Second {
			break // the race detector makes starts many times as slow
		}
		pid := s.Status().PID
		if i%10 == 9 { // in the middle of a replacement, or before it
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		if err := s.Replace(bounded(t)); err != nil {
			t.Fatalf("replacement %d: %v", i, err)
		}
		if _, err := s.Describe(bounded(t), "memory:orders"); err != nil {
			t.Fatalf("after replacement %d: %v", i, err)
		}
	}
	eventually(t, "one process", func() bool { return fmt.Sprint(children(t)) == fmt.Sprintf("[%d]", s.Status().PID) })
	eventually(t, "one socket", func() bool { return len(sockets(t, cfg)) == 1 })
	eventually(t, "no goroutine more than before", func() bool { return runtime.NumGoroutine() <= goroutines })
	eventually(t, "no file more than before", func() bool { return openFiles(t) <= fds })
	if got := s.Status().Breaker; got.Opened != 0 {
		t.Errorf("the breaker opened: %+v", got)
	}
	_ = end()
	nothingLeft(t, cfg)
}

// anyServer trusts whoever it meets: it is the server that shall not.
func anyServer() *tls.Config {
	return &tls.Config{InsecureSkipVerify: true}
}
