package agent_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/agent"
	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
)

// storing is configText for an agent that stores the data keys of one key. Its caller is
// known without a Workload API, so that nothing else has to be there when it serves.
func storing(store string, replace ...string) string {
	return administrator(append(replace, "PEERS", staticPeer(),
		"state_dir: state\n", "state_dir: state\nstore: "+store+"\n",
		`wrapping_key: "local:orders" }`, `wrapping_key: "local:orders", grace: { encrypt: 1h, decrypt: 1h }, cache: { store: true, max_age: 1s, spares: 1 } }`,
	)...)
}

// sealers are the configurations of stores with real sealers; each test has its own.
func sealers(t *testing.T) map[string]func(*rig) string {
	t.Helper()
	return map[string]func(*rig) string{
		"keyring": func(r *rig) string {
			sum := sha256.Sum256([]byte(r.path("state")))
			name := "kms-agent:store-" + hex.EncodeToString(sum[:16])
			r.t.Cleanup(func() {
				if id, err := unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, "user", name, 0); err == nil {
					_, _ = unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_USER_KEYRING, 0, 0)
				} else {
					r.t.Errorf("the kernel has no key %s: %v", name, err)
				}
			})
			return "{ sealer: keyring }"
		},
		"tpm":  func(r *rig) string { return "{ sealer: tpm, tpm: { device: " + softwareTPM(r.t) + " } }" },
		"file": func(*rig) string { return "{ sealer: file }" },
	}
}

// softwareTPM runs swtpm and returns its socket.
func softwareTPM(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir, "--server", "type=unixio,path="+socket,
		"--ctrl", "type=unixio,path="+socket+".ctrl", "--flags", "not-need-init,startup-clear")
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatalf("start swtpm: %v: install it (scripts/setup-test-deps)", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGKILL)
		_ = cmd.Wait()
		_ = os.RemoveAll(dir)
	})
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			_ = conn.Close()
			return socket
		}
		if time.Now().After(deadline) {
			t.Fatalf("swtpm: %v: %s", err, &said)
		}
	}
}

// state is what an agent with this store says of itself when nothing else is wrong.
func stateWith(kind string) string {
	if kind == "file" {
		return "degraded" // it says that it is for development
	}
	return "serving"
}

// outage takes the backend out of reach, until the function that it returns is called.
func (r *rig) outage() (over func()) {
	r.t.Helper()
	if err := os.Rename(r.path("keystore"), r.path("away")); err != nil {
		r.t.Fatal(err)
	}
	return func() {
		if err := os.Rename(r.path("away"), r.path("keystore")); err != nil {
			r.t.Fatal(err)
		}
	}
}

// awaitBackend is for an agent that is degraded for another reason.
func (r *rig) awaitBackend() {
	r.t.Helper()
	r.await("the backend is up", func(s *adminv1.StatusResponse) bool {
		return len(s.GetBackends()) == 1 && s.GetBackends()[0].GetState() == "up"
	})
}

// exchange encrypts and decrypts what another agent encrypted.
func exchange(t *testing.T, c *client.Client, old []byte) (message []byte, sources [2]kmsagentv1.Freshness_Source) {
	t.Helper()
	e, err := c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: []byte("of the new agent")})
	if err != nil {
		t.Fatalf("encrypt: %v", err)
	}
	if old == nil {
		old = e.GetMessage()
	}
	d, err := c.Decrypt(t.Context(), &kmsagentv1.DecryptRequest{Message: old})
	if err != nil {
		t.Fatalf("decrypt: %v", err)
	}
	return e.GetMessage(), [2]kmsagentv1.Freshness_Source{e.GetKeyUse().GetFreshness().GetSource(), d.GetKeyUse().GetFreshness().GetSource()}
}

