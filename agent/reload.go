package agent

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"go.uber.org/zap"
)

// settle is how long the files must be quiet before they are read again:
// editors and Kubernetes change them in several steps.
const settle = 200 * time.Millisecond

// Reload reads the configuration again. A faulty file changes nothing: it is
// logged, shown by status, and returned.
func (a *Agent) Reload(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.reloadLocked(ctx)
	if err != nil {
		a.rejected = err.Error()
		a.logger.Error("configuration not reloaded; the agent goes on with the one it has", zap.String("config", a.path), zap.Error(err))
		return err
	}
	a.logger.Info("configuration reloaded", zap.String("config", a.path), zap.Uint64("generation", a.generation))
	return nil
}

func (a *Agent) reloadLocked(ctx context.Context) error {
	next, err := LoadConfig(a.path)
	if err != nil {
		return err
	}
	if section := needsRestart(a.cfg, next); section != "" {
		return fmt.Errorf("%s changed, which takes a restart of the agent; restart it, or undo that change to have the others reloaded", section)
	}
	return a.applyLocked(ctx, next)
}

// needsRestart names the first section that differs and that cannot change in
// a running agent; empty when there is none.
func needsRestart(old, next *Config) string {
	for _, section := range []struct {
		name      string
		old, next any
	}{
		{"trust_domain", old.TrustDomain, next.TrustDomain},
		{"state_dir", old.StateDir, next.StateDir},
		{"runtime_dir", old.RuntimeDir, next.RuntimeDir},
		{"listen", old.Listen, next.Listen},
		{"admin.socket", old.Admin.Socket, next.Admin.Socket},
		{"identity.workload_api", old.Identity.WorkloadAPI, next.Identity.WorkloadAPI},
		{"identity.bundle_max_age", old.Identity.BundleMaxAge, next.Identity.BundleMaxAge},
		{"identity.federated_trust_domains", old.Identity.FederatedTrustDomains, next.Identity.FederatedTrustDomains},
		{"audit", old.Audit, next.Audit},
		{"cache", old.Cache, next.Cache},
		{"log", old.Log, next.Log},
		{"limits", doorLimits(old), doorLimits(next)},
	} {
		if !reflect.DeepEqual(section.old, section.next) {
			return section.name
		}
	}
	return ""
}

// doorLimits are the limits that doors take when they open.
func doorLimits(cfg *Config) LimitsConfig {
	l := cfg.Limits
	l.DataKeyUse, l.MaxStream = 0, 0
	return l
}

// watch reloads when the configuration's files change. It watches their
// directories: editors rename, Kubernetes swaps a symbolic link.
func (a *Agent) watch(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch the configuration: %w", err)
	}
	defer func() { _ = watcher.Close() }() // nothing can be done about it
	a.watchDirectories(watcher)
	quiet := time.NewTimer(settle)
	quiet.Stop()
	last := a.fingerprint()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-watcher.Errors:
			a.logger.Warn("watching the configuration", zap.Error(err))
			quiet.Reset(settle)
		case <-watcher.Events:
			quiet.Reset(settle)
		case <-quiet.C:
			if now := a.fingerprint(); now != last {
				last = now
				_ = a.Reload(ctx) // logged, and shown by status
			}
			a.watchDirectories(watcher)
		}
	}
}

func (a *Agent) watchDirectories(w *fsnotify.Watcher) {
	a.mu.Lock()
	files := a.cfg.Files()
	a.mu.Unlock()
	for _, f := range files {
		dir := f
		if info, err := os.Stat(f); err != nil || !info.IsDir() {
			dir = filepath.Dir(f)
		}
		if err := w.Add(dir); err != nil {
			a.logger.Warn("cannot watch for changes of the configuration", zap.String("directory", dir), zap.Error(err))
		}
	}
}

// fingerprint changes when what the configuration is read from changes.
func (a *Agent) fingerprint() [sha256.Size]byte {
	a.mu.Lock()
	files := a.cfg.Files()
	a.mu.Unlock()
	h := sha256.New()
	for _, f := range files {
		info, err := os.Stat(f)
		switch {
		case err != nil:
			fmt.Fprintf(h, "%q missing\n", f)
		case info.IsDir():
			hashDirectory(h, f)
		default:
			hashFile(h, f)
		}
	}
	return [sha256.Size]byte(h.Sum(nil))
}

func hashDirectory(h io.Writer, dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		fmt.Fprintf(h, "%q unreadable\n", dir)
		return
	}
	for _, e := range entries {
		if !e.IsDir() && strings.HasSuffix(e.Name(), ".yaml") {
			hashFile(h, filepath.Join(dir, e.Name()))
		}
	}
}

func hashFile(h io.Writer, path string) {
	data, err := readBounded(path)
	fmt.Fprintf(h, "%q %v %d\n", path, err, len(data))
	_, _ = h.Write(data) // a hash never fails
}
