package agent_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent"
)

// A file that is being written is not believed, whatever it says.
func TestAFileThatChangesWhileItIsReadIsRefused(t *testing.T) {
	path := t.TempDir() + "/config.yaml"
	writeFile(t, path, smallest)
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := file.WriteString("\n"); err != nil {
					return
				}
				_ = file.Truncate(int64(len(smallest)))
			}
		}
	}()
	var refused error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		_, _, err := agent.ReadConfig(path)
		if err != nil {
			refused = err
			break
		}
	}
	close(stop)
	<-stopped
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	if refused == nil || !strings.Contains(refused.Error(), "changed while it was read") {
		t.Errorf("a file that changes all the time was read: %v", refused)
	}
	if _, _, err := agent.ReadConfig(path); err != nil {
		t.Errorf("when nobody writes any more: %v", err)
	}
}
