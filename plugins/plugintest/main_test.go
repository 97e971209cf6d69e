package plugintest_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

func TestMain(m *testing.M) {
	plugintest.ServeIfChild(map[string]func() plugins.Backend{
		"memory": func() plugins.Backend { return &plugintest.Memory{} },
	})
	goleak.VerifyTestMain(m)
}

// switches are what tests do to the key of a Memory.
type switches struct{ disable, ail func(t *testing.T) }

func memorySettings(t *testing.T) (json.RawMessage, switches) {
	t.Helper()
	s := plugintest.MemorySettings{
		Keys:       map[string]int{"memory:orders": 2, "memory:other": 1},
		DisabledBy: filepath.Join(t.TempDir(), "disabled"),
		Ill:        "memory:orders", IllBy: filepath.Join(t.TempDir(), "ill"),
	}
	settings, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return settings, switches{by(s.DisabledBy), by(s.IllBy)}
}

// by makes a file.
func by(path string) func(t *testing.T) {
	return func(t *testing.T) {
		t.Helper()
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func instance(b plugins.Backend, s switches) plugintest.Instance {
	return plugintest.Instance{
		Backend: b, Key: plugins.KeyRef{URI: "memory:orders", Version: "2"}, Other: plugins.KeyRef{URI: "memory:other", Version: "1"},
		Missing: "memory:missing", Disable: s.disable, Ail: s.ail, Random: true,
	}
}

func TestMemoryWithoutRandom(t *testing.T) {
	plugintest.Run(t, func(t *testing.T) plugintest.Instance {
		settings, err := json.Marshal(plugintest.MemorySettings{
			Keys: map[string]int{"memory:orders": 2, "memory:other": 1}, NoRandom: true,
		})
		if err != nil {
			t.Fatal(err)
		}
		i := instance(plugintest.OverTheWire(t, "memory", settings), switches{})
		i.Random = false
		return i
	})
}

func TestMemory(t *testing.T) {
	plugintest.Run(t, func(t *testing.T) plugintest.Instance {
		settings, s := memorySettings(t)
		b := &plugintest.Memory{}
		if _, err := b.Open(t.Context(), settings); err != nil {
			t.Fatal(err)
		}
		return instance(b, s)
	})
}

func TestMemoryOverTheWire(t *testing.T) {
	plugintest.Run(t, func(t *testing.T) plugintest.Instance {
		settings, s := memorySettings(t)
		return instance(plugintest.OverTheWire(t, "memory", settings), s)
	})
}

// A backend that says that it sees contexts is known to, once its process is up.
func TestMemoryThatSeesContexts(t *testing.T) {
	settings, err := json.Marshal(plugintest.MemorySettings{Keys: map[string]int{"memory:orders": 1}, DeniedTenant: "evil"})
	if err != nil {
		t.Fatal(err)
	}
	b := plugintest.OverTheWire(t, "memory", settings)
	if sees, known := b.SeesContext(); !sees || !known {
		t.Error("the backend sees contexts, and is not known to")
	}
	_, err = b.Wrap(t.Context(), plugins.KeyRef{URI: "memory:orders", Version: "1"}, []byte("m"), plugins.Binding{ContextBound: true, Context: map[string]string{"tenant": "evil"}})
	if plugins.ClassOf(err) != plugins.Denied {
		t.Errorf("the tenant that is denied: %v", err)
	}
	settings, _ = memorySettings(t)
	if sees, known := plugintest.OverTheWire(t, "memory", settings).SeesContext(); sees || !known {
		t.Error("one without the capability sees contexts")
	}
}
