// Package hsmtest has what tests of HSMs need: a module that misbehaves as it is
// told, before a real one.
package hsmtest

import (
	_ "embed"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

//go:embed module/fault.c
var faultSource string

// header is ../internal/cryptoki/cryptoki.h, which fault.c is compiled with.
const header = "internal/cryptoki"

// Fault is a PKCS#11 module that passes its calls to another one, and does what its
// rules say instead; module/fault.c describes them.
type Fault struct {
	// Module is its path.
	Module       string
	rules, calls string
	t            testing.TB
}

// NewFault builds the module before the one at path. hsmDir is the directory of
// package hsm, seen from the test. Its environment is that of the test.
func NewFault(t testing.TB, hsmDir, path string) *Fault {
	t.Helper()
	dir := t.TempDir()
	f := &Fault{Module: filepath.Join(dir, "fault.so"), rules: filepath.Join(dir, "rules"), calls: filepath.Join(dir, "calls"), t: t}
	source := filepath.Join(dir, "fault.c")
	if err := os.WriteFile(source, []byte(faultSource), 0o600); err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(t.Context(), "cc", //nolint:gosec // paths of the test "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-fvisibility=hidden",
		"-I", filepath.Join(hsmDir, header), "-o", f.Module, source, "-ldl", "-lpthread")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the fault module: %v\n%s", err, out)
	}
	f.Set()
	t.Setenv("KMS_AGENT_FAULT_MODULE", path)
	t.Setenv("KMS_AGENT_FAULT_RULES", f.rules)
	t.Setenv("KMS_AGENT_FAULT_CALLS", f.calls)
	return f
}

// Env is the environment for other processes that load the module.
func (f *Fault) Env() []string {
	return []string{
		"KMS_AGENT_FAULT_MODULE=" + os.Getenv("KMS_AGENT_FAULT_MODULE"), "KMS_AGENT_FAULT_RULES=" + f.rules, "KMS_AGENT_FAULT_CALLS=" + f.calls,
	}
}

// Set replaces the rules; without any the module behaves.
func (f *Fault) Set(rules ...string) {
	f.t.Helper()
	next := f.rules + ".next"
	if err := os.WriteFile(next, []byte(strings.Join(rules, "\n")+"\n"), 0o600); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Rename(next, f.rules); err != nil {
		f.t.Fatal(err)
	}
}

// Calls returns how often each function was called, and forgets it.
func (f *Fault) Calls() map[string]int {
	f.t.Helper()
	content, err := os.ReadFile(f.calls)
	if err != nil && !os.IsNotExist(err) {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(f.calls, nil, 0o600); err != nil {
		f.t.Fatal(err)
	}
	n := map[string]int{}
	for line := range strings.Lines(string(content)) {
		n[strings.TrimSpace(line)]++
	}
	return n
}
