package agent_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kms-agent/kms-agent/agent"
	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/plugins/local"
)

const checkedConfig = `version: 1
trust_domain: example.org
state_dir: state
runtime_dir: run
identity:
  workload_api: unix:api.sock
backends:
  - name: local
    plugin: local
    settings: { keystore: ks, seal: { key_file: seal.key } }
  - name: other
    path: plugin
    sha256: DIGEST
    env_from_files: { ACCESS: token }
    access: { read: [DIR/vendor.conf, DIR/vendor] }
    settings: { module: /usr/lib/module.so, conf: DIR/vendor/conf, level: 7, name: vendor }
keys:
  - { name: orders, backend: local, wrapping_key: local:orders }
audit: { file: log/audit.log, initial_key: audit.key }
`

// checkedHost makes a directory that has everything that checkedConfig names,
// and returns it with the configuration.
func checkedHost(t *testing.T) (dir, config string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "check") //nolint:usetesting // t.TempDir is too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	for _, name := range []string{"state", "run", "log", "vendor"} {
		must(os.Mkdir(filepath.Join(dir, name), 0o755))
	}
	must(os.WriteFile(filepath.Join(dir, "plugin"), []byte("program"), 0o700))
	must(os.WriteFile(filepath.Join(dir, "token"), []byte("t"), 0o600))
	must(os.WriteFile(filepath.Join(dir, "vendor.conf"), nil, 0o600))
	must(os.WriteFile(filepath.Join(dir, "audit.key"), []byte(audit.FormatInitialKey(audit.NewInitialKey())), 0o600))
	seal := local.Seal{KeyFile: filepath.Join(dir, "seal.key")}
	must(local.CreateKeyFile(seal.KeyFile))
	ks, err := local.Create(filepath.Join(dir, "ks"), seal)
	must(err)
	must(ks.CreateKey("orders"))
	ks.Close()
	l, err := net.Listen("unix", filepath.Join(dir, "api.sock"))
	must(err)
	t.Cleanup(func() { _ = l.Close() })
	return dir, strings.NewReplacer("DIGEST", fmt.Sprintf("%x", sha256.Sum256([]byte("program"))), "DIR", dir).Replace(checkedConfig)
}

func TestCheckConfigOfAWholeHost(t *testing.T) {
	dir, config := checkedHost(t)
	got := agent.CheckConfig(filepath.Join(dir, "config.yaml"), []byte(config), false)
	if len(got.Faults) > 0 || len(got.Warnings) > 0 || got.Config == nil {
		t.Errorf("faults %v, warnings %v, configuration %v; want nothing wrong", got.Faults, got.Warnings, got.Config != nil)
	}
}

