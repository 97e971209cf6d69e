//go:build hsmall

package main

import (
	"bytes"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

// moduleRig is the backend's settings for a token of any module.
func moduleRig(t *testing.T, k *hsmtest.Token) *rig {
	t.Helper()
	r := &rig{t: t, settings: map[string]any{
		"module": k.Module, "module_config": k.Reserved, "token": "pkcs11:token=" + k.Label, "pin_file": k.PINFile, "state_dir": k.Path("state"),
	}}
	if !k.DataObjects {
		r.settings["catalogue_file"], r.settings["catalogue_key_file"] = k.Path("catalogue"), k.Path("catalogue.key")
	}
	if err := os.Mkdir(k.Path("state"), 0o700); err != nil {
		t.Fatal(err)
	}
	return r
}

// conformOn runs the conformance suite on one token, with keys of their own for each
// of its tests.
func conformOn(t *testing.T, k *hsmtest.Token, suite hsm.Suite, open func(t *testing.T, r *rig) plugins.Backend) {
	t.Helper()
	r := moduleRig(t, k)
	n := 0
	plugintest.Run(t, func(t *testing.T) plugintest.Instance {
		n++
		own := &rig{t: t, settings: r.settings}
		orders, other := fmt.Sprintf("orders-%d", n), fmt.Sprintf("other-%d", n)
		for _, name := range []string{orders, other} {
			own.must(request{Command: "init-key", Key: name, Suite: suite.String()})
		}
		own.must(request{Command: "rotate", Key: orders})
		uri := "pkcs11:token=" + k.Label + ";object="
		return plugintest.Instance{
			Backend: open(t, own),
			Key:     plugins.KeyRef{URI: uri + orders, Version: "1"},
			Other:   plugins.KeyRef{URI: uri + other, Version: "1"},
			Missing: uri + "missing",
			Random:  true,
			Disable: func(t *testing.T) {
				own.must(request{Command: "disable", Key: orders, Version: 1})
				time.Sleep(1100 * time.Millisecond) // as long as what was read of the catalogue counts
			},
		}
	})
}

// overTheWire is the backend in a process of its own, confined to what the token needs.
func overTheWire(k *hsmtest.Token) func(t *testing.T, r *rig) plugins.Backend {
	return func(t *testing.T, r *rig) plugins.Backend {
		cfg := plugintest.Config(t, "pkcs11", r.json())
		cfg.Env = append(cfg.Env, k.Env...)
		cfg.Access.Read, cfg.Access.Sockets = []string{k.Dir, "/etc/opencryptoki"}, k.Sockets
		cfg.Access.Write = append([]string{k.Path("state")}, k.Write...)
		return plugintest.Start(t, cfg)
	}
}

func TestConformanceOnOpenCryptoki(t *testing.T) {
	for _, suite := range []hsm.Suite{hsm.CBCHMAC, hsm.OAEP} {
		t.Run(suite.String(), func(t *testing.T) {
			k := hsmtest.OpenCryptoki(t)
			conformOn(t, k, suite, overTheWire(k))
		})
	}
}

func TestConformanceOnNSS(t *testing.T) {
	for _, suite := range []hsm.Suite{hsm.GCM, hsm.KWP, hsm.CBCHMAC, hsm.OAEP} {
		t.Run(suite.String(), func(t *testing.T) {
			k := hsmtest.NSS(t)
			conformOn(t, k, suite, overTheWire(k))
		})
	}
}

// A token that locks after three wrong PINs is not locked by a process that is started
// again and again with one: the right PIN works afterwards.
func TestATokenIsNotLocked(t *testing.T) {
	k := hsmtest.OpenCryptoki(t)
	r := moduleRig(t, k)
	r.must(request{Command: "init-key", Key: "orders"})
	right, err := os.ReadFile(k.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(k.PINFile, []byte("wrong-1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 6 {
		if a := r.administer(request{Command: "list"}); a.Error == "" {
			t.Fatal("a wrong PIN lists keys")
		}
	}
	if err := os.WriteFile(k.PINFile, right, 0o600); err != nil {
		t.Fatal(err)
	}
	r.must(request{Command: "list"})
	s := overTheWire(k)(t, r)
	ref := plugins.KeyRef{URI: "pkcs11:object=orders", Version: "1"}
	material := bytes.Repeat([]byte{7}, 32)
	wrapped, err := s.Wrap(bounded(t), ref, material, plugins.Binding{Purpose: "message"})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := s.Unwrap(bounded(t), ref, wrapped, plugins.Binding{Purpose: "message"}); err != nil || !bytes.Equal(got, material) {
		t.Errorf("Unwrap: %d bytes, %v", len(got), err)
	}
}
