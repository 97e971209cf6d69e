package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The drill that operators run: an outage from its beginning to its end, and a
// revocation, with the real agent.
func TestDrill(t *testing.T) {
	dependOnSource(t)
	agent := filepath.Join(t.TempDir(), "kms-agent")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", agent, "./cmd/kms-agent")
	build.Dir, build.Env = "..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	cmd := exec.CommandContext(t.Context(), "scripts/drill")
	cmd.Dir, cmd.Env = "..", append(os.Environ(), "KMS_AGENT="+agent)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{
		"a new message: cached", "a new message: grace", "a new message: reason BACKEND_UNAVAILABLE", "outage of a backend is over",
		"a new message: reason KEY", "whole and unchanged", "the drill is over",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the output has no %q:\n%s", want, out)
		}
	}
}