// TestCheckConfigOfAHostThatLacks breaks one thing at a time. Nothing of it
// counts for a configuration of another host.
func TestCheckConfigOfAHostThatLacks(t *testing.T) {
	remove := func(name string) func(string) error {
		return func(dir string) error { return os.RemoveAll(filepath.Join(dir, name)) }
	}
	content := func(name, text string) func(string) error {
		return func(dir string) error { return os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600) }
	}
	mode := func(name string, mode os.FileMode) func(string) error {
		return func(dir string) error { return os.Chmod(filepath.Join(dir, name), mode) }
	}
	tokens := func(name string) func(string) error { // of SoftHSM
		return func(dir string) error {
			return content("vendor/softhsm2.conf", "log.level = ERROR\ndirectories.tokendir = "+filepath.Join(dir, name)+"\n")(dir)
		}
	}
	cases := []struct {
		name, config string // config replaces "old|new" in checkedConfig
		spoil        func(dir string) error
		fault        string
		warning      string
	}{
		{name: "state is a file", config: "state_dir: state|state_dir: token", fault: ":3:12: state_dir: DIR/token is not a directory"},
		{name: "everybody writes state", spoil: mode("state", 0o777), fault: ":3:12: state_dir: everybody may replace files in DIR/state"},
		{name: "counts are garbage", spoil: content("state/quota.state", "garbage"), fault: ":3:12: state_dir: the counts of daily limits cannot be read: DIR/state/quota.state: it is damaged; restore it"},
		{name: "no log directory", spoil: remove("log"), fault: "audit.file: the directory DIR/log does not exist; make it: install -d"},
		{name: "log is a directory", spoil: func(dir string) error { return os.Mkdir(filepath.Join(dir, "log/audit.log"), 0o700) },
			fault: "audit.file: DIR/log/audit.log is a directory"},
		{name: "bad initial key", spoil: content("audit.key", "nonsense"), fault: "audit.initial_key: DIR/audit.key: "},
		{name: "bad initial key of a chain that goes on", spoil: func(dir string) error {
			return errors.Join(os.WriteFile(filepath.Join(dir, "log/audit.log"), []byte("record\n"), 0o600),
				os.WriteFile(filepath.Join(dir, "state/audit.state"), []byte("state"), 0o600))
		}, config: "initial_key: audit.key|initial_key: token", warning: "audit.initial_key: DIR/token: "},
		{name: "log whose state is gone", spoil: content("log/audit.log", "record\n"), fault: "audit.file: DIR/log/audit.log has records, and the state of its chain is not in DIR/state; restore"},
		{name: "initial key for all", spoil: mode("audit.key", 0o644), warning: "audit.initial_key: others have access to DIR/audit.key (0644)"},
		{name: "no keystore", spoil: remove("ks"), fault: ":10:27: backends[0].settings.keystore: keystore DIR/ks: does not exist"},
		{name: "keystore is garbage", spoil: content("ks", "garbage"), fault: "backends[0].settings.keystore: "},
		{name: "no seal", spoil: remove("seal.key"), fault: "backends[0].settings.seal.key_file: DIR/seal.key does not exist"},
		{name: "another seal", spoil: content("seal.key", "0123456789abcdef0123456789abcdef"), fault: "backends[0].settings.seal: "},
		{name: "seal for all", spoil: mode("seal.key", 0o644), fault: "chmod 600 DIR/seal.key"},
		{name: "no such wrapping key", config: "local:orders|local:oders", warning: "no such key: \"oders\""},
		{name: "disabled", spoil: func(dir string) error {
			ks, err := local.Open(filepath.Join(dir, "ks"), local.Seal{KeyFile: filepath.Join(dir, "seal.key")})
			if err != nil {
				return err
			}
			defer ks.Close()
			return ks.Disable("orders", "1")
		}, warning: "keys[0].wrapping_key: its newest version, 1, is disabled"},
		{name: "no credential", config: "key_file: seal.key|credential: seal", warning: "backends[0].settings.seal.credential: is known inside the systemd unit only"},
		{name: "no plugin", spoil: remove("plugin"), fault: "backends[1].path: DIR/plugin cannot be read: no such file"},
		{name: "plugin not executable", spoil: mode("plugin", 0o600), fault: "backends[1].path: DIR/plugin is not an executable file"},
		{name: "another plugin", spoil: content("plugin", "other"),
			fault: ":13:13: backends[1].sha256: is not that of DIR/plugin, which is " + fmt.Sprintf("%x", sha256.Sum256([]byte("other")))},
		{name: "no token", spoil: remove("token"), fault: "backends[1].env_from_files.ACCESS: DIR/token cannot be read"},
		{name: "token for all", spoil: mode("token", 0o644), warning: "backends[1].env_from_files.ACCESS: everybody has access to DIR/token"},
		{name: "nothing to read", spoil: remove("vendor.conf"), warning: "backends[1].access.read[0]: DIR/vendor.conf does not exist"},
		{name: "settings out of reach", config: "module: /usr/lib|module: DIR/lib", warning: "backends[1].settings.module: DIR/lib/module.so is out of the confined plugin's reach; name its directory in access.read"},
		{name: "environment out of reach", config: "    env_from_files|    env: { VENDOR_CONF: DIR/token, LIST: /a:/b, NONE: /not/there }\n    env_from_files", warning: "backends[1].env.VENDOR_CONF: DIR/token is out of the confined plugin's reach; name its directory in access.read"},
		{name: "tokens out of reach", config: "    env_from_files|    env: { SOFTHSM2_CONF: DIR/vendor/softhsm2.conf }\n    env_from_files", spoil: tokens("tokens"),
			warning: "backends[1].env.SOFTHSM2_CONF: has its tokens in DIR/tokens, which is out of the confined plugin's reach; name that in access.write"},
		{name: "tokens within reach", config: "    env_from_files|    env: { SOFTHSM2_CONF: DIR/vendor/softhsm2.conf }\n    env_from_files", spoil: tokens("vendor/tokens/")},
		{name: "tokens that are named", config: "access: { read: [DIR/vendor.conf, DIR/vendor] }|access: { read: [DIR/vendor.conf, DIR/vendor], write: [DIR/log/] }\n    env: { SOFTHSM2_CONF: DIR/vendor/softhsm2.conf }", spoil: tokens("log")},
		{name: "tokens of a plugin without confinement", config: "    env_from_files|    confine: off\n    env: { SOFTHSM2_CONF: DIR/vendor/softhsm2.conf }\n    env_from_files", spoil: tokens("tokens")},
		{name: "settings without confinement", config: "module: /usr/lib/module.so|module: /opt/module.so }\n    confine: off #"},
		{name: "a file that may be replaced", config: "conf: DIR/vendor/conf|conf: DIR/vendor.conf", warning: "backends[1].settings.conf: access names the file DIR/vendor.conf alone"},
		{name: "no Workload API", spoil: remove("api.sock"), warning: ":6:17: identity.workload_api: DIR/api.sock is not there"},
		{name: "Workload API is a file", config: "unix:api.sock|unix:token", warning: "identity.workload_api: DIR/token is no socket"},
		{name: "socket is a file", spoil: content("run/kms.sock", ""), fault: "listen.native.socket: DIR/run/kms.sock is there and is no socket"},
		{name: "no directory for the socket", config: "runtime_dir: run|runtime_dir: run\nadmin: { socket: nowhere/admin.sock }",
			fault: "admin.socket: the directory DIR/nowhere does not exist"},
		{name: "no way to the socket", spoil: mode("run", 0o700), warning: "listen.native.mode: lets other users connect (0660), but the socket's directory DIR/run has mode 0700"},
		{name: "a runtime directory to be made", spoil: remove("run")},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir, config := checkedHost(t)
			if old, replacement, ok := strings.Cut(strings.ReplaceAll(c.config, "DIR", dir), "|"); ok {
				config = strings.Replace(config, old, replacement, 1)
			}
			if c.spoil != nil {
				if err := c.spoil(dir); err != nil {
					t.Fatal(err)
				}
			}
			got := agent.CheckConfig(filepath.Join(dir, "config.yaml"), []byte(config), false)
			finds(t, "fault", got.Faults, strings.ReplaceAll(c.fault, "DIR", dir))
			finds(t, "warning", got.Warnings, strings.ReplaceAll(c.warning, "DIR", dir))
			elsewhere := agent.CheckConfig(filepath.Join(dir, "config.yaml"), []byte(config), true)
			if len(elsewhere.Faults)+len(elsewhere.Warnings) > 0 {
				t.Errorf("for another host: faults %v, warnings %v; want none", elsewhere.Faults, elsewhere.Warnings)
			}
		})
	}
}

