// Package test holds what needs the whole program: the map of its packages,
// end-to-end runs and other people's clients.
package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/kms-agent/kms-agent"

// allowed is the map: which packages of ours a package may import. A new room
// needs a line, a new arrow a reason. The generated api/ may be imported from
// everywhere that has it listed. "x/*" stands for every package below x.
func allowed() map[string][]string {
	return map[string][]string{
		"api/*": {},

		// Leaves: they know nothing of each other.
		"cache":           {"cache/seal"}, // its data keys outlive the process in a sealed store
		"cache/seal":      {},
		"cache/seal/*":    {"cache/seal"}, // each sealer
		"envelope":        {},
		"hsm":             {"hsm/internal/cryptoki"},
		"hsm/internal/*":  {},
		"hsm/hsmtest":     {},
		"identity":        {},
		"identity/issuer": {"identity"},
		"plugins":         {"api/plugin/v1"},
		"agent/policy":    {"identity"},
		"agent/audit":     {},
		"agent/census":    {},
		"agent/quota":     {},

		"plugins/host":       {"api/plugin/v1", "plugins"},
		"plugins/plugintest": {"plugins", "plugins/host"},
		"plugins/local":      {"plugins"},
		"plugins/pkcs11":     {"hsm", "plugins"},

		"agent/random":       {"cache", "plugins"},
		"agent/kms":          {"agent/audit", "agent/census", "agent/policy", "agent/quota", "agent/random", "cache", "envelope", "identity", "plugins"},
		"agent/serve":        {"agent/kms", "api/admin/v1", "identity"},
		"agent/metrics":      {"agent/audit", "api/admin/v1"},
		"agent/serve/native": {"agent/kms", "agent/serve", "api/kmsagent/v1", "envelope"},
		"agent/serve/admin":  {"agent/kms", "agent/serve", "api/admin/v1"},
		"agent": {
			"agent/audit", "agent/census", "agent/kms", "agent/metrics", "agent/policy", "agent/quota", "agent/random", "agent/serve", "agent/serve/*", "api/admin/v1", "api/kmsagent/v1",
			"cache", "cache/seal", "cache/seal/*", "envelope", "identity", "identity/issuer", "plugins", "plugins/host", "plugins/local",
		},
		"client": {"api/*", "envelope"},
		"cmd/kms-agent": {
			"agent", "agent/audit", "agent/kms", "agent/policy", "api/*", "client", "cmd/kms-agent/renew", "identity", "plugins", "plugins/local",
		},
		// It looks at headers by itself, to know what need not go to the agent.
		"cmd/kms-agent/renew": {"api/kmsagent/v1", "client", "envelope"},
		"test":                {},
		// Examples use what anybody may.
		"examples/backup": {},
		"examples/keydir": {"plugins"},
		"test/bench":      {"api/*"},
		"test/soak":       {"api/*"},
		"test/chaos":      {"api/*", "client", "envelope", "hsm/hsmtest", "identity/issuer"},
		"test/interop":    {"envelope"},
	}
}

// forbidden modules: what a package must not import even from outside.
func forbidden() map[string][]string {
	wire := []string{"google.golang.org/grpc", "net/http", "go.uber.org/zap", "github.com/hashicorp/go-plugin"}
	logging := []string{"go.uber.org/zap"}
	return map[string][]string{
		"agent/kms":     wire,
		"agent/policy":  wire,
		"agent/audit":   wire,
		"agent/quota":   wire,
		"agent/random":  wire,
		"cache":         wire,
		"envelope":      {"github.com/", "golang.org/", "google.golang.org/", "go.uber.org/"},
		"plugins/local": logging,
	}
}

type pkg struct {
	ImportPath string
	Imports    []string
	CgoFiles   []string
}

func TestImportMap(t *testing.T) {
	known := map[string]bool{}
	for _, p := range list(t) {
		name := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		rule, rules := lookup(name)
		if rules == nil && rule == "" {
			t.Errorf("package %s is not on the map of test/imports_test.go: add a line for it", name)
			continue
		}
		known[rule] = true
		for _, imported := range p.Imports {
			if of, ok := strings.CutPrefix(imported, module+"/"); ok && !matchesAny(rules, of) {
				t.Errorf("%s imports %s, an arrow that the map does not have; allowed are %v", name, of, rules)
			}
			for _, never := range forbidden()[name] {
				if imported == never || strings.HasPrefix(imported, strings.TrimSuffix(never, "/")+"/") {
					t.Errorf("%s imports %s, which its room forbids", name, imported)
				}
			}
		}
		if len(p.CgoFiles) > 0 && name != "hsm/internal/cryptoki" {
			t.Errorf("%s uses cgo (%v); only hsm/internal/cryptoki may", name, p.CgoFiles)
		}
	}
	if len(known) < 10 {
		t.Errorf("only %d packages were checked: go list does not see the module", len(known))
	}
}

func lookup(name string) (string, []string) {
	rules := allowed()
	if r, ok := rules[name]; ok {
		return name, r
	}
	for pattern, r := range rules {
		if ok := matches(pattern, name); ok {
			return pattern, r
		}
	}
	return "", nil
}

func matchesAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, name) })
}

func matches(pattern, name string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "/*"); ok {
		return strings.HasPrefix(name, prefix+"/")
	}
	return path.Clean(pattern) == name
}

func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports,CgoFiles", "./...")
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %v\n%s", err, exit.Stderr)
		}
		t.Fatalf("go list: %v", err)
	}
	var packages []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
}
