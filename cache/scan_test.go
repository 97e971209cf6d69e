package cache_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestNothingIsLeftInMemory runs a program of the release build's kind that
// takes data keys through the cache, the message format and a store, and then searches
// its own memory for them.
func TestNothingIsLeftInMemory(t *testing.T) {
	program := filepath.Join(t.TempDir(), "scan")
	build := exec.Command("go", "build", "-o", program, "./testdata/scan")
	build.Env = append(os.Environ(), "GOEXPERIMENT=runtimesecret", "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	out, err := exec.Command(program, t.TempDir()).Output()
	if err != nil {
		t.Fatalf("scan: %v", err)
	}
	var report struct {
		Control, InUse, Left, Regions int
		Bytes                         int64
		Memory                        string
	}
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("%s: %v", out, err)
	}
	t.Logf("%s", out)
	if report.Control < 2 || report.Regions == 0 || report.Bytes < 1<<20 {
		t.Errorf("the search does not find both halves of a key that is kept on purpose: %s", out)
	}
	protected := 0
	if report.Memory == "mlock" {
		protected = 2 // both halves: no other process reads it, but this one does
	}
	if report.InUse != protected {
		t.Errorf("%d pieces of a data key in use outside of protected memory, want none", report.InUse-protected)
	}
	if report.Left != 0 {
		t.Errorf("%d pieces of data keys are left after eviction and release, want none", report.Left)
	}
}
