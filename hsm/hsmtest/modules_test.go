//go:build hsmall

package hsmtest_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"os"
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
		k := hsmtest.TPM2(t)
		wantElsewhere(t, k)
		token := attach(t, k)
		// It makes no keys for a session, and no RSA key that decrypts and cannot sign.
		wantTrials(t, token, 0, map[hsm.Suite]bool{})
		wantDecrypts(t, k)
	})
}

// wantDecrypts has another application make a pair of RSA, and decrypt with it.
func wantDecrypts(t *testing.T, k *hsmtest.Token) {
	t.Helper()
	tool := func(args ...string) {
		t.Helper()
		args = append([]string{"--module", k.Module, "--token-label", k.Label, "--login", "--pin", k.PIN, "--id", "01"}, args...)
		if out, err := exec.CommandContext(t.Context(), "pkcs11-tool", args...).CombinedOutput(); err != nil {
			t.Fatalf("pkcs11-tool %v: %v\n%s", args, err, out)
		}
	}
	tool("--keypairgen", "--key-type", "rsa:2048")
	tool("--read-object", "--type", "pubkey", "--output-file", k.Path("public"))
	der, err := os.ReadFile(k.Path("public"))
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		t.Fatal(err)
	}
	encrypted, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public.(*rsa.PublicKey), []byte("some plaintext"), nil)
	if err == nil {
		err = os.WriteFile(k.Path("encrypted"), encrypted, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	tool("--decrypt", "--mechanism", "RSA-PKCS-OAEP", "--hash-algorithm", "SHA256", "--input-file", k.Path("encrypted"), "--output-file", k.Path("decrypted"))
	if got, err := os.ReadFile(k.Path("decrypted")); err != nil || string(got) != "some plaintext" {
		t.Errorf("decrypted: %q, %v", got, err)
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

// wantTrials probes the token; works says which suites do.
func wantTrials(t *testing.T, token *hsm.Token, use hsm.Suite, works map[hsm.Suite]bool) {
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
