package chaos

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// settings are what reloads change.
type settings struct {
	// Without are callers whose rules are gone, Limited those with a quota.
	Without, Limited string
	// Graceless is a key that has no grace.
	Graceless string
}

// Short times, so that minutes show what hours do otherwise.
const (
	maxAge       = 2 * time.Second
	graceEncrypt = 4 * time.Second
	graceDecrypt = 7 * time.Second
	messagesEach = 40
	ruleStale    = time.Second
)

const everything = "encrypt, decrypt, generate-data-key, decrypt-data-key, wrap, unwrap, describe"

// configuration has marks where settings put something else. The patience of the
// backends is short, so that a call has an answer before its confirmation is too old.
const configuration = `version: 1
trust_domain: example.org
state_dir: DIR/state
runtime_dir: DIR/run
listen: { native: { socket: DIR/kms.sock, mode: "0600" } }
admin: { socket: DIR/admin.sock, allow: [{ uid: UID, operations: [break-glass] }] }
identity:
  workload_api: unix:DIR/api/agent
  static_peers: [{ uid: UID, id: spiffe://example.org/carol }]
backends:
  - { name: local, plugin: local, call_timeout: 1s, settings: { keystore: DIR/ks/keystore, seal: { key_file: DIR/seal.key } } }
  - name: hsm
    path: PLUGIN
    sha256: SUM
    call_timeout: 1s
    env: HSMENV
    access: { read: [HSMDIR, FAULTDIR], write: [HSMDIR, FAULTDIR] }
    settings: { module: FAULTMODULE, token: "pkcs11:token=kms", pin_file: HSMPIN, hang_after: 3s }
  - name: net
    path: PLUGIN
    sha256: SUM
    call_timeout: 1s
    env: NETENV
    access: { read: [NETDIR], write: [NETDIR], sockets: [NETDIR] }
    settings: { module: NETMODULE, token: "pkcs11:token=kms", pin_file: NETPIN, hang_after: 3s }
keys:
  - { name: orders, backend: hsm, wrapping_key: "pkcs11:token=kms;object=orders", cache: { max_age: 2s, max_lifetime: 20s, max_messages: 40, spares: 2 }, grace: GRACE(orders) }
  - { name: ledger, backend: net, wrapping_key: "pkcs11:token=kms;object=ledger", cache: { max_age: 2s }, grace: GRACE(ledger) }
  - { name: notes, backend: local, wrapping_key: "local:notes", cache: { max_age: 2s, max_messages: 40, spares: 2 }, grace: GRACE(notes) }
  - name: pair
    backend: hsm
    wrapping_key: "pkcs11:token=kms;object=pair-a"
    more_wraps: [{ backend: net, wrapping_key: "pkcs11:token=kms;object=pair-b" }]
    cache: { max_age: 2s, max_messages: 40, spares: 2 }
    grace: GRACE(pair)
  - { name: archive, backend: local, wrapping_key: "local:archive" }
cache: { max_entries: 30000 }
audit: { file: DIR/audit.log, initial_key: DIR/initial.key, coalesce_denials: 0s }
policy:
  - { name: alice, callers: ["spiffe://example.org/alice"], keys: [orders, ledger, notes, pair], operations: [EVERYTHING] }
  - { name: bob, callers: ["spiffe://example.org/bob"], keys: [orders], operations: [encrypt, decrypt], max_stale: 1s }
  - { name: bob-notes, callers: ["spiffe://example.org/bob"], keys: [notes], operations: [encrypt, decrypt] }
CAROL
metrics: { address: "127.0.0.1:0" }
log: { level: warn }
`

// carol's rule comes and goes.
const carolRule = `  - { name: carol, callers: ["spiffe://example.org/carol"], keys: [orders, ledger, notes, pair], operations: [EVERYTHING]LIMITS }
`

// setup is the same configuration for the checker.
func (c *cluster) setup() setup {
	object := func(backend, name string) objectSetup {
		uri := "pkcs11:token=kms;object=" + name
		if backend == "local" {
			uri = "local:" + name
		}
		return objectSetup{name, backend, uri}
	}
	key := func(name string, most int, objects ...objectSetup) keySetup {
		return keySetup{Name: name, Objects: objects, MaxAge: maxAge, Encrypt: graceEncrypt, Grace: graceDecrypt, MaxMessages: most}
	}
	s := setup{Allowed: map[string]bool{}, RuleStale: map[string]time.Duration{"bob orders": ruleStale}, Keys: []keySetup{
		key("orders", messagesEach, object("hsm", "orders")), key("ledger", plenty+1, object("net", "ledger")),
		key("notes", messagesEach, object("local", "notes")), key("pair", messagesEach, object("hsm", "pair-a"), object("net", "pair-b")),
		key("archive", plenty+1, object("local", "archive")),
	}}
	for _, k := range []string{"orders", "ledger", "notes", "pair"} {
		for _, o := range append(strings.Split(everything, ", "), "reencrypt", "encrypt-stream", "decrypt-stream") {
			s.Allowed["alice "+k+" "+o], s.Allowed["carol "+k+" "+o] = true, true
		}
	}
	for _, k := range []string{"orders", "notes"} {
		for _, o := range []string{"encrypt", "decrypt", "reencrypt", "encrypt-stream", "decrypt-stream"} {
			s.Allowed["bob "+k+" "+o] = true
		}
	}
	return s
}

// text is the configuration with settings.
func (c *cluster) text(s settings) string {
	carol, limits := carolRule, ""
	if s.Without == "carol" {
		carol = ""
	}
	if s.Limited == "carol" {
		limits = ", limits: { rate: 2/s, burst: 2 }"
	}
	text := strings.ReplaceAll(configuration, "CAROL\n", carol)
	text = strings.NewReplacer("LIMITS", limits, "EVERYTHING", everything).Replace(text)
	for _, k := range []string{"orders", "ledger", "notes", "pair"} {
		value := "{ encrypt: " + graceEncrypt.String() + ", decrypt: " + graceDecrypt.String() + " }"
		if s.Graceless == k {
			value = "{}"
		}
		text = strings.ReplaceAll(text, "GRACE("+k+")", value)
	}
	hsm, net := c.tokens["hsm"], c.tokens["net"]
	return strings.NewReplacer(
		"FAULTDIR", filepath.Dir(c.fault.Module), "FAULTMODULE", c.fault.Module, "NETMODULE", c.remote.Module,
		"HSMENV", environment(hsm.Env()), "NETENV", environment(c.remote.Env()), "HSMDIR", hsm.Dir(), "NETDIR", net.Dir(),
		"HSMPIN", hsm.PINFile(), "NETPIN", net.PINFile(), "PLUGIN", c.plugin, "SUM", c.sum(),
		"DIR", c.dir, "UID", strconv.Itoa(os.Getuid()),
	).Replace(text)
}
