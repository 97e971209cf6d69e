package seal_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestNothingIsLeftInMemory runs a program of the release build's kind that
// saves and loads data keys and then searches its own memory for them.
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
	}
	must(t, json.Unmarshal(out, &report))
	t.Logf("%s", out)
	if report.Control < 2 || report.Regions == 0 || report.Bytes < 1<<20 {
		t.Errorf("the search does not find both halves of a key that is kept on purpose: %s", out)
	}
	if want := 2 * (16 + 1); report.InUse != want {
		t.Errorf("%d pieces of 16 loaded data keys and a secret, want %d: both halves of each, in protected memory alone", report.InUse, want)
	}
	if report.Left != 0 {
		t.Errorf("%d pieces are left after Free and Close, want none", report.Left)
	}
}
