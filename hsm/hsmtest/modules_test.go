//go:build hsmall

package hsmtest_test

import (
	"bytes"
	"context"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

func TestOpenCryptoki(t *testing.T) {
	twice(t, func(t *testing.T) {
		k := hsmtest.OpenCryptoki(t)
		wantElsewhere(t, k)
		token := attach(t, k)
		wantTrials(t, token, hsm.CBCHMAC, map[hsm.Suite]bool{hsm.CBCHMAC: true, hsm.OAEP: true, hsm.OAEPSHA1: true})
		wantKeys(t, token, hsm.CBCHMAC, hsm.OAEP)
	})
}

func TestNSS(t *testing.T) {
	twice(t, func(t *testing.T) {
		k := hsmtest.NSS(t)
		token := attach(t, k)
		wantTrials(t, token, hsm.GCM, map[hsm.Suite]bool{hsm.GCM: true, hsm.KWP: true, hsm.CBCHMAC: true, hsm.OAEP: true, hsm.OAEPSHA1: true})
		wantKeys(t, token, hsm.GCM, hsm.KWP, hsm.CBCHMAC, hsm.OAEP)
	})
}

func TestTPM2(t *testing.T) {
	twice(t, func(t *testing.T) {
		k := hsmtest.TPM2(t, 0)
		wantElsewhere(t, k.Token)
		token := attach(t, k.Token)
		trial := wantTrials(t, token, hsm.OAEP, map[hsm.Suite]bool{hsm.OAEP: true, hsm.OAEPSHA1: true})
		if trial.RSABits != 3072 || !trial.Signs || !trial.OnToken {
			t.Errorf("RSA of %d bits, signs: %v, on the token: %v; want 3072, and both", trial.RSABits, trial.Signs, trial.OnToken)
		}
		wantNothing(t, k.Token)
		wantKeys(t, token, hsm.OAEP)
	})
}

// The module mistakes objects for one another once the first ones on the token are
// gone: other keys must be none the worse.
func TestTPM2Destroys(t *testing.T) {
	token := attach(t, hsmtest.TPM2(t, 0).Token)
	for _, name := range []string{"first", "second", "third"} {
		if _, err := token.CreateKey(bounded(t), name, hsm.OAEP); err != nil {
			t.Fatal(err)
		}
	}
	_, err := token.SetState(bounded(t), "first", 1, hsm.Disabled)
	if err == nil {
		_, err = token.Destroy(bounded(t), "first", 1)
	}
	if err != nil {
		t.Fatal(err)
	}
	wantKeys(t, token, hsm.OAEP)
	if _, err = token.SetState(bounded(t), "second", 1, hsm.Disabled); err == nil {
		_, err = token.Destroy(bounded(t), "second", 1)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"third", hsm.OAEP.String()} {
		key, err := token.Key(bounded(t), name)
		if err == nil {
			_, err = token.Wrap(bounded(t), key.Versions[0], nil, []byte("material"), nil) // after its canary
		}
		if err != nil {
			t.Errorf("key %s: %v", name, err)
		}
	}
}

// wantNothing has another application list the token's objects.
func wantNothing(t *testing.T, k *hsmtest.Token) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "pkcs11-tool", "--module", k.Module, "--token-label", k.Label, "--login", "--pin", k.PIN, "--list-objects").Output()
	if err != nil || bytes.Contains(out, []byte("Object")) {
		t.Errorf("on the token: %v\n%s", err, out)
	}
}

// twice makes a token, and another one later in the same process.
func twice(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	t.Run("first", test)
	t.Run("another", test)
}

// wantElsewhere uses the token in a process that has nothing but Env of the test.
func wantElsewhere(t *testing.T, k *hsmtest.Token) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "pkcs11-tool", "--module", k.Module, "--token-label", k.Label, "--login", "--pin", k.PIN, "--list-objects")
	cmd.Env = append([]string{"PATH=/usr/bin:/bin"}, k.Env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("pkcs11-tool: %v\n%s", err, out)
	}
}

func attach(t *testing.T, k *hsmtest.Token) *hsm.Token {
	t.Helper()
	cfg := hsm.Config{
		Module: k.Module, Reserved: k.Reserved, Token: hsm.URI{Token: k.Label},
		Login: &hsm.Ledger{Path: k.Path("logins"), PIN: hsm.PINSource{File: k.PINFile}},
	}
	if !k.DataObjects {
		cfg.Catalogue = &hsm.CatalogueFile{Path: k.Path("catalogue"), KeyFile: k.Path("catalogue-key")}
	}
	token, err := hsm.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := token.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if err = token.Check(bounded(t)); err == nil {
			return token
		}
		if time.Now().After(deadline) {
			t.Fatalf("the token is not attached: %v", err)
		}
	}
}

// wantTrials probes the token; works says which suites do. It returns how the one did
// that new keys use.
func wantTrials(t *testing.T, token *hsm.Token, use hsm.Suite, works map[hsm.Suite]bool) (used hsm.Trial) {
	t.Helper()
	p, err := token.Probe(bounded(t))
	if err != nil {
		t.Fatalf("Probe: %v", err)
	}
	got := map[hsm.Suite]bool{}
	var reasons strings.Builder
	for _, trial := range p.Trials {
		if trial.Err == nil {
			got[trial.Suite] = true
			if trial.Suite == use {
				used = trial
			}
		} else {
			reasons.WriteString(trial.Suite.String() + ": " + trial.Err.Error() + "\n")
		}
	}
	t.Logf("%s %s, %s, firmware %s:\n%s", p.Manufacturer, p.Library, p.Token.Model, p.Token.Firmware, reasons.String())
	if diff := cmp.Diff(works, got); diff != "" {
		t.Errorf("the suites that work (-want +got):\n%s%s", diff, reasons.String())
	}
	if p.Use != use {
		t.Errorf("a new key gets %v, want %v", p.Use, use)
	}
	return used
}

// wantKeys makes keys on the token, and wraps with them.
func wantKeys(t *testing.T, token *hsm.Token, suites ...hsm.Suite) {
	t.Helper()
	for _, suite := range suites {
		key, err := token.CreateKey(bounded(t), suite.String(), suite)
		if err != nil {
			t.Errorf("%v: CreateKey: %v", suite, err)
			continue
		}
		material, bound := []byte("thirty-two bytes of key material"), []byte("what is bound")
		wrapped, err := token.Wrap(bounded(t), key.Versions[0], nil, material, bound)
		if err != nil {
			t.Errorf("%v: Wrap: %v", suite, err)
			continue
		}
		if got, err := token.Unwrap(bounded(t), key.Versions[0], nil, wrapped, bound); err != nil || !bytes.Equal(got, material) {
			t.Errorf("%v: Unwrap: %d bytes, %v", suite, len(got), err)
		}
	}
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}
