package chaos

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
	"github.com/kms-agent/kms-agent/identity/issuer"
)

// cluster is a real agent with real plugins: over SoftHSM behind a module that
// misbehaves as it is told, over a token at the other end of a line that can be cut,
// and the built-in one.
type cluster struct {
	t             *testing.T
	dir, bin      string
	agent, plugin string
	tokens        map[string]*hsmtest.SoftHSM // by backend
	fault         *hsmtest.Fault              // before the token of "hsm"
	remote        *hsmtest.Remote             // of "net"

	mu      sync.Mutex // guards what follows
	process *exec.Cmd
	ended   chan error
	log     *os.File
	metrics string
	plugins map[int]bool // every process of a plugin that was seen
	next    int          // of the configuration's directories
}

// newCluster builds and prepares everything, and starts the agent.
func newCluster(t *testing.T) *cluster {
	t.Helper()
	dir, err := os.MkdirTemp("", "chaos") // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	c := &cluster{t: t, dir: dir, bin: filepath.Join(dir, "bin"), tokens: map[string]*hsmtest.SoftHSM{}, plugins: map[int]bool{}}
	c.plugin = c.build("kms-agent-pkcs11", "./plugins/pkcs11", "1")
	if c.agent = os.Getenv("CHAOS_AGENT"); c.agent == "" {
		c.agent = c.build("kms-agent", "./cmd/kms-agent", "0")
	}
	c.tokens["hsm"], c.tokens["net"] = hsmtest.NewSoftHSM(t), hsmtest.NewSoftHSM(t)
	c.fault = hsmtest.NewFault(t, "../../hsm", hsmtest.SoftHSMModule)
	c.remote = hsmtest.NewRemote(t, c.tokens["net"])
	for _, name := range []string{"state", "run", "etc", "ks", "api", "admin-state"} {
		if err := os.Mkdir(c.path(name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if c.log, err = os.Create(c.path("agent.log")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.log.Close() })
	c.makeKeys()
	c.runIssuer()
	c.configure(settings{})
	if err := c.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.kill() })
	return c
}

func (c *cluster) path(name string) string { return filepath.Join(c.dir, name) }

func (c *cluster) build(name, from, cgo string) string {
	c.t.Helper()
	path := filepath.Join(c.bin, name)
	build := exec.CommandContext(c.t.Context(), "go", "build", "-o", path, from)
	build.Dir, build.Env = "../..", append(os.Environ(), "CGO_ENABLED="+cgo)
	if out, err := build.CombinedOutput(); err != nil {
		c.t.Fatalf("%v\n%s", err, out)
	}
	return path
}

// makeKeys makes every key, each where it belongs.
func (c *cluster) makeKeys() {
	c.t.Helper()
	for _, k := range c.setup().Keys {
		for _, o := range k.Objects {
			var err error
			switch o.Backend {
			case "hsm":
				err = c.hsm("hsm", "init-key", o.Name)
			case "net":
				err = c.hsm("net", "init-key", o.Name, "--suite", "rsa-oaep-sha1")
			default:
				err = c.local(o.Name)
			}
			if err != nil {
				c.t.Fatal(err)
			}
		}
	}
}

// local makes a key of the built-in backend, and its keystore with the first one.
func (c *cluster) local(name string) error {
	where := []string{"--keystore", c.path("ks/keystore"), "--key-file", c.path("seal.key")}
	if _, err := os.Stat(c.path("seal.key")); err != nil {
		if err := c.run(append([]string{"keys", "local", "init", "--create-key-file"}, where...)...); err != nil {
			return err
		}
	}
	return c.run(append([]string{"keys", "local", "create", name}, where...)...)
}

// hsm administers a token beside the agent, past every fault.
func (c *cluster) hsm(backend, command string, args ...string) error {
	token := c.tokens[backend]
	args = append([]string{"hsm", command}, args...)
	args = append(args, "--module", hsmtest.SoftHSMModule, "--token", "pkcs11:token="+hsmtest.Label, "--pin-file", token.PINFile()+".admin",
		"--state-dir", c.path("admin-state"), "--plugin", c.plugin)
	if err := os.WriteFile(token.PINFile()+".admin", []byte(hsmtest.PIN+"\n"), 0o600); err != nil {
		return err
	}
	return c.runWith(token.Env(), args...)
}

func (c *cluster) run(args ...string) error { return c.runWith(nil, args...) }

func (c *cluster) runWith(env []string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.agent, args...)
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", args, err, out)
	}
	return nil
}

func (c *cluster) runIssuer() {
	c.t.Helper()
	domain := spiffeid.RequireTrustDomainFromString("example.org")
	sockets := map[string]spiffeid.ID{}
	for _, name := range []string{"agent", "alice", "bob"} {
		sockets[c.path("api/"+name)] = spiffeid.RequireFromPath(domain, "/"+name)
	}
	i, err := issuer.New(issuer.Config{TrustDomain: domain, Sockets: sockets, TTL: 24 * time.Hour})
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- i.Run(ctx) }()
	c.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			c.t.Errorf("issuer: %v", err)
		}
	})
}

