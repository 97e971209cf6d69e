package host

import (
	"os"
	"sync"
	"testing"
)

// Hosts that start at the same time clear away what killed ones have left, and
// never each other's directories.
func TestSocketDirsOfManyHosts(t *testing.T) {
	parent := t.TempDir()
	stale, err := os.MkdirTemp(parent, dirPattern)
	if err != nil {
		t.Fatal(err)
	}
	var hosts sync.WaitGroup
	for range 8 {
		hosts.Go(func() {
			for range 50 {
				dir, err := newSocketDir(parent)
				if err != nil {
					t.Error(err)
					return
				}
				if err := os.WriteFile(dir.path+"/socket", nil, 0o600); err != nil {
					t.Errorf("another host took the directory: %v", err)
				}
				if err := dir.remove(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	hosts.Wait()
	if _, err := os.Stat(stale); err == nil {
		t.Error("the stale directory is still there")
	}
}
