package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The quick start with an HSM: the real plugin process, confined, over SoftHSM; keys
// made and rotated on the token by the command; a killed plugin, while which what is cached serves.
func TestQuickstartWithHSM(t *testing.T) {
	dependOnSource(t)
	dir := t.TempDir()
	agent, plugin := filepath.Join(dir, "kms-agent"), filepath.Join(dir, "kms-agent-pkcs11")
	for binary, how := range map[string][]string{agent: {"./cmd/kms-agent", "CGO_ENABLED=0"}, plugin: {"./plugins/pkcs11", "CGO_ENABLED=1"}} {
		build := exec.CommandContext(t.Context(), "go", "build", "-o", binary, how[0])
		build.Dir, build.Env = "..", append(os.Environ(), how[1])
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	cmd := exec.CommandContext(t.Context(), "scripts/quickstart-hsm")
	cmd.Dir, cmd.Env = "..", append(os.Environ(), "KMS_AGENT="+agent, "KMS_AGENT_PKCS11="+plugin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"aes-gcm          CKM_AES_GCM: works", "encrypted under orders version 1", "encrypted under orders version 2", "of hsm mixed with the system's", "config.yaml: no faults (", "stopped cleanly"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the output has no %q:\n%s", want, out)
		}
	}
	if n := strings.Count(string(out), "the plaintext is the same, byte for byte"); n != 2 {
		t.Errorf("the plaintext was the same %d times, want 2:\n%s", n, out)
	}
}
