package agent_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/kms-agent/kms-agent/agent"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/identity/issuer"
	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/local"
)

// The test binary is its own plugin, as kms-agent is.
func TestMain(m *testing.M) {
	if slices.Equal(os.Args[1:], []string{"plugin", "serve", "local"}) {
		if err := plugins.Serve(local.New()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if path, ok := os.LookupEnv(faultVariable); ok {
		serveFaulty(path)
		return
	}
	if path, ok := os.LookupEnv(agentVariable); ok {
		runAgent(path)
		return
	}
	goleak.VerifyTestMain(m)
}

// rig is a running agent with a real issuer, a real plugin process and real
// sockets.
type rig struct {
	t       testing.TB
	dir     string
	config  string
	cancel  context.CancelFunc
	done    chan error
	level   *zap.AtomicLevel // of the agent's logger, where a test looks at it
	svidTTL time.Duration    // of the issuer's X.509-SVIDs; 0 is its default
	// between runs after the configuration was read and before the agent is built.
	between func()
}

const baseConfig = `version: 1
trust_domain: example.org
state_dir: state
runtime_dir: run
listen: { native: { socket: kms.sock, mode: "0600" } }
admin: { socket: admin.sock, allow: [{ uid: UID, operations: [status] }] }
identity:
  workload_api: unix:api/agent.sock
  static_peers: [PEERS]
backends:
  - name: local
    plugin: local
    call_timeout: 2s
    settings: { keystore: keystore, seal: { key_file: keystore.key } }
keys:
  - { name: orders, backend: local, wrapping_key: "local:orders" }
  - { name: archive, backend: local, wrapping_key: "local:archive" }
limits: { max_message: 64KiB, max_deadline: 5s, default_deadline: 5s, max_stream: 4MiB }
audit: { file: audit.log, initial_key: initial.key }
policy:
  - name: orders
    callers: ["spiffe://example.org/orders", "spiffe://example.org/peer"]
    keys: [orders]
    operations: [encrypt, decrypt, generate-data-key, generate-data-key-without-plaintext, decrypt-data-key, wrap, unwrap, describe]
  - name: random
    callers: ["spiffe://example.org/orders"]
    operations: [generate-random]
`

// configText is baseConfig for this user, with replacements.
func configText(replace ...string) string {
	text := strings.NewReplacer(replace...).Replace(baseConfig)
	return strings.NewReplacer("UID", fmt.Sprint(os.Getuid()), "PEERS", "").Replace(text)
}

func staticPeer() string {
	return fmt.Sprintf("{ uid: %d, id: spiffe://example.org/peer }", os.Getuid())
}

// newRig prepares a directory; start runs an agent in it.
func newRig(t testing.TB, config string) *rig {
	t.Helper()
	return newRigWithSVIDs(t, config, 0)
}

// newRigWithSVIDs is newRig with X.509-SVIDs of a lifetime.
func newRigWithSVIDs(t testing.TB, config string, ttl time.Duration) *rig {
	t.Helper()
	dir, err := os.MkdirTemp("", "agent") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	r := &rig{t: t, dir: dir, config: filepath.Join(dir, "kms-agent.yaml"), svidTTL: ttl}
	r.write(config)
	seal := local.Seal{KeyFile: filepath.Join(dir, "keystore.key")}
	if err := local.CreateKeyFile(seal.KeyFile); err != nil {
		t.Fatal(err)
	}
	ks, err := local.Create(filepath.Join(dir, "keystore"), seal)
	if err != nil {
		t.Fatal(err)
	}
	defer ks.Close()
	for _, name := range []string{"orders", "archive"} {
		if err := ks.CreateKey(name); err != nil {
			t.Fatal(err)
		}
	}
	r.runIssuer()
	return r
}

func (r *rig) runIssuer() {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	sockets := map[string]spiffeid.ID{}
	for _, name := range []string{"agent", "orders", "stranger"} {
		sockets[filepath.Join(r.dir, "api", name+".sock")] = spiffeid.RequireFromPath(td, "/"+name)
	}
	ca, err := issuer.New(issuer.Config{TrustDomain: td, Sockets: sockets, TTL: r.svidTTL, JWTTTL: 3 * time.Second})
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ca.Run(ctx) }()
	r.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("issuer: %v", err)
		}
	})
}