// start starts the agent and returns once it serves.
func (c *cluster) start() error {
	cmd := exec.Command(c.agent, "run", "--config", c.path("etc/config.yaml"))
	cmd.Stdout, cmd.Stderr = c.log, c.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	began := make(chan error, 1)
	ended := make(chan error, 1)
	go func() { // the kernel sends the signal when this thread ends, so it waits
		err := cmd.Start()
		if began <- err; err == nil {
			ended <- cmd.Wait()
		}
	}()
	if err := <-began; err != nil {
		return err
	}
	c.mu.Lock()
	c.process, c.ended = cmd, ended
	c.mu.Unlock()
	for deadline := time.Now().Add(40 * time.Second); time.Now().Before(deadline); time.Sleep(30 * time.Millisecond) {
		if s, err := c.status(); err == nil && s.GetIdentity().GetState() == "ready" { // it can show who it is
			return nil
		}
	}
	return errors.New("the agent does not serve after 40 s")
}

// stop ends the agent and wants an ordered end.
func (c *cluster) stop() error { return c.end(syscall.SIGTERM) }

// kill ends it as a crash does.
func (c *cluster) kill() error { return c.end(syscall.SIGKILL) }

func (c *cluster) end(signal syscall.Signal) error {
	c.mu.Lock()
	cmd, ended := c.process, c.ended
	c.process = nil
	c.mu.Unlock()
	if cmd == nil {
		return nil
	}
	if err := cmd.Process.Signal(signal); err != nil {
		return err
	}
	limit := time.AfterFunc(40*time.Second, func() { _ = cmd.Process.Kill() })
	defer limit.Stop()
	if err := <-ended; err != nil && signal != syscall.SIGKILL {
		return fmt.Errorf("the agent's end: %w", err)
	}
	return nil
}

func (c *cluster) administer(do func(context.Context, adminv1.AdminClient) error) error {
	conn, err := grpc.NewClient("unix:"+c.path("admin.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	return do(ctx, adminv1.NewAdminClient(conn))
}

// status asks the agent, and remembers the processes of its plugins.
func (c *cluster) status() (s *adminv1.StatusResponse, err error) {
	err = c.administer(func(ctx context.Context, a adminv1.AdminClient) error {
		s, err = a.Status(ctx, &adminv1.StatusRequest{})
		return err
	})
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range s.GetBackends() {
		if pid := int(b.GetPid()); pid > 0 {
			c.plugins[pid] = true
		}
	}
	for _, l := range s.GetListeners() {
		if url, ok := strings.CutPrefix(l, "metrics "); ok {
			c.metrics = url
		}
	}
	return s, nil
}

// pid is the process of a backend; 0 where there is none.
func (c *cluster) pid(backend string) int {
	s, err := c.status()
	if err != nil {
		return 0
	}
	for _, b := range s.GetBackends() {
		if b.GetName() == backend {
			return int(b.GetPid())
		}
	}
	return 0
}

// configure swaps the configuration as Kubernetes does: a link to another directory.
func (c *cluster) configure(s settings) {
	c.t.Helper()
	if err := c.write(c.text(s)); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) write(text string) error {
	c.mu.Lock()
	c.next++
	dir := "v" + strconv.Itoa(c.next)
	c.mu.Unlock()
	if err := os.Mkdir(c.path("etc/"+dir), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(c.path("etc/"+dir+"/config.yaml"), []byte(text), 0o600); err != nil {
		return err
	}
	if err := os.Symlink(dir, c.path("etc/..next")); err != nil {
		return err
	}
	if err := os.Rename(c.path("etc/..next"), c.path("etc/..data")); err != nil {
		return err
	}
	if err := os.Symlink("..data/config.yaml", c.path("etc/config.yaml")); err != nil && !os.IsExist(err) {
		return err
	}
	return nil
}

// reload swaps the configuration and waits until it is in use, or was refused.
func (c *cluster) reload(text string) (refused bool, err error) {
	before, err := c.status()
	if err != nil {
		return false, err
	}
	if err := c.write(text); err != nil {
		return false, err
	}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(30 * time.Millisecond) {
		s, err := c.status()
		if err != nil {
			return false, err
		}
		if r := s.GetConfiguration().GetRejected(); r != "" && r != before.GetConfiguration().GetRejected() {
			return true, nil
		}
		if s.GetConfiguration().GetGeneration() > before.GetConfiguration().GetGeneration() {
			return false, nil
		}
	}
	return false, fmt.Errorf("the agent does not take a new configuration within 20 s")
}

// environment is a backend's, as YAML.
func environment(pairs []string) string {
	env := map[string]string{}
	for _, pair := range pairs {
		name, value, _ := strings.Cut(pair, "=")
		env[name] = value
	}
	b, _ := json.Marshal(env) // strings: it never fails
	return string(b)
}

func (c *cluster) sum() string {
	b, err := os.ReadFile(c.plugin)
	if err != nil {
		c.t.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(b))
}

// tail is the end of the agent's log.
func (c *cluster) tail(lines int) string {
	b, _ := os.ReadFile(c.path("agent.log")) // where it cannot be read there is none
	all := bytes.Split(b, []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}
