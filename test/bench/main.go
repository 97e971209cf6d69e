// Command bench measures the agent against the limits that the project sets
// itself. Every figure is a ratio within one run: the machine's own speed
// cancels out. Figures are medians over several rounds.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

const payload = 1 << 10

func main() {
	agent := flag.String("agent", "bin/kms-agent", "the agent's binary")
	rounds := flag.Int("count", 5, "rounds")
	length := flag.Duration("round", time.Second, "length of one measurement")
	callers := flag.Int("callers", 16, "concurrent callers, each with a connection of its own")
	echo := flag.String("echo", "", "serve the empty echo on this socket (used by the command itself)")
	flag.Parse()
	if *echo != "" {
		log.Fatal(serveEcho(*echo))
	}
	if err := run(*agent, *rounds, *length, *callers); err != nil {
		log.Fatal(err)
	}
}

// echoServer answers with what it was given: what the transport alone costs.
type echoServer struct {
	kmsagentv1.UnimplementedKMSServer
}

func (echoServer) Encrypt(_ context.Context, r *kmsagentv1.EncryptRequest) (*kmsagentv1.EncryptResponse, error) {
	return &kmsagentv1.EncryptResponse{Message: r.GetPlaintext()}, nil
}

func serveEcho(socket string) error {
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "unix", socket)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	kmsagentv1.RegisterKMSServer(s, echoServer{})
	return s.Serve(l)
}

func run(agent string, rounds int, length time.Duration, callers int) error {
	dir, err := os.MkdirTemp("", "kms-bench")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	echoSocket := filepath.Join(dir, "echo.sock")
	stopEcho, err := start(self, "-echo", echoSocket)
	if err != nil {
		return err
	}
	defer stopEcho()
	a, err := startAgent(agent, dir)
	if err != nil {
		return err
	}
	defer a.stop()
	pss, err := a.idleMemory()
	if err != nil {
		return err
	}
	fmt.Printf("idle agent and plugin: %.1f MB proportional set size (limit 60)\n", pss)
	return a.throughput(echoSocket, rounds, length, callers)
}

// start runs a program until the function it returns is called.
func start(name string, args ...string) (stop func(), err error) {
	cmd := exec.CommandContext(context.Background(), name, args...) //nolint:gosec // our own programs
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return func() {
		_ = cmd.Process.Signal(os.Interrupt)
		kill := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		_ = cmd.Wait()
	}, nil
}

type running struct {
	dir  string
	stop func()
}

// startAgent runs a development agent whose static peer is this process.
func startAgent(binary, dir string) (*running, error) {
	seal := []string{"--keystore", filepath.Join(dir, "keystore"), "--key-file", filepath.Join(dir, "keystore.key")}
	for _, args := range [][]string{{"init", "--create-key-file"}, {"create", "orders"}} {
		args = append(append([]string{"keys", "local"}, args...), seal...)
		prepare := exec.CommandContext(context.Background(), binary, args...) //nolint:gosec // our own program
		if out, err := prepare.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%v: %w\n%s", prepare.Args, err, out)
		}
	}
	// A directory of its own, as on a real host: the agent watches it.
	config := filepath.Join(dir, "etc", "kms-agent.yaml")
	if err := os.Mkdir(filepath.Dir(config), 0o700); err != nil {
		return nil, err
	}
	text := strings.NewReplacer("UID", strconv.Itoa(os.Getuid()), "DIR", dir).Replace(configuration)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	stop, err := start(binary, "run", "--config", config)
	if err != nil {
		return nil, err
	}
	a := &running{dir: dir, stop: stop}
	for range 200 {
		if s, err := a.status(); err == nil && s.GetState() == "serving" {
			return a, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	stop()
	return nil, errors.New("the agent does not serve after 10 s")
}

const configuration = `version: 1
trust_domain: example.org
state_dir: DIR/state
runtime_dir: DIR/run
listen: { native: { socket: DIR/kms.sock, mode: "0600" } }
admin: { socket: DIR/admin.sock, allow: [{ uid: UID, operations: [status] }] }
identity: { static_peers: [{ uid: UID, id: spiffe://example.org/bench }] }
backends:
  - { name: local, plugin: local, settings: { keystore: DIR/keystore, seal: { key_file: DIR/keystore.key } } }
keys:
  - { name: orders, backend: local, wrapping_key: "local:orders" }
audit: { file: DIR/audit.log, initial_key: DIR/initial.key }
policy:
  - { name: bench, callers: ["spiffe://example.org/bench"], keys: [orders], operations: [encrypt, decrypt] }
log: { level: error }
`

func dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

func (a *running) status() (*adminv1.StatusResponse, error) {
	conn, err := dial(filepath.Join(a.dir, "admin.sock"))
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return adminv1.NewAdminClient(conn).Status(ctx, &adminv1.StatusRequest{})
}

// idleMemory is the proportional set size of agent and plugin together, in MB.
func (a *running) idleMemory() (float64, error) {
	s, err := a.status()
	if err != nil {
		return 0, err
	}
	total := 0
	for _, pid := range []int32{s.GetPid(), s.GetBackends()[0].GetPid()} {
		rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return 0, err
		}
		for line := range bytes.Lines(rollup) {
			if rest, ok := bytes.CutPrefix(line, []byte("Pss:")); ok {
				kib, err := strconv.Atoi(strings.Fields(string(rest))[0])
				if err != nil {
					return 0, err
				}
				total += kib
			}
		}
	}
	return float64(total) / 1024, nil
}

