package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// settle is how long the files must stay as they are before they are read
// again: editors and Kubernetes change them in several steps.
const settle = 200 * time.Millisecond

// Reload reads the configuration again. A faulty file changes nothing: it is
// logged, shown by status, and returned. It returns the generation of what is
// then in use.
func (a *Agent) Reload(ctx context.Context) (generation uint64, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err = a.reloadLocked(ctx); err != nil {
		a.rejected = err.Error()
		a.logger.Error("configuration not reloaded; the agent goes on with the one it has", zap.String("config", a.path), zap.Error(err))
		return a.generation, err
	}
	a.logger.Info("configuration reloaded", zap.String("config", a.path), zap.Uint64("generation", a.generation))
	return a.generation, nil
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
		{"identity.jwt_audience", old.Identity.JWTAudience, next.Identity.JWTAudience},
		{"identity.federated_trust_domains", old.Identity.FederatedTrustDomains, next.Identity.FederatedTrustDomains},
		{"audit", old.Audit, next.Audit},
		{"cache", old.Cache, next.Cache},
		{"log.format", old.Log.Format, next.Log.Format},
		{"metrics", old.Metrics, next.Metrics},
		{"tracing", old.Tracing, next.Tracing},
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
	// Other files of these directories may change all the time (an audit log
	// does), so an event only makes the agent look, and what it sees must be the
	// same twice before it is read.
	look := time.NewTimer(settle)
	waiting := true
	used := a.fingerprint()
	seen := used
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-watcher.Errors:
			a.logger.Warn("watching the configuration", zap.Error(err))
		case <-watcher.Events:
		case <-look.C:
			waiting = false
			now := a.fingerprint()
			settled := now == seen
			seen = now
			if settled && now != used {
				used = now
				_, _ = a.Reload(ctx) // logged, and shown by status
				a.watchDirectories(watcher)
			}
			if settled {
				continue
			}
		}
		if !waiting {
			look.Reset(settle)
			waiting = true
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

// fingerprint changes when a file that the configuration is read from does, or
// one comes or goes. Only what the kernel says of the files is compared, so that
// looking is cheap.
func (a *Agent) fingerprint() string {
	a.mu.Lock()
	files := a.cfg.Files()
	a.mu.Unlock()
	var b strings.Builder
	for _, f := range files {
		names := []string{f}
		if entries, err := os.ReadDir(f); err == nil {
			for _, e := range entries {
				if strings.HasSuffix(e.Name(), ".yaml") {
					names = append(names, filepath.Join(f, e.Name()))
				}
			}
			names = names[1:]
		}
		for _, name := range names {
			var st unix.Stat_t
			err := unix.Stat(name, &st)
			fmt.Fprintf(&b, "%q %v %d %d %d %d %d\n", name, err, st.Dev, st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano())
		}
	}
	return b.String()
}
