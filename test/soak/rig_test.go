// Package soak holds a running agent under mixed load, honest and hostile, and
// watches whether it grows.
package soak

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
)

const configuration = `version: 1
trust_domain: example.org
state_dir: DIR/state
runtime_dir: DIR/run
listen: { native: { socket: DIR/kms.sock, mode: "0600" } }
admin: { socket: DIR/admin.sock, allow: [{ uid: UID, operations: [break-glass] }] }
identity: { static_peers: [{ uid: UID, id: spiffe://example.org/soak }] }
backends:
  - { name: local, plugin: local, settings: { keystore: DIR/keystore, seal: { key_file: DIR/keystore.key } } }
keys:
  - { name: orders, backend: local, wrapping_key: "local:orders", cache: { max_age: 2s, max_lifetime: 5s } }
  - { name: tenants, backend: local, wrapping_key: "local:tenants", bind_context: true, cache: { max_age: 2s } }
  - { name: archive, backend: local, wrapping_key: "local:archive" }
cache: { max_entries: 500 }
audit: { file: DIR/audit.log, initial_key: DIR/initial.key }
policy:
  - name: soak
    callers: ["spiffe://example.org/soak"]
    keys: [orders, tenants]
    operations: [encrypt, decrypt, generate-data-key, decrypt-data-key, wrap, unwrap, describe]
metrics: { address: "127.0.0.1:0" }
log: { level: error }
`

// rig is a running agent, built as it is released.
type rig struct {
	t       *testing.T
	dir     string
	binary  string
	process *exec.Cmd
	metrics string
}

func newRig(t *testing.T) *rig {
	t.Helper()
	dir, err := os.MkdirTemp("", "soak") // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	r := &rig{t: t, dir: dir, binary: filepath.Join(dir, "kms-agent")}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", r.binary, "../../cmd/kms-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOEXPERIMENT=runtimesecret")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	r.run("keys", "local", "init", "--create-key-file")
	for _, name := range []string{"orders", "tenants", "archive"} {
		r.run("keys", "local", "create", name)
	}
	if err := os.Mkdir(filepath.Join(dir, "etc"), 0o700); err != nil {
		t.Fatal(err)
	}
	r.configure("")
	r.start()
	return r
}

func (r *rig) path(name string) string { return filepath.Join(r.dir, name) }

func (r *rig) run(args ...string) {
	r.t.Helper()
	args = append(args, "--keystore", r.path("keystore"), "--key-file", r.path("keystore.key"))
	if out, err := exec.CommandContext(r.t.Context(), r.binary, args...).CombinedOutput(); err != nil {
		r.t.Fatalf("%v: %v\n%s", args, err, out)
	}
}

// configure writes the configuration, with a comment that makes it another file.
func (r *rig) configure(comment string) {
	text := strings.NewReplacer("UID", strconv.Itoa(os.Getuid()), "DIR", r.dir).Replace(configuration)
	if err := os.WriteFile(r.path("etc/kms-agent.yaml"), []byte(text+"# "+comment+"\n"), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) start() {
	r.t.Helper()
	r.process = exec.CommandContext(context.Background(), r.binary, "run", "--config", r.path("etc/kms-agent.yaml"))
	r.process.Stderr = os.Stderr
	if err := r.process.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = r.process.Process.Kill() })
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		s, err := r.status()
		if err != nil || s.GetState() != "serving" {
			continue
		}
		for _, l := range s.GetListeners() {
			if url, ok := strings.CutPrefix(l, "metrics "); ok {
				r.metrics = url
				return
			}
		}
	}
	r.t.Fatal("the agent does not serve after 20 s")
}

// stop ends the agent and wants an ordered end.
func (r *rig) stop() {
	r.t.Helper()
	if err := r.process.Process.Signal(os.Interrupt); err != nil {
		r.t.Fatal(err)
	}
	kill := time.AfterFunc(30*time.Second, func() { _ = r.process.Process.Kill() })
	defer kill.Stop()
	if err := r.process.Wait(); err != nil {
		r.t.Errorf("the agent's end: %v", err)
	}
}

func dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// administer calls the admin door.
func (r *rig) administer(ctx context.Context, do func(context.Context, adminv1.AdminClient) error) error {
	conn, err := dial(r.path("admin.sock"))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	return do(ctx, adminv1.NewAdminClient(conn))
}

func (r *rig) status() (s *adminv1.StatusResponse, err error) {
	err = r.administer(r.t.Context(), func(ctx context.Context, c adminv1.AdminClient) error {
		s, err = c.Status(ctx, &adminv1.StatusRequest{})
		return err
	})
	return s, err
}

// sample is what the agent holds at one moment.
type sample struct {
	goroutines, descriptors, threads float64
	heap, resident, plugin           float64 // MB
}

// sample asks the agent for what it holds. Its plugin is looked at from outside.
func (r *rig) sample(ctx context.Context) (sample, error) {
	values, err := r.scrape(ctx)
	if err != nil {
		return sample{}, err
	}
	const mb = 1 << 20
	s := sample{
		goroutines: values["go_goroutines"], descriptors: values["process_open_fds"], threads: values["go_threads"],
		heap: values["go_memstats_heap_alloc_bytes"] / mb, resident: values["process_resident_memory_bytes"] / mb,
	}
	status, err := r.status()
	if err != nil {
		return s, err
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", status.GetBackends()[0].GetPid()))
	if err != nil {
		return s, nil //nolint:nilerr // it is being replaced just now
	}
	pages, err := strconv.Atoi(strings.Fields(string(text))[1])
	s.plugin = float64(pages*os.Getpagesize()) / mb
	return s, err
}

func (r *rig) scrape(ctx context.Context) (map[string]float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.metrics, nil)
	if err != nil {
		return nil, err
	}
	answer, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = answer.Body.Close() }()
	values := map[string]float64{}
	lines := bufio.NewScanner(answer.Body)
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), " ")
		if n, err := strconv.ParseFloat(value, 64); ok && err == nil {
			values[name] = n
		}
	}
	if _, err := io.Copy(io.Discard, answer.Body); err != nil {
		return nil, err
	}
	return values, errors.Join(lines.Err())
}
