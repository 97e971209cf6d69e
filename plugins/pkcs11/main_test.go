package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

func TestMain(m *testing.M) {
	plugintest.ServeIfChild(map[string]func() plugins.Backend{"pkcs11": func() plugins.Backend { return newBackend() }})
	if os.Getenv(administerVariable) != "" {
		os.Exit(administerOnce([]string{"administer"}))
	}
	os.Exit(m.Run())
}

// administerVariable makes the test binary what kms-agent hsm starts.
const administerVariable = "KMS_AGENT_TEST_ADMINISTER"

// rig is a SoftHSM token in a directory of its own, and the backend's settings for it.
type rig struct {
	*hsmtest.SoftHSM

	t        testing.TB
	settings map[string]any
}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{t: t, SoftHSM: hsmtest.NewSoftHSM(t)}
	if err := os.Mkdir(r.state(), 0o700); err != nil {
		t.Fatal(err)
	}
	r.settings = map[string]any{
		"module": hsmtest.SoftHSMModule, "token": "pkcs11:token=kms", "pin_file": r.PINFile(), "state_dir": r.state(),
	}
	return r
}

func (r *rig) state() string { return r.Path("state") }

func (r *rig) json() json.RawMessage {
	r.t.Helper()
	b, err := json.Marshal(r.settings)
	if err != nil {
		r.t.Fatal(err)
	}
	return b
}

// administer does what `kms-agent hsm` asks for, as it asks.
func (r *rig) administer(q request) answer {
	r.t.Helper()
	a, _ := r.ask(q)
	return a
}

func (r *rig) ask(q request) (a answer, said []byte) {
	r.t.Helper()
	q.Settings = r.json()
	in, err := json.Marshal(q)
	if err != nil {
		r.t.Fatal(err)
	}
	// In a process of its own: a module is initialised once per process.
	var out, diagnostics bytes.Buffer
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), administerVariable+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &diagnostics
	failed := cmd.Run()
	if err := json.Unmarshal(out.Bytes(), &a); err != nil || (failed == nil) != (a.Error == "") {
		r.t.Fatalf("%s: %v, %v\n%s%s", q.Command, failed, err, out.Bytes(), diagnostics.Bytes())
	}
	return a, diagnostics.Bytes()
}

func (r *rig) must(q request) answer {
	r.t.Helper()
	a := r.administer(q)
	if a.Error != "" {
		r.t.Fatalf("%s: %s", q.Command, a.Error)
	}
	return a
}

func bounded(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// conform runs the conformance suite on tokens of its own, with a suite.
func conform(t *testing.T, suite hsm.Suite, open func(t *testing.T, r *rig) plugins.Backend) {
	made := newRig(t)
	for _, name := range []string{"orders", "other"} {
		made.must(request{Command: "init-key", Key: name, Suite: suite.String()})
	}
	made.must(request{Command: "rotate", Key: "orders"})
	plugintest.Run(t, func(t *testing.T) plugintest.Instance {
		r := newRig(t)
		if err := os.RemoveAll(r.Tokens()); err != nil {
			t.Fatal(err)
		}
		if err := os.CopyFS(r.Tokens(), os.DirFS(made.Tokens())); err != nil {
			t.Fatal(err)
		}
		return plugintest.Instance{
			Backend: open(t, r),
			Key:     plugins.KeyRef{URI: "pkcs11:token=kms;object=orders", Version: "1"},
			Other:   plugins.KeyRef{URI: "pkcs11:token=kms;object=other", Version: "1"},
			Missing: "pkcs11:token=kms;object=missing",
			Random:  true,
			Disable: func(t *testing.T) {
				r.must(request{Command: "disable", Key: "orders", Version: 1})
				time.Sleep(1100 * time.Millisecond) // as long as what was read of the catalogue counts
			},
		}
	})
}

func TestConformance(t *testing.T) {
	for _, suite := range []hsm.Suite{hsm.GCM, hsm.CBCHMAC, hsm.OAEPSHA1} {
		t.Run(suite.String(), func(t *testing.T) {
			conform(t, suite, func(t *testing.T, r *rig) plugins.Backend {
				b := newBackend()
				t.Cleanup(func() { _ = b.Close() })
				if _, err := b.Open(bounded(t), r.json()); err != nil {
					t.Fatal(err)
				}
				return b
			})
		})
	}
}

func TestConformanceOverTheWire(t *testing.T) {
	conform(t, hsm.GCM, func(t *testing.T, r *rig) plugins.Backend {
		cfg := plugintest.Config(t, "pkcs11", r.json())
		cfg.Env = append(cfg.Env, r.Env()...)
		cfg.Access.Read, cfg.Access.Write = []string{r.Dir()}, []string{r.Tokens(), r.state()}
		return plugintest.Start(t, cfg)
	})
}

// The command that makes a key that is not there can be run as it stands.
func TestMissingKeyNamesItsCommand(t *testing.T) {
	r := newRig(t)
	b := newBackend()
	t.Cleanup(func() { _ = b.Close() })
	if _, err := b.Open(bounded(t), r.json()); err != nil {
		t.Fatal(err)
	}
	const uri = "pkcs11:token=kms;object=orders"
	_, described := b.Describe(bounded(t), uri)
	_, wrapped := b.Wrap(bounded(t), plugins.KeyRef{URI: uri, Version: "1"}, make([]byte, 32), plugins.Binding{Purpose: "message"})
	for _, err := range []error{described, wrapped} {
		if plugins.ClassOf(err) != plugins.KeyNotFound || !strings.HasSuffix(err.Error(), "create it with kms-agent hsm init-key orders") {
			t.Errorf("%v, want KeyNotFound and kms-agent hsm init-key orders", err)
		}
	}
}
