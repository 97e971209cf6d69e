package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/cache/seal"
	"github.com/kms-agent/kms-agent/cache/seal/keyring"
	"github.com/kms-agent/kms-agent/cache/seal/tpm"
)

const (
	// storeName is the sealed store in state_dir, developmentKey the secret of the
	// sealer for development.
	storeName      = "data-keys.sealed"
	developmentKey = "data-keys.development-secret"

	// saveEvery and saveEveryTPM are how often what may wait is saved: a TPM's memory
	// takes about 100,000 writes.
	saveEvery    = 10 * time.Second
	saveEveryTPM = 10 * time.Minute

	bootIDFile = "/proc/sys/kernel/random/boot_id"
)

// store is the sealed store of an agent. A nil *store does nothing.
type store struct {
	file   *seal.Store // nil: it cannot be used
	sealer interface {
		seal.Sealer
		Close()
	}
	// development: the sealer protects nothing.
	development bool
	// unusable says why there is no file.
	unusable error
	// restored and refused are what became of it when the agent started.
	restored cache.Restored
	refused  error
}

// openStore opens what the configuration asks for. A sealer that cannot be used costs the
// store, not the agent; a store that is in use does.
func openStore(cfg *Config, logger *zap.Logger) (*store, error) {
	if cfg.Store.Sealer == "" {
		return nil, nil //nolint:nilnil // no store is an ordinary answer
	}
	s := &store{development: cfg.Store.Sealer == SealerFile}
	if s.development {
		logger.Warn("the sealed store is for DEVELOPMENT ONLY: it protects no data key", zap.String("directory", cfg.StateDir))
	}
	if s.unusable = s.openSealer(cfg); s.unusable == nil {
		s.file, s.unusable = seal.OpenStore(filepath.Join(cfg.StateDir, storeName), s.sealer)
	}
	if s.unusable == nil {
		return s, nil
	}
	if errors.Is(s.unusable, seal.ErrBusy) || errors.Is(s.unusable, seal.ErrMemory) {
		s.close()
		return nil, s.unusable
	}
	logger.Error("no sealed store: data keys end with this process", zap.Error(s.unusable))
	return s, nil
}

// developmentWarning is what check and status say of the sealer for development.
const developmentWarning = "is for DEVELOPMENT ONLY: the secret is a file beside the store, so that it keeps no data key from who " +
	"reads the disk, and cannot tell an older copy; use keyring or tpm"

func (s *store) openSealer(cfg *Config) error {
	switch cfg.Store.Sealer {
	case SealerTPM:
		t, err := tpm.Open(tpm.Config{Device: cfg.Store.TPM.Device, Index: uint32(cfg.Store.TPM.Index)})
		if err != nil {
			return err
		}
		s.sealer = t
	case SealerFile:
		f, err := seal.OpenFile(filepath.Join(cfg.StateDir, developmentKey))
		if err != nil {
			return err
		}
		s.sealer = f
	default:
		k, err := keyring.Open(keyringName(cfg.StateDir))
		if err != nil {
			return err
		}
		s.sealer = k
	}
	return nil
}

// keyringName is that of the state directory's secret: each agent has its own.
func keyringName(stateDir string) string {
	const length = 16
	sum := sha256.Sum256([]byte(stateDir))
	return "store-" + hex.EncodeToString(sum[:length])
}

// config is the store for the cache; nil for none.
func (s *store) config(cfg *Config) *cache.StoreConfig {
	if s == nil || s.file == nil {
		return nil
	}
	c := &cache.StoreConfig{File: s.file, Wall: time.Now, Boot: bootID(), Every: saveEvery}
	if cfg.Store.Sealer == SealerTPM {
		c.Every, c.Wears = saveEveryTPM, true
	}
	return c
}

// bootID names this boot; empty: the kernel does not tell, and no store is of it.
func bootID() string {
	id, err := os.ReadFile(bootIDFile)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(id))
}

func (s *store) close() {
	if s == nil {
		return
	}
	if s.file != nil {
		s.file.Close()
	}
	if s.sealer != nil {
		s.sealer.Close()
	}
}

// restore takes in what is stored, before the doors open. A store that is refused is
// told, and costs a cold start; without memory for it there is no start.
func (a *Agent) restore() error {
	s := a.store
	if s == nil || s.file == nil {
		return nil
	}
	began := time.Now()
	restored, err := a.service.Restore()
	a.mu.Lock()
	s.restored, s.refused = restored, err
	a.mu.Unlock()
	switch {
	case err == nil:
		a.logger.Info("sealed store read", zap.Stringer("sealer", s.sealer), zap.Int("data_keys", restored.DataKeys),
			zap.Int("spares", restored.Spares), zap.Int("dropped", restored.Dropped), zap.Int("revoked", restored.Refused),
			zap.Int("outages", restored.Down), zap.Duration("age", restored.Age), zap.Duration("took", time.Since(began)))
		if restored.ClockBehind {
			a.logger.Warn("the time of day is before one that has been: what was stored serves nobody before its backend confirms it")
		}
	case errors.Is(err, seal.ErrMemory):
		return err
	case errors.Is(err, seal.ErrRolledBack):
		a.logger.Error("sealed store refused: somebody put an older state in its place; the agent starts without it", zap.Error(err))
	default:
		a.logger.Warn("sealed store refused; the agent starts without it", zap.Error(err), zap.String("reason", refusal(err)))
	}
	return nil
}

// refusal is why a store is refused, in one word.
func refusal(err error) string {
	for _, r := range []struct {
		err  error
		word string
	}{
		{seal.ErrRolledBack, "rolled-back"},
		{seal.ErrForeign, "foreign"},
		{seal.ErrDamaged, "damaged"},
		{seal.ErrTruncated, "truncated"},
		{seal.ErrNewer, "newer"},
		{seal.ErrInsecure, "insecure"},
		{seal.ErrNotStore, "not-a-store"},
		{seal.ErrUnavailable, "unavailable"},
	} {
		if errors.Is(err, r.err) {
			return r.word
		}
	}
	return "unreadable"
}

// storeStatus is nil without a store.
func (a *Agent) storeStatus() *adminv1.StoreStatus {
	s := a.store
	if s == nil {
		return nil
	}
	out := &adminv1.StoreStatus{Development: s.development}
	if s.sealer != nil {
		out.Sealer = s.sealer.String()
	}
	if s.unusable != nil {
		out.Problem = s.unusable.Error()
		return out
	}
	stats := a.service.StoreStats()
	out.DataKeys, out.Wanted, out.Saved = stats.DataKeys, stats.Wanted, timestamp(stats.Saved)
	out.Saves, out.Failures = stats.Saves, stats.Failures
	a.mu.Lock()
	restored, refused := s.restored, s.refused
	a.mu.Unlock()
	out.Restored, out.Age, out.ClockBehind = uint64(restored.DataKeys+restored.Spares), durationpb.New(restored.Age), restored.ClockBehind
	if refused != nil {
		out.Refused, out.RefusedReason = refused.Error(), refusal(refused)
	}
	switch {
	case stats.Err != nil:
		out.Problem = stats.Err.Error()
	case refused != nil && stats.Saves == stats.Failures:
		out.Problem = "the agent started without it: " + refused.Error()
	case stats.Wanted > stats.DataKeys:
		out.Problem = fmt.Sprintf("only %d of %d data keys fit in", stats.DataKeys, stats.Wanted)
	}
	return out
}
