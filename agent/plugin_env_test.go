package agent_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/kms-agent/kms-agent/agent"
)

// Plugins are not preempted by signals, which would save registers that hold key
// material to a stack that is not erased.
func TestPluginsTakeNoSignals(t *testing.T) {
	for own, want := range map[string]string{"": "GODEBUG=asyncpreemptoff=1", "gctrace=0": "GODEBUG=gctrace=0,asyncpreemptoff=1"} {
		t.Setenv("GODEBUG", own)
		cfg := &agent.Config{StateDir: t.TempDir()}
		env, err := cfg.PluginEnv(agent.BackendConfig{Name: "hsm", Path: "/usr/lib/kms-agent/plugin", Env: map[string]string{"A": "b"}})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(env, want) || !slices.Contains(env, "A=b") || !slices.ContainsFunc(env, func(e string) bool {
			return strings.HasPrefix(e, "KMS_AGENT_PLUGIN_STATE=")
		}) {
			t.Errorf("with GODEBUG=%q: %v", own, env)
		}
	}
}