// finds demands one finding that holds a text, or none where the text is empty.
func finds(t *testing.T, what string, got agent.Faults, want string) {
	t.Helper()
	switch {
	case want == "" && len(got) > 0:
		t.Errorf("%ss are %v, want none", what, got)
	case want != "" && (len(got) != 1 || !strings.Contains(got[0].Error(), want)):
		t.Errorf("%ss are %v, want one with %q", what, got, want)
	}
}

func TestAccountsOfAnotherHostAreNotLookedUp(t *testing.T) {
	dir, config := checkedHost(t)
	config += "listen: { native: { group: there-is-no-such-group } }\n"
	name := filepath.Join(dir, "config.yaml")
	finds(t, "fault", agent.CheckConfig(name, []byte(config), false).Faults, `there is no group "there-is-no-such-group" on this host`)
	finds(t, "fault", agent.CheckConfig(name, []byte(config), true).Faults, "")
}

// TestCheckWarnsOfEndurance: numbers that do not fit together, on this host or another.
func TestCheckWarnsOfEndurance(t *testing.T) {
	for config, want := range map[string]string{
		"grace: { decrypt: 4h }":                                            "",
		"grace: { decrypt: 7h }":                                            "keys[0].cache.max_idle: is shorter than the key's grace",
		"grace: { encrypt: 1h }":                                            "keys[0].grace.encrypt: without cache.spares nothing is encrypted any more when the data key reaches a limit in an outage; set cache.spares",
		"grace: { encrypt: 1h }, cache: { spares: 1 }":                      "",
		"more_wraps: [{ backend: other, wrapping_key: v:o }], min_wraps: 1": "",
		"more_wraps: [{ backend: other, wrapping_key: v:o }], min_wraps: 2": "keys[0].min_wraps: is as many as there are wrapping keys",
		"prewarm: [messages/*]":                                             "keys[0].prewarm: without grace.decrypt",
		"prewarm: [messages/*], grace: { decrypt: 1h }":                     "",
	} {
		t.Run(config, func(t *testing.T) {
			dir, whole := checkedHost(t)
			whole = strings.Replace(whole, "local:orders }", "local:orders, "+config+" }", 1)
			got := agent.CheckConfig(filepath.Join(dir, "config.yaml"), []byte(whole), true)
			finds(t, "fault", got.Faults, "")
			finds(t, "warning", got.Warnings, want)
		})
	}
}
