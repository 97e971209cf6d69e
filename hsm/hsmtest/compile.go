package hsmtest

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

//go:embed module/fault.c
var faultSource string

//go:embed module/rules.c
var rulesSource string

//go:embed module/rules.h
var rulesHeader string

//go:embed module/loop.c
var loopSource string

// header is ../internal/cryptoki/cryptoki.h, which all is compiled with.
const header = "internal/cryptoki"

// fault is the module, compiled once for all tests of a binary.
//
//nolint:gochecknoglobals // what it keeps is the same for every test
var fault struct {
	once   sync.Once
	module []byte
	err    error
}

func faultModule(hsmDir string) ([]byte, error) {
	fault.once.Do(func() {
		dir, err := os.MkdirTemp("", "fault")
		if err != nil {
			fault.err = err
			return
		}
		defer func() { _ = os.RemoveAll(dir) }()
		sources := map[string]string{"fault.c": faultSource, "rules.c": rulesSource, "rules.h": rulesHeader}
		module := filepath.Join(dir, "fault.so")
		if fault.err = compile(hsmDir, module, sources, "-shared", "-fPIC", "-fvisibility=hidden"); fault.err == nil {
			fault.module, fault.err = os.ReadFile(module)
		}
	})
	return fault.module, fault.err
}

// NewLoop builds module/loop.c, what C alone makes of a token, and returns its path.
func NewLoop(t testing.TB, hsmDir string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "loop")
	if err := compile(hsmDir, path, map[string]string{"loop.c": loopSource}); err != nil {
		t.Fatal(err)
	}
	return path
}

// compile makes result of sources, which it writes beside it.
func compile(hsmDir, result string, sources map[string]string, flags ...string) error {
	dir := filepath.Dir(result)
	var files []string
	for name, source := range sources {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(source), 0o600); err != nil {
			return err
		}
		if strings.HasSuffix(name, ".c") {
			files = append(files, file)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	args := slices.Concat(flags, []string{"-O2", "-Wall", "-Wextra", "-Werror", "-I", filepath.Join(hsmDir, header), "-o", result}, files, []string{"-ldl", "-lpthread"})
	if out, err := exec.CommandContext(ctx, "cc", args...).CombinedOutput(); err != nil { //nolint:gosec // paths of the test
		return fmt.Errorf("build %s: %w\n%s", result, err, out)
	}
	return nil
}