// TestStartInAnOutage: with each sealer, an agent that starts while its backend is out of
// reach serves both directions, says so, and is as new when the backend is back.
func TestStartInAnOutage(t *testing.T) {
	for kind, store := range sealers(t) {
		t.Run(kind, func(t *testing.T) {
			r := newRig(t, "")
			r.write(storing(store(r)))
			r.startIn(stateWith(kind))
			r.awaitBackend()
			old, _ := exchange(t, r.as("peer"), nil)
			r.stop()
			over := r.outage()
			r.startIn("degraded")
			s, err := r.status()
			if err != nil || s.GetStore().GetRestored() < 2 || s.GetStore().GetRefused() != "" || s.GetStore().GetDevelopment() != (kind == "file") {
				t.Errorf("store = %v, %v", s.GetStore(), err)
			}
			c := r.as("peer")
			in := [2]kmsagentv1.Freshness_Source{kmsagentv1.Freshness_SOURCE_GRACE, kmsagentv1.Freshness_SOURCE_GRACE}
			for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
				_, sources := exchange(t, c, old)
				if sources == in {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("served from %v, want grace in both directions", sources)
				}
			}
			if _, err := c.Encrypt(t.Context(), &kmsagentv1.EncryptRequest{Key: "archive"}); err == nil {
				t.Error("a key that is not stored is served")
			}
			over()
			r.await("the outage is over", func(s *adminv1.StatusResponse) bool { return s.GetState() == stateWith(kind) })
			exchange(t, c, old)
		})
	}
}

// TestRefusedStores: whatever stands where the store should be is told, and costs no
// more than a cold start.
func TestRefusedStores(t *testing.T) {
	older := map[string][]byte{}
	for name, c := range map[string]struct {
		reason string
		change func(t *testing.T, r *rig, path string)
	}{
		"rolled back": {"rolled-back", func(t *testing.T, r *rig, path string) { writeFile(t, path, string(older[r.dir])) }},
		"damaged": {"damaged", func(t *testing.T, _ *rig, path string) {
			b := readFile(t, path)
			b[len(b)/2] ^= 1
			writeFile(t, path, string(b))
		}},
		"truncated": {"truncated", func(t *testing.T, _ *rig, path string) {
			b := readFile(t, path)
			writeFile(t, path, string(b[:len(b)/2]))
		}},
		"zero length":  {"not-a-store", func(t *testing.T, _ *rig, path string) { writeFile(t, path, "") }},
		"another file": {"not-a-store", func(t *testing.T, _ *rig, path string) { writeFile(t, path, strings.Repeat("rubbish", 100)) }},
		"readable by all": {"insecure", func(t *testing.T, _ *rig, path string) {
			if err := os.Chmod(path, 0o644); err != nil {
				t.Fatal(err)
			}
		}},
		"of another agent": {"foreign", func(t *testing.T, r *rig, path string) {
			// The directory moves: the secret in the kernel is of its old name.
			if err := os.Rename(r.path("state"), r.path("moved")); err != nil {
				t.Fatal(err)
			}
			r.write(strings.Replace(storing("{ sealer: keyring }"), "state_dir: state", "state_dir: moved", 1))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, "")
			r.write(storing(sealers(t)["keyring"](r)))
			if c.reason == "foreign" {
				moved := sha256.Sum256([]byte(r.path("moved")))
				t.Cleanup(func() { unlinkKey("kms-agent:store-" + hex.EncodeToString(moved[:16])) })
			}
			path := r.path("state/data-keys.sealed")
			r.start()
			exchange(t, r.as("peer"), nil)
			r.stop()
			older[r.dir] = readFile(t, path)
			r.start()
			exchange(t, r.as("peer"), nil)
			r.stop()
			c.change(t, r, path)
			r.startIn("degraded")
			r.awaitBackend()
			s, err := r.status()
			if err != nil || s.GetStore().GetRefusedReason() != c.reason || s.GetStore().GetRestored() != 0 {
				t.Errorf("store = %v, %v; want it refused as %s", s.GetStore(), err, c.reason)
			}
			if !strings.Contains(strings.Join(s.GetProblems(), "\n"), "sealed store: the agent started without it") {
				t.Errorf("problems %q do not tell", s.GetProblems())
			}
			exchange(t, r.as("peer"), nil)
			r.stop()
			r.start() // its last save has replaced what was there
			if s, err = r.status(); err != nil || s.GetStore().GetRefused() != "" || s.GetStore().GetRestored() == 0 {
				t.Errorf("after a good save: store = %v, %v", s.GetStore(), err)
			}
		})
	}
}

