package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/kms-agent/kms-agent/agent"
)

// hsmCheckPatience bounds what a plugin may take to look at its settings.
const hsmCheckPatience = 10 * time.Second

// checkHSMs has the plugins of PKCS#11 backends look at their settings, and adds what
// they find. One that cannot be asked is left out: why it cannot, check tells itself.
func checkHSMs(ctx context.Context, found *agent.Check) {
	cfg := found.Config
	for i := range cfg.Backends {
		b := &cfg.Backends[i]
		if !isHSM(b) {
			continue
		}
		at := fmt.Sprintf("backends[%d].settings", i)
		if name := pinDescriptor(b); name != "" && !slices.Contains(b.Descriptors, name) {
			found.Add(false, at+".pin_descriptor", fmt.Sprintf("the plugin is not handed %q; add it to descriptors of this backend", name))
		}
		for _, f := range hsmFaults(ctx, cfg, b) {
			path := at
			if f.Setting != "" {
				path += "." + f.Setting
			}
			for place, wrap := range cfg.Wraps() {
				if f.WrappingKey != "" && wrap.Backend == b.Name && wrap.WrappingKey == f.WrappingKey {
					path = place + ".wrapping_key"
				}
			}
			found.Add(f.Warning, printable(path), printable(f.Message))
		}
	}
}

func pinDescriptor(b *agent.BackendConfig) string {
	var settings struct {
		Name string `json:"pin_descriptor"`
	}
	_ = json.Unmarshal(b.Settings, &settings) // the plugin tells what is wrong
	return settings.Name
}

// hsmFaults asks a plugin, which does not load the vendor's library for that.
func hsmFaults(ctx context.Context, cfg *agent.Config, b *agent.BackendConfig) []hsmFault {
	ctx, cancel := context.WithTimeout(ctx, hsmCheckPatience)
	defer cancel()
	r := hsmRequest{Settings: json.RawMessage(b.Settings), Command: "check"}
	for _, wrap := range cfg.Wraps() {
		if wrap.Backend == b.Name {
			r.WrappingKeys = append(r.WrappingKeys, wrap.WrappingKey)
		}
	}
	in, err := json.Marshal(r)
	if err != nil {
		return nil
	}
	cmd, err := verified(ctx, b.Path, b.SHA256)
	if err != nil {
		return nil
	}
	defer closeFiles(cmd.ExtraFiles)
	if cmd.Env, err = cfg.PluginVariables(*b); err != nil {
		return nil
	}
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout = bytes.NewReader(in), &limitedWriter{w: &out, left: maxHSMAnswer}
	_ = runUntilDone(cmd) // what it says counts
	var answer hsmAnswer
	if json.Unmarshal(out.Bytes(), &answer) != nil {
		return nil
	}
	return answer.Faults
}
