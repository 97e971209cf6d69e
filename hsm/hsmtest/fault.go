// Package hsmtest has what tests of HSMs need: a token of SoftHSM, and a module that
// misbehaves as it is told, before a real one.
package hsmtest

import (
	_ "embed"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

//go:embed module/fault.c
var faultSource string

//go:embed module/loop.c
var loopSource string

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
	compile(t, hsmDir, f.Module, faultSource, "-shared", "-fPIC", "-fvisibility=hidden")
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
	for _, rule := range rules {
		if !ruleForm().MatchString(rule) {
			f.t.Fatalf("%q is no rule: module/fault.c describes them", rule)
		}
	}
	next := f.rules + ".next"
	if err := os.WriteFile(next, []byte(strings.Join(rules, "\n")+"\n"), 0o600); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Rename(next, f.rules); err != nil {
		f.t.Fatal(err)
	}
}

// ruleForm is what the module understands: it says nothing of what it does not.
func ruleForm() *regexp.Regexp {
	return regexp.MustCompile(`^((C_[A-Za-z]+|\*)( (skip|count|sleep_ms|exit)=\d+| rv=(0x)?[0-9a-fA-F]+| (segv|abort|hang))+|iv (written|appended-12|appended-16|prepended-12|fixed|short-tag)|dead|no-slots|lossy)$`)
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

// NewLoop builds module/loop.c, what C alone makes of a token, and returns its path.
func NewLoop(t testing.TB, hsmDir string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "loop")
	compile(t, hsmDir, path, loopSource, "-O2")
	return path
}

func compile(t testing.TB, hsmDir, result, source string, flags ...string) {
	t.Helper()
	file := result + ".c"
	if err := os.WriteFile(file, []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	args := slices.Concat(flags, []string{"-Wall", "-Werror", "-I", filepath.Join(hsmDir, header), "-o", result, file, "-ldl", "-lpthread"})
	build := exec.CommandContext(t.Context(), "cc", args...) //nolint:gosec // paths of the test
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", result, err, out)
	}
}