func unlinkKey(name string) {
	if id, err := unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, "user", name, 0); err == nil {
		_, _ = unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_USER_KEYRING, 0, 0)
	}
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestStoreFaults: each is told, with what to do.
func TestStoreFaults(t *testing.T) {
	const keys = "backends: [{ name: b, plugin: local, settings: { keystore: k, seal: { key_file: f } } }]\n" +
		"keys: [{ name: k, backend: b, wrapping_key: \"local:k\", cache: { store: true } }]\n"
	for _, c := range []struct{ text, want string }{
		{"store: { sealer: floppy }\n", "store.sealer: \"floppy\" is not known"},
		{"store: {}\n", "store.sealer: is missing"},
		{"store: { sealer: keyring, tpm: { device: /dev/tpmrm1 } }\n", "store.tpm: is for the sealer tpm"},
		{"store: { sealer: tpm, tpm: { index: 7 } }\n", "store.tpm.index: must be from 0x01800000 to 0x01bfffff"},
		{"store: { sealer: tpm, tpm: { index: many } }\n", "is not an NV index"},
		{keys, "keys[0].cache.store: needs a store"},
	} {
		_, err := agent.ParseConfig("/etc/kms-agent/config.yaml", []byte(smallest+c.text))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", c.text, err, c.want)
		}
	}
	for _, good := range []string{
		keys + "store: { sealer: keyring }\n", keys + "store: { sealer: file }\n",
		keys + fmt.Sprintf("store: { sealer: tpm, tpm: { device: /dev/tpmrm1, index: %#x } }\n", 0x01800001),
	} {
		if _, err := agent.ParseConfig("/etc/kms-agent/config.yaml", []byte(smallest+good)); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
}

// TestCheckOfStores warns of what protects nothing or serves nobody.
func TestCheckOfStores(t *testing.T) {
	for name, c := range map[string]struct{ change, fault, warning string }{
		"keyring":      {change: "store: { sealer: keyring }"},
		"development":  {change: "store: { sealer: file }", warning: "store.sealer: is for DEVELOPMENT ONLY"},
		"no TPM":       {change: "store: { sealer: tpm, tpm: { device: no-tpm } }", fault: "store.tpm.device: uid"},
		"nobody":       {change: "store: { sealer: keyring } #", warning: "store: no key has cache.store"},
		"without time": {change: "store: { sealer: keyring } # none", warning: "cache.store: without grace"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, config := checkedHost(t)
			key := ", grace: { decrypt: 1h }, cache: { store: true }"
			switch {
			case strings.HasSuffix(c.change, "#"):
				key = ""
			case strings.HasSuffix(c.change, "none"):
				key = ", cache: { store: true }"
			}
			config = c.change + "\n" + strings.Replace(config, "wrapping_key: local:orders", "wrapping_key: local:orders"+key, 1)
			got := agent.CheckConfig(filepath.Join(dir, "config.yaml"), []byte(config), false)
			finds(t, "fault", got.Faults, c.fault)
			finds(t, "warning", got.Warnings, c.warning)
		})
	}
}

// replaced is text with one replacement, which must be possible.
func replaced(text, old, replacement string) string {
	if !strings.Contains(text, old) {
		panic("no " + old + " in " + text)
	}
	return strings.Replace(text, old, replacement, 1)
}
