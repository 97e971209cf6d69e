package tpm_test

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/cache/seal/tpm"
)

const (
	scanVariable = "KMS_AGENT_TPM_TEST_SCAN"
	mask         = 0x5c
	piece        = 16 // bytes in a row that count as a copy: half of the secret
)

// TestNothingIsLeftInMemory searches a test process of the release build's kind
// for what the TPM library leaves of the secret: a dozen copies after five loads
// in a build without runtimesecret.
func TestNothingIsLeftInMemory(t *testing.T) {
	if os.Getenv(scanVariable) == "" {
		child := exec.CommandContext(t.Context(), "go", "test", "-count=1", "-run=^TestNothingIsLeftInMemory$", ".")
		child.Env = append(os.Environ(), scanVariable+"=1", "GOEXPERIMENT=runtimesecret", "CGO_ENABLED=0", "GOFLAGS=")
		if out, err := child.CombinedOutput(); err != nil {
			t.Fatalf("release build: %v\n%s", err, out)
		}
		return
	}
	s := newEmulator(t).open(t)
	sealed, err := s.Seal(nil, []byte("x"), nil)
	must(t, err)
	masked, err := tpm.MaskedSecret(s, mask)
	must(t, err)
	if inUse := search(t, masked[:piece]); inUse == 0 {
		t.Error("the search does not find the secret in use")
	}
	for range 5 {
		tpm.Forget(s)
		_, err := s.Open(nil, sealed, nil)
		must(t, err)
	}
	tpm.Forget(s)
	for _, half := range [][]byte{masked[:piece], masked[piece:]} {
		if left := search(t, half); left != 0 {
			t.Errorf("%d copies of half the secret are left", left)
		}
	}
}

// search counts a pattern, given masked, in this process's writable memory, once
// all that is not reachable is erased.
func search(t *testing.T, masked []byte) int {
	t.Helper()
	for range 3 {
		runtime.GC()
		time.Sleep(10 * time.Millisecond) // the sweeper and finalizers run
	}
	maps, err := os.ReadFile("/proc/self/maps")
	must(t, err)
	mem, err := os.Open("/proc/self/mem")
	must(t, err)
	defer func() { _ = mem.Close() }()
	found := 0
	buffer := make([]byte, 64<<10)
	for line := range strings.Lines(string(maps)) {
		var low, high uint64
		var mode string
		_, err := fmt.Sscanf(line, "%x-%x %s", &low, &high, &mode)
		must(t, err)
		if !strings.HasPrefix(mode, "rw") {
			continue
		}
		region := io.NewSectionReader(mem, int64(low), int64(high-low))
		for at := int64(0); at < region.Size(); at += int64(len(buffer)) - piece + 1 {
			clear(buffer) // it is searched too
			n, _ := region.ReadAt(buffer, at)
			found += count(buffer[:n], masked)
		}
	}
	clear(buffer)
	return found
}

func count(b, masked []byte) int {
	found := 0
	for i := 0; i+piece <= len(b); i++ {
		j := 0
		for j < piece && b[i+j]^mask == masked[j] {
			j++
		}
		if j == piece {
			found++
		}
	}
	return found
}
