package host_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/plugins/host"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

// openFile opens a file of a test with a content, under a name.
func openFile(t *testing.T, name, content string) (*os.File, string) {
	t.Helper()
	path := file(t, content)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { _ = f.Close() })
	return f, path
}

// A plugin is handed the descriptors that its configuration names, also what it could
// not open itself and after it was replaced. Neither another plugin nor what it starts
// has them.
func TestDescriptorsAreHandedOver(t *testing.T) {
	for _, mode := range []string{"this program", "a checked program"} {
		t.Run(mode, func(t *testing.T) { handsOver(t, mode == "a checked program") })
	}
}

func handsOver(t *testing.T, checked bool) {
	first, path := openFile(t, "hsm-pin", "1234")
	second, _ := openFile(t, "other", "5678")
	cfg := config(t, puppetSettings{})
	if checked {
		cfg.Self = false
		cfg.Command, cfg.SHA256 = program(t)
	}
	cfg.Descriptors = []*os.File{second, first} // so that the numbers cross
	s := plugintest.Start(t, cfg)
	for round := range 2 {
		for name, want := range map[string]string{"hsm-pin": "1234", "other": "5678"} {
			if got, err := order(t, s, "descriptor "+name); err != nil || got != want {
				t.Errorf("round %d, %s: %q, %v, want %q", round, name, got, err, want)
			}
		}
		if got, err := order(t, s, "files "+path); err != nil || got != "0" {
			t.Errorf("round %d: a child of the plugin has it %s times, %v", round, got, err)
		}
		if _, err := order(t, s, "read "+path); err == nil {
			t.Error("the confined plugin opens the file itself")
		}
		if err := s.Replace(bounded(t)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := order(t, s, "descriptor nothing"); err == nil || !strings.Contains(err.Error(), "descriptors of the backend") {
		t.Errorf("a descriptor that is not handed over: %v", err)
	}
	other := plugintest.Start(t, config(t, puppetSettings{}))
	for fd := range 64 {
		if got, err := order(t, other, fmt.Sprintf("proc fd/%d", fd)); err == nil && got == path {
			t.Errorf("another plugin has descriptor %d: %s", fd, got)
		}
	}
}

func TestTooManyDescriptors(t *testing.T) {
	cfg := config(t, puppetSettings{})
	cfg.Descriptors = make([]*os.File, host.MaxDescriptors+1)
	if _, err := host.New(cfg); err == nil || !strings.Contains(err.Error(), "descriptors") {
		t.Errorf("New: %v, want a refusal", err)
	}
}
