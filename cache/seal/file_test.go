package seal_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kms-agent/kms-agent/cache/seal"
)

func TestFileSealer(t *testing.T) {
	dir := t.TempDir()
	path, storePath := filepath.Join(dir, "sealer"), filepath.Join(dir, "store")
	sealer, err := seal.OpenFile(path)
	must(t, err)
	store := open(t, storePath, sealer)
	must(t, store.Save(records("old")))
	oldStore, oldSealer := read(t, storePath), read(t, path)
	must(t, store.Save(records("new")))
	store.Close()
	sealer.Close()
	if _, err := sealer.Advance(); !errors.Is(err, seal.ErrUnavailable) {
		t.Errorf("Advance after Close: got %v, want ErrUnavailable", err)
	}
	if _, err := sealer.Seal(nil, nil, nil); !errors.Is(err, seal.ErrUnavailable) {
		t.Errorf("Seal after Close: got %v, want ErrUnavailable", err)
	}
	load := func(what string, want []seal.Record, wantErr error) {
		t.Helper()
		again, err := seal.OpenFile(path)
		must(t, err)
		defer again.Close()
		wantLoad(t, what, storePath, again, want, wantErr)
	}
	load("restarted", records("new"), nil)
	write(t, storePath, oldStore)
	load("the store alone rolled back", nil, seal.ErrRolledBack)
	write(t, path, oldSealer)
	load("both rolled back, which it cannot refuse", records("old"), nil)
	must(t, os.Remove(path))
	load("another secret", nil, seal.ErrForeign)
	if s := sealer.String(); !strings.Contains(s, "DEVELOPMENT ONLY") || !strings.Contains(s, "cannot refuse") {
		t.Errorf("String does not warn: %s", s)
	}
}

func TestFileSealerRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sealer")
	for what, prepare := range map[string]func() error{
		"short": func() error { return os.WriteFile(path, make([]byte, 39), 0o600) },
		"long":  func() error { return os.WriteFile(path, make([]byte, 41), 0o600) },
		"mode":  func() error { return errors.Join(os.WriteFile(path, make([]byte, 40), 0o600), os.Chmod(path, 0o644)) },
		"place": func() error { return os.Chmod(filepath.Dir(path), 0o777) },
	} {
		must(t, prepare())
		if _, err := seal.OpenFile(path); !errors.Is(err, seal.ErrUnavailable) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v, want ErrUnavailable with the path", what, err)
		}
		must(t, os.Chmod(filepath.Dir(path), 0o700), os.RemoveAll(path))
	}
}