func (r *rig) path(name string) string { return filepath.Join(r.dir, name) }

func (r *rig) write(config string) {
	r.t.Helper()
	if err := os.WriteFile(r.config, []byte(config), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// start runs the agent until the test ends, and waits until it serves.
func (r *rig) start() {
	r.t.Helper()
	r.startIn("serving")
}

// startIn is start for an agent that is in another state then.
func (r *rig) startIn(state string) {
	r.t.Helper()
	cfg, err := agent.LoadConfig(r.config)
	if err != nil {
		r.t.Fatalf("configuration: %v", err)
	}
	if r.between != nil {
		r.between()
	}
	a, err := agent.New(cfg, r.config, zap.NewNop())
	if err != nil {
		r.t.Fatalf("agent: %v", err)
	}
	if r.level != nil {
		a.UseLevel(*r.level)
	}
	ready := make(chan struct{})
	a.OnReady(func() { close(ready) })
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel, r.done = cancel, make(chan error, 1)
	go func() { r.done <- a.Run(ctx) }()
	r.t.Cleanup(r.stop)
	select {
	case <-ready:
	case err := <-r.done:
		r.done <- err
		r.t.Fatalf("the agent ended: %v", err)
	case <-time.After(20 * time.Second):
		r.t.Fatal("the agent is not ready after 20 s")
	}
	r.await("the agent serves", func(s *adminv1.StatusResponse) bool { return s.GetState() == state })
}

// stop ends the agent and fails the test when it does not end well.
func (r *rig) stop() {
	if r.cancel == nil {
		return
	}
	r.cancel()
	r.cancel = nil
	select {
	case err := <-r.done:
		if err != nil {
			r.t.Errorf("the agent ended with: %v", err)
		}
	case <-time.After(20 * time.Second):
		r.t.Error("the agent does not stop")
	}
}

// as connects as one of the issuer's workloads, or as a plain peer.
func (r *rig) as(workload string) *client.Client {
	r.t.Helper()
	o := client.Options{Socket: r.path("kms.sock"), Retry: -1}
	if workload != "peer" {
		o.WorkloadAPI = "unix://" + r.path("api/"+workload+".sock")
	}
	c, err := client.Dial(r.t.Context(), o)
	if err != nil {
		r.t.Fatalf("dial as %s: %v", workload, err)
	}
	r.t.Cleanup(func() { _ = c.Close() })
	return c
}

// tls connects as one of the issuer's workloads, below the client.
func (r *rig) tls(workload string) *grpc.ClientConn {
	r.t.Helper()
	source, err := workloadapi.NewX509Source(r.t.Context(), workloadapi.WithClientOptions(
		workloadapi.WithAddr("unix://"+r.path("api/"+workload+".sock"))))
	if err != nil {
		r.t.Fatal(err)
	}
	conn, err := grpc.NewClient("unix:"+r.path("kms.sock"), grpc.WithTransportCredentials(
		grpccredentials.MTLSClientCredentials(source, source, tlsconfig.AuthorizeAny())))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = errors.Join(conn.Close(), source.Close()) })
	return conn
}

// status asks the admin door.
func (r *rig) status() (*adminv1.StatusResponse, error) {
	conn, err := grpc.NewClient("unix:"+r.path("admin.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(r.t.Context(), 5*time.Second)
	defer cancel()
	return adminv1.NewAdminClient(conn).Status(ctx, &adminv1.StatusRequest{})
}

// await asks for the status until it is as wanted.
func (r *rig) await(what string, wanted func(*adminv1.StatusResponse) bool) *adminv1.StatusResponse {
	r.t.Helper()
	var last *adminv1.StatusResponse
	var err error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if last, err = r.status(); err == nil && wanted(last) {
			return last
		}
	}
	r.t.Fatalf("%s: not within 20 s; status: %v, error: %v", what, last, err)
	return nil
}

// wantReason fails unless err is the agent's own, of that reason.
func wantReason(t *testing.T, err error, want string) client.Error {
	t.Helper()
	var e *client.Error
	if !errors.As(err, &e) || string(e.Reason) != want {
		t.Errorf("error = %v (%+v), want reason %s", err, e, want)
		return client.Error{}
	}
	return *e
}
