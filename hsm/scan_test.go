package hsm_test

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"testing"

	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// Data keys that were wrapped and unwrapped, random that was drawn, and the PIN are nowhere in the memory of
// the process, neither in Go's nor in the module's.
func TestNothingIsLeftInMemory(t *testing.T) {
	soft := hsmtest.NewSoftHSM(t)
	program := soft.Path("scan")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program, "./testdata/scan")
	build.Env = append(os.Environ(), "CGO_ENABLED=1", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	masked := []byte(hsmtest.PIN)
	for i := range masked {
		masked[i] ^= 0x5c
	}
	scan := exec.CommandContext(t.Context(), program, softHSM, soft.PINFile(), soft.Dir(), hex.EncodeToString(masked))
	// As the agent starts plugins: signals save registers, with key material in them.
	scan.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1")
	out, err := scan.Output()
	if err != nil {
		t.Fatalf("scan: %v\n%s", err, out)
	}
	t.Logf("%s", out)
	var report struct {
		Control, Keys, Random, PIN, Regions int
		Bytes                               int64
	}
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("%s: %v", out, err)
	}
	if report.Control < 2 || report.Regions == 0 || report.Bytes < 1<<20 {
		t.Errorf("the search does not find a key that is kept on purpose: %s", out)
	}
	if report.Keys != 0 || report.Random != 0 || report.PIN != 0 {
		t.Errorf("%d pieces of data keys, %d of random and %d of the PIN are left, want none", report.Keys, report.Random, report.PIN)
	}
}
