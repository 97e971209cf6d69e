package test

import (
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The FIPS build runs the whole quick start (issuer, mTLS, plugin, keystore,
// messages, audit chain) where everything that is not approved panics or fails.
func TestFIPSBuild(t *testing.T) {
	dependOnSource(t)
	agent := filepath.Join(t.TempDir(), "kms-agent")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", agent, "./cmd/kms-agent")
	build.Dir = ".."
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFIPS140=certified", "GOEXPERIMENT=runtimesecret")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	run := func(program string, args ...string) string {
		cmd := exec.CommandContext(t.Context(), program, args...)
		cmd.Dir = ".."
		cmd.Env = append(os.Environ(), "GODEBUG=fips140=only", "KMS_AGENT="+agent)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	var version struct{ FIPS140, FIPS140Build string }
	text := strings.ReplaceAll(run(agent, "version", "--output", "json"), "fips140_build", "fips140build")
	if err := json.Unmarshal([]byte(text), &version); err != nil {
		t.Fatal(err)
	}
	if version.FIPS140 != "v1.0.0" || version.FIPS140Build != version.FIPS140 {
		t.Errorf("kms-agent reports the module %q, built with %q; want the certified v1.0.0", version.FIPS140, version.FIPS140Build)
	}
	out := run("scripts/quickstart")
	if strings.Count(out, "v1.0.0") < 2 {
		t.Errorf("agent and plugin do not both report their module:\n%s", out)
	}
}

// dependOnSource lets go test see that its answer depends on the program's
// source, which only a child process reads.
func dependOnSource(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "node_modules" || d.Name() == ".git" || d.Name() == "bin") {
			return filepath.SkipDir
		}
		if strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "go.mod") {
			_, err = os.Stat(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
