//go:build hsmall

package main

import (
	"bytes"
	"errors"
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

func TestConformanceOnTPM2(t *testing.T) {
	k := hsmtest.TPM2(t, 0)
	conformOn(t, k.Token, hsm.OAEP, overTheWire(k.Token))
}

// Tokens that lock after three wrong PINs are not locked by a process that is started
// again and again with one: the right PIN works afterwards.
func TestATokenIsNotLocked(t *testing.T) {
	t.Run("opencryptoki", func(t *testing.T) { isNotLocked(t, hsmtest.OpenCryptoki(t)) })
	t.Run("tpm2-pkcs11", func(t *testing.T) { isNotLocked(t, hsmtest.TPM2(t, 0).Token) })
}

func isNotLocked(t *testing.T, k *hsmtest.Token) {
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
		if a := r.administer(request{Command: "probe"}); a.Class != "unauthenticated" {
			t.Fatalf("a wrong PIN: %+v", a)
		}
	}
	if err := os.WriteFile(k.PINFile, right, 0o600); err != nil {
		t.Fatal(err)
	}
	r.must(request{Command: "list"})
	s := newService(t, r, k)
	s.opens(s.wrap())
}

// service is the backend in a process of its own, confined, with the key orders.
type service struct {
	t        *testing.T
	backend  plugins.Backend
	material []byte
}

func newService(t *testing.T, r *rig, k *hsmtest.Token) *service {
	t.Helper()
	return &service{t: t, backend: overTheWire(k)(t, r), material: bytes.Repeat([]byte{7}, 32)}
}

// wrapped is material under a version of the key.
type wrapped struct {
	version string
	data    []byte
}

func (s *service) wrap(version ...string) wrapped {
	s.t.Helper()
	ref := plugins.KeyRef{URI: "pkcs11:object=orders", Version: append(version, "1")[0]}
	data, err := s.backend.Wrap(bounded(s.t), ref, s.material, plugins.Binding{Purpose: "message"})
	if err != nil {
		s.t.Fatalf("Wrap under version %s: %v", ref.Version, err)
	}
	return wrapped{version: ref.Version, data: data}
}

func (s *service) unwrap(w wrapped) error {
	got, err := s.backend.Unwrap(bounded(s.t), plugins.KeyRef{URI: "pkcs11:object=orders", Version: w.version}, w.data, plugins.Binding{Purpose: "message"})
	if err == nil && !bytes.Equal(got, s.material) {
		return errors.New("it opens to something else")
	}
	return err
}

func (s *service) opens(w wrapped) {
	s.t.Helper()
	if err := s.unwrap(w); err != nil {
		s.t.Errorf("Unwrap under version %s: %v", w.version, err)
	}
}

// A TPM that dies is an outage, and no more: the process gets over it when the TPM is
// back, and what was wrapped before opens.
func TestTPM2ComesBack(t *testing.T) {
	k := hsmtest.TPM2(t, 0)
	r := moduleRig(t, k.Token)
	r.must(request{Command: "init-key", Key: "orders"})
	s := newService(t, r, k.Token)
	before := s.wrap()
	k.Kill()
	for range 3 {
		if err := s.unwrap(before); plugins.ClassOf(err) != plugins.Unavailable {
			t.Errorf("Unwrap without a TPM: %v, want Unavailable", err)
		}
	}
	k.Start()
	eventually(t, func() error { return s.unwrap(before) })
	s.opens(s.wrap())
}

// A process that runs sees versions that another one makes, though the module has
// what is on the token from its start. And there is hardly room in the TPM: it holds
// the keys of one version.
func TestTPM2Rotates(t *testing.T) {
	k := hsmtest.TPM2(t, 2)
	r := moduleRig(t, k.Token)
	r.must(request{Command: "init-key", Key: "orders"})
	s := newService(t, r, k.Token)
	first := s.wrap()
	r.must(request{Command: "rotate", Key: "orders"})
	second := s.wrap("2")
	s.opens(first)
	s.opens(second)
	s.opens(first)
}