// throughput measures the echo, Encrypt and Decrypt in turn, and prints the
// medians of the ratios within each round.
func (a *running) throughput(echoSocket string, rounds int, length time.Duration, callers int) error {
	echo, err := clients(echoSocket, callers)
	if err != nil {
		return err
	}
	agent, err := clients(filepath.Join(a.dir, "kms.sock"), callers)
	if err != nil {
		return err
	}
	plaintext := make([]byte, payload)
	encrypt := func(ctx context.Context, c kmsagentv1.KMSClient) error {
		_, err := c.Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: plaintext})
		return err
	}
	message, err := agent[0].Encrypt(context.Background(), &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: plaintext}, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	decrypt := func(ctx context.Context, c kmsagentv1.KMSClient) error {
		_, err := c.Decrypt(ctx, &kmsagentv1.DecryptRequest{Message: message.GetMessage()})
		return err
	}
	var base, enc, dec, encRatio, decRatio []float64
	for round := range rounds + 1 {
		e, err1 := measure(echo, length, encrypt)
		n, err2 := measure(agent, length, encrypt)
		d, err3 := measure(agent, length, decrypt)
		if err := errors.Join(err1, err2, err3); err != nil {
			return err
		}
		if round == 0 {
			continue // warm-up
		}
		base, enc, dec = append(base, e), append(enc, n), append(dec, d)
		encRatio, decRatio = append(encRatio, n/e), append(decRatio, d/e)
	}
	fmt.Printf("empty gRPC echo, 1 KiB, %d callers: %8.0f op/s\n", callers, median(base))
	fmt.Printf("Encrypt 1 KiB, cached data key:     %8.0f op/s, ratio %.2f (limit 0.50)\n", median(enc), median(encRatio))
	fmt.Printf("Decrypt 1 KiB, cached data key:     %8.0f op/s, ratio %.2f (limit 0.50)\n", median(dec), median(decRatio))
	return nil
}

func clients(socket string, n int) ([]kmsagentv1.KMSClient, error) {
	all := make([]kmsagentv1.KMSClient, n)
	for i := range all {
		conn, err := dial(socket)
		if err != nil {
			return nil, err
		}
		conn.Connect()
		all[i] = kmsagentv1.NewKMSClient(conn)
	}
	return all, nil
}

// measure returns operations per second of all callers together.
func measure(all []kmsagentv1.KMSClient, length time.Duration, do func(context.Context, kmsagentv1.KMSClient) error) (float64, error) {
	var done atomic.Int64
	var failed atomic.Pointer[error]
	var group sync.WaitGroup
	began := time.Now()
	for _, c := range all {
		group.Go(func() {
			for time.Since(began) < length && failed.Load() == nil {
				if err := do(context.Background(), c); err != nil {
					failed.Store(&err)
					return
				}
				done.Add(1)
			}
		})
	}
	group.Wait()
	if err := failed.Load(); err != nil {
		return 0, *err
	}
	return float64(done.Load()) / time.Since(began).Seconds(), nil
}

func median(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}
