package agent

import (
	"context"
	"errors"
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

// lookAnyway is how often the files are looked at without an event: one of them
// may be a link into another directory, or a directory may have been replaced.
const lookAnyway = 5 * time.Second

// Reload reads the configuration again. A faulty file changes nothing: it is
// logged, shown by status, and returned. It returns the generation of what is
// then in use.
func (a *Agent) Reload(ctx context.Context) (generation uint64, err error) {
	a.reloading.Lock()
	defer a.reloading.Unlock()
	err = a.reloadLocked(ctx)
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		a.rejected = err.Error()
		a.logger.Error("configuration not reloaded; the agent goes on with the one it has", zap.String("config", a.path), zap.Error(err))
		return a.generation, err
	}
	a.logger.Info("configuration reloaded", zap.String("config", a.path), zap.Uint64("generation", a.generation))
	return a.generation, nil
}

// reloadLocked requires a.reloading.
func (a *Agent) reloadLocked(ctx context.Context) error {
	next, err := LoadConfig(a.path)
	if err != nil {
		return err
	}
	if section := needsRestart(a.cfg, next); section != "" {
		return fmt.Errorf("%s changed, which takes a restart of the agent; restart it, or undo that change to have the others reloaded", section)
	}
	if a.serving == nil { // the sockets are being opened just now
		if next.Listen.Native.Socket != a.cfg.Listen.Native.Socket || next.Admin.Socket != a.cfg.Admin.Socket {
			return errors.New("a socket moved while the agent was starting; have it reloaded again")
		}
		return a.applyLocked(ctx, next)
	}
	m, err := a.move(ctx, next)
	if err != nil {
		return err
	}
	if err := a.applyLocked(ctx, next); err != nil {
		return errors.Join(err, m.back())
	}
	m.take()
	return nil
}

// needsRestart names the first section that differs and that cannot change in
// a running agent; empty when there is none.
func needsRestart(old, next *Config) string {
	stays := old.Listen.Native.Socket == next.Listen.Native.Socket
	for _, section := range []struct {
		name      string
		old, next any
	}{
		{"trust_domain", old.TrustDomain, next.TrustDomain},
		{"state_dir", old.StateDir, next.StateDir},
		{"runtime_dir", old.RuntimeDir, next.RuntimeDir},
		{"listen.native.proofs", old.Listen.Native.Proofs, next.Listen.Native.Proofs},
		{"listen.native.mode (of a socket that stays where it is)", stays && old.Listen.Native.Mode != next.Listen.Native.Mode, false},
		{"listen.native.group (of a socket that stays where it is)", stays && old.Listen.Native.gid() != next.Listen.Native.gid(), false},
		{"admin.socket", old.Admin.Socket == "", next.Admin.Socket == ""},
		{"identity.workload_api", old.Identity.WorkloadAPI, next.Identity.WorkloadAPI},
		{"identity.bundle_max_age", old.Identity.BundleMaxAge, next.Identity.BundleMaxAge},
		{"identity.jwt_audience", old.Identity.JWTAudience, next.Identity.JWTAudience},
		{"identity.federated_trust_domains", old.Identity.FederatedTrustDomains, next.Identity.FederatedTrustDomains},
		{"audit", old.Audit, next.Audit},
		{"cache", old.Cache, next.Cache},
		{"store", old.Store, next.Store},
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
// directories: editors rename, Kubernetes swaps a symbolic link. Without events
// it still looks now and then.
func (a *Agent) watch(ctx context.Context) error {
	w := &watching{agent: a, used: a.configuration().read, lost: map[string]bool{}}
	var events <-chan fsnotify.Event // nil never tells anything
	var faults <-chan error
	if watcher, err := fsnotify.NewWatcher(); err != nil {
		a.logger.Warn("cannot watch for changes of the configuration", zap.Error(err))
	} else {
		defer func() { _ = watcher.Close() }() // nothing can be done about it
		w.watcher, events, faults = watcher, watcher.Events, watcher.Errors
	}
	w.directories()
	// Other files of these directories may change all the time (an audit log
	// does), so an event only makes the agent look, and what it sees must be the
	// same twice before it is read.
	look, anyway := time.NewTimer(settle), time.NewTicker(lookAnyway)
	defer look.Stop()
	defer anyway.Stop()
	for waiting := true; ; {
		select {
		case <-ctx.Done():
			return nil
		case err := <-faults:
			a.logger.Warn("watching the configuration", zap.Error(err))
		case <-events:
		case <-anyway.C:
			w.directories()
		case <-look.C:
			waiting = false
			if w.look(ctx) {
				continue
			}
		}
		if !waiting {
			look.Reset(settle)
			waiting = true
		}
	}
}

// watching is what one watch knows.
type watching struct {
	agent   *Agent
	watcher *fsnotify.Watcher // nil: the kernel has none left
	// used is the fingerprint of what was read last, seen that of the last look.
	used, seen string
	lost       map[string]bool // directories that could not be watched
}

// look reloads when the files have changed and stay as they are. It returns
// false when it wants to look again soon.
func (w *watching) look(ctx context.Context) bool {
	now := w.agent.configuration().fingerprint()
	settled := now == w.seen
	w.seen = now
	if !settled || now == w.used {
		return settled
	}
	w.used = now
	if _, err := w.agent.Reload(ctx); err != nil {
		return true // logged, and shown by status
	}
	// There may be other files now, and those have changed since they were read.
	w.used = w.agent.configuration().read
	w.directories()
	return false
}

// directories watches the directories of the files, also those that came, or
// came back, since it was called last.
func (w *watching) directories() {
	if w.watcher == nil {
		return
	}
	for _, f := range w.agent.configuration().files {
		dir := f
		if info, err := os.Stat(f); err != nil || !info.IsDir() {
			dir = filepath.Dir(f)
		}
		err := w.watcher.Add(dir)
		if err != nil && !w.lost[dir] {
			w.agent.logger.Warn("cannot watch for changes of the configuration", zap.String("directory", dir), zap.Error(err))
		}
		w.lost[dir] = err != nil
	}
}

// fingerprint changes when a file that the configuration is read from does, or
// one comes or goes. Only what the kernel says of the files is compared, so that
// looking is cheap.
func (c *Config) fingerprint() string { return stamp(c.files[0]) + c.othersFingerprint() }

// othersFingerprint is fingerprint without the configuration file itself.
func (c *Config) othersFingerprint() string {
	var b strings.Builder
	for _, pattern := range c.PolicyFiles {
		names, err := filepath.Glob(pattern)
		fmt.Fprintf(&b, "%q %q %v\n", pattern, names, err)
	}
	for _, f := range c.files[1:] {
		b.WriteString(stamp(f))
	}
	return b.String()
}

// stamp is what the kernel says of a file. Of a directory it is only that it is
// one: what else is in it does not matter.
func stamp(name string) string {
	var st unix.Stat_t
	err := unix.Stat(name, &st)
	if err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return fmt.Sprintf("%q directory\n", name)
	}
	return fmt.Sprintf("%q %v %d %d %d %o %d %d\n", name, err, st.Dev, st.Ino, st.Size, st.Mode, st.Mtim.Nano(), st.Ctim.Nano())
}
