package hsm_test

import (
	"context"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// onToken returns what pkcs11-tool shows of the objects on the token: kinds, labels and
// what they may be used for, in order.
func (r *rig) onToken() []string {
	r.t.Helper()
	out, err := exec.CommandContext(r.t.Context(), "pkcs11-tool", "--module", softHSM, "--token-label", hsmtest.Label, "--login", "--pin", userPIN,
		"--list-objects").Output()
	if err != nil {
		r.t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		if what, value, ok := strings.Cut(line, ":"); ok && (what == "label" || what == "Usage") {
			found[len(found)-1] += ", " + what + ": " + strings.TrimSpace(value)
		} else if strings.Contains(line, " Object;") {
			found = append(found, line)
		}
	}
	slices.Sort(found)
	return found
}

// pair is what onToken returns of the keys of a version of RSA.
func pair(label, bits, public, private string) []string {
	return []string{
		"Private Key Object; RSA, label: " + label + ", Usage: " + private,
		"Public Key Object; RSA " + bits + " bits, label: " + label + ", Usage: " + public,
	}
}

// What tokens do not make: how a key is made then, and that no more is given up than
// must be. Nothing but the key is on the token afterwards.
func TestRecipes(t *testing.T) {
	minimal, signing := pair("kmsagent/orders/v1", "3072", "encrypt", "decrypt"), pair("kmsagent/orders/v1", "3072", "encrypt, verify", "decrypt, sign")
	const noSession = "C_GenerateKeyPair rv=0x13 count=4"
	for _, c := range []struct {
		name  string
		rules []string
		want  []string
		pairs int // calls of C_GenerateKeyPair
	}{
		{"all is well", nil, minimal, 2},
		{"no keys for a session", []string{noSession}, minimal, 6},
		{"no key that cannot sign", []string{"C_GenerateKeyPair rv=0xD1 count=1", "C_GenerateKeyPair skip=1 rv=0xD1 count=1"}, signing, 4},
		{"a mishap with the trial", []string{"C_GenerateKeyPair rv=0x5 count=1"}, minimal, 3},
		{"no 3072 bits", []string{"C_GenerateKeyPair rv=0x62 count=2"}, pair("kmsagent/orders/v1", "2048", "encrypt", "decrypt"), 4},
		{"no RSA", []string{"C_GenerateKeyPair rv=0x70"}, nil, 1},
		{"no such RSA", []string{"C_GenerateKeyPair rv=0x13"}, nil, 8},
		{"the trial's key is held", []string{noSession, "C_DestroyObject rv=0x6 count=1"}, minimal, 6},
		{"the trial's key does not open", []string{noSession, "C_Decrypt rv=0x70"}, nil, 5},
		{"the connection is lost with the trial", []string{noSession, "C_Encrypt rv=0x30 count=1"}, minimal, 7},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, fault := newFaultyRig(t, inFile, func(_ *rig, c *hsm.Config) { c.Patience = 5 * time.Second })
			_ = fault.Calls()
			fault.Set(c.rules...)
			_, err := r.CreateKey(bounded(t), "orders", hsm.OAEPSHA1)
			if (err == nil) != (c.want != nil) || err != nil && hsm.KindOf(err) != hsm.Broken {
				t.Errorf("CreateKey: %v", err)
			}
			if n := fault.Calls()["C_GenerateKeyPair"]; n != c.pairs {
				t.Errorf("%d pairs were asked for, want %d", n, c.pairs)
			}
			if diff := cmp.Diff(c.want, r.onToken()); diff != "" {
				t.Errorf("on the token (-want +got):\n%s", diff)
			}
		})
	}
}

// A secret key is tried on the token, too, where there is none for a session: once more where
// something goes wrong.
func TestSecretTrialOnToken(t *testing.T) {
	for name, mishap := range map[string][]string{"well": nil, "a mishap": {"C_Encrypt rv=0x6 count=1"}} {
		t.Run(name, func(t *testing.T) {
			r, fault := newFaultyRig(t, inFile)
			fault.Set(append(mishap, "C_GenerateKey rv=0x13 count=2")...) // with what not every token knows, and without
			p, err := r.Probe(bounded(t))
			if err != nil {
				t.Fatal(err)
			}
			for _, trial := range p.Trials {
				if want := trial.Suite == hsm.GCM; trial.OnToken != want || want && trial.Err != nil {
					t.Errorf("%v: tried on the token: %v, %v", trial.Suite, trial.OnToken, trial.Err)
				}
			}
			if got := r.onToken(); len(got) != 0 {
				t.Errorf("the probe left %v", got)
			}
		})
	}
}

// The key of a trial that cannot be destroyed is told.
func TestTrialThatStays(t *testing.T) {
	r, fault := newFaultyRig(t, inFile)
	fault.Set("C_GenerateKeyPair rv=0x13 count=4", "C_DestroyObject rv=0x6")
	_, err := r.CreateKey(bounded(t), "orders", hsm.OAEPSHA1)
	if hsm.KindOf(err) != hsm.Broken || !strings.Contains(err.Error(), "kmsagent/trial with the ID") {
		t.Errorf("CreateKey: %v", err)
	}
	if diff := cmp.Diff(pair("kmsagent/trial", "3072", "encrypt", "decrypt"), r.onToken()); diff != "" {
		t.Errorf("on the token (-want +got):\n%s", diff)
	}
}

// Who leaves in the middle of a trial leaves nothing on the token.
func TestTrialIsBroughtToItsEnd(t *testing.T) {
	r, fault := newFaultyRig(t, inFile)
	fault.Set("C_GenerateKeyPair rv=0x13 count=4", "C_Encrypt sleep_ms=500 count=1")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := r.CreateKey(ctx, "orders", hsm.OAEPSHA1); err == nil {
		t.Error("CreateKey: it is done, though its caller had left")
	}
	if got := r.onToken(); len(got) != 0 {
		t.Errorf("the trial left %v", got)
	}
}
