package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/kms-agent/kms-agent/identity/issuer"
	"github.com/kms-agent/kms-agent/plugins/local"
)

// The development set-up: one trust domain, one key, a workload that may use it
// and one that may not.
const (
	devTrustDomain = "dev.kms-agent.internal"
	devKey         = "orders"
	devSVIDTTL     = 10 * time.Minute
)

// DevOptions say where and how the development agent runs.
type DevOptions struct {
	// Dir is private to the development agent; it is made with mode 0700. What
	// is there already (keystore, configuration) is used again.
	Dir    string
	Logger *zap.Logger
	// Level is the logger's.
	Level zap.AtomicLevel
	// Ready is called once when the agent serves.
	Ready func(DevInfo)
}

// DevInfo tells how to reach a development agent.
type DevInfo struct {
	Dir, Config, Socket, AdminSocket string
	// Workloads has a Workload API socket for each development workload: who
	// connects there is that workload.
	Workloads map[string]string
	Key       string
	AuditLog  string
	// InitialKey is the file with the first key of the audit chain.
	InitialKey string
}

// RunDev runs an agent with everything it needs in one private directory: an
// embedded issuer of SPIFFE identities, a local keystore, a policy. It is for
// development: whoever can open a Workload API socket in the directory is that
// workload.
func RunDev(ctx context.Context, o DevOptions) error {
	info, err := prepareDev(o.Dir)
	if err != nil {
		return fmt.Errorf("development agent: %w", err)
	}
	cfg, err := LoadConfig(info.Config)
	if err != nil {
		return err
	}
	ca, err := issuer.New(devIssuer(info))
	if err != nil {
		return err
	}
	o.Logger.Warn("this is a development agent: its issuer gives an identity to every process that can open its sockets",
		zap.String("directory", info.Dir))
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return ca.Run(ctx) })
	group.Go(func() error {
		a, err := New(cfg, info.Config, o.Logger)
		if err != nil {
			return err
		}
		a.UseLevel(o.Level)
		a.OnReady(func() {
			if err := a.settled(ctx); err != nil {
				o.Logger.Error("development agent is not ready", zap.Error(err))
				return
			}
			if o.Ready != nil {
				o.Ready(info)
			}
		})
		return a.Run(ctx)
	})
	return ignoreEnd(group.Wait())
}

// settled waits for backends and identity, so that the first call succeeds.
func (a *Agent) settled(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if a.source != nil {
		if err := errors.Join(a.source.WaitReady(ctx), a.source.WaitJWTBundles(ctx)); err != nil {
			return err
		}
	}
	a.mu.Lock()
	backends := make([]*backend, 0, len(a.backends))
	for _, b := range a.backends {
		backends = append(backends, b)
	}
	a.mu.Unlock()
	for _, b := range backends {
		if err := b.supervisor.Ready(ctx); err != nil {
			return err
		}
	}
	return nil
}

func prepareDev(dir string) (DevInfo, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return DevInfo{}, err
	}
	for _, d := range []string{dir, filepath.Join(dir, "workload-api")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return DevInfo{}, err
		}
	}
	if err := privateDirectory(dir); err != nil {
		return DevInfo{}, err
	}
	info := DevInfo{
		Dir: dir, Config: filepath.Join(dir, "kms-agent.yaml"), Key: devKey,
		Socket: filepath.Join(dir, "kms.sock"), AdminSocket: filepath.Join(dir, "admin.sock"),
		AuditLog: filepath.Join(dir, "audit.log"), InitialKey: filepath.Join(dir, "audit-initial.key"),
		Workloads: map[string]string{
			"orders":   filepath.Join(dir, "workload-api", "orders.sock"),
			"stranger": filepath.Join(dir, "workload-api", "stranger.sock"),
		},
	}
	if err := devKeystore(dir); err != nil {
		return DevInfo{}, err
	}
	return info, writeNew(info.Config, devConfig())
}

func privateDirectory(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s is open to others (mode %04o): keys will be in it; run chmod 700 on it or name another directory", dir, info.Mode().Perm())
	}
	return nil
}

// writeNew writes a private file unless it is there already.
func writeNew(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}

// devKeystore makes the keystore, its seal and its key, where they are missing.
func devKeystore(dir string) error {
	keyFile, path := filepath.Join(dir, "keystore.key"), filepath.Join(dir, "keystore")
	if _, err := os.Stat(keyFile); errors.Is(err, fs.ErrNotExist) {
		if err := local.CreateKeyFile(keyFile); err != nil {
			return err
		}
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	ks, err := local.Create(path, local.Seal{KeyFile: keyFile})
	if err != nil {
		return err
	}
	defer ks.Close()
	return ks.CreateKey(devKey)
}

// devIssuer gives each development workload a Workload API of its own, and one
// to the agent.
func devIssuer(info DevInfo) issuer.Config {
	td := spiffeid.RequireTrustDomainFromString(devTrustDomain)
	sockets := map[string]spiffeid.ID{
		filepath.Join(info.Dir, "workload-api", "agent.sock"): spiffeid.RequireFromPath(td, "/kms-agent"),
	}
	for name, socket := range info.Workloads {
		sockets[socket] = spiffeid.RequireFromPath(td, "/workload/"+name)
	}
	return issuer.Config{TrustDomain: td, TTL: devSVIDTTL, Sockets: sockets}
}

func devConfig() []byte {
	return []byte(strings.NewReplacer(
		"TRUST_DOMAIN", devTrustDomain, "UID", fmt.Sprint(os.Getuid()),
	).Replace(`# Written by "kms-agent dev" once; edit it and watch the agent reload it.
version: 1
trust_domain: TRUST_DOMAIN
state_dir: state
runtime_dir: run
listen:
  native: { socket: kms.sock, mode: "0600" }
admin:
  socket: admin.sock
  allow: [{ uid: UID, operations: [break-glass] }]
identity:
  workload_api: unix:workload-api/agent.sock
backends:
  - name: local
    plugin: local
    settings:
      keystore: keystore
      seal: { key_file: keystore.key }
keys:
  - name: orders
    labels: { team: shop, cost-center: "4711" }
    backend: local
    wrapping_key: local:orders
roles:
  user: [encrypt, decrypt, generate-data-key, generate-data-key-without-plaintext, decrypt-data-key, wrap, unwrap, describe]
policy:
  - name: orders-workload
    callers: ["spiffe://TRUST_DOMAIN/workload/orders"]
    keys: ["orders"]
    operations: [user]
    proof: [x509-svid, jwt-svid]
audit:
  file: audit.log
  initial_key: audit-initial.key
log: { level: info, format: console }
`))
}
