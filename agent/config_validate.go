package agent

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/plugins/local"
)

// Bounds of a configuration. The kernel's sockaddr_un holds 108 bytes with the
// closing zero; the runtime directory leaves room for a plugin's socket below.
const (
	configVersion      = 1
	maxSocketPath      = 107
	maxRuntimeDir      = 60
	maxNameLength      = 128
	maxURILength       = 512
	maxLabels          = 32
	maxLabelLength     = 256
	maxMessagesPerKey  = 1 << 32
	minMessageSize     = 64 << 10
	maxMessageSize     = 64 << 20
	minStreamSize      = 1 << 20
	maxStreamSize      = 1 << 48 // what fits into 2^32 frames of 64 KiB
	maxCacheEntries    = 10_000_000
	maxBackendCalls    = 4096
	maxConcurrentCalls = 1_000_000
	ownerReadWrite     = 0o600
)

// report adds a fault of the main file, unless the value at path, or what holds
// it, could not be decoded: one mistake is told once.
func (l *loader) report(path, format string, a ...any) {
	if !l.main.failed(path) {
		l.main.report(path, format, a...)
	}
}

func (l *loader) validate() {
	if !l.main.parsed {
		return
	}
	c := l.cfg
	switch {
	case !l.main.has("version"):
		l.report("version", "is missing; write version: %d at the top", configVersion)
	case c.Version != configVersion:
		l.report("version", "must be %d, the only version there is", configVersion)
	}
	if c.TrustDomain.IsZero() {
		l.report("trust_domain", "is missing; write the SPIFFE trust domain of this host, such as example.org")
	}
	l.required("state_dir", c.StateDir, "a directory that outlives restarts, such as /var/lib/kms-agent")
	l.validateSockets()
	l.validateAdmin()
	l.validateIdentity()
	l.validateBackends()
	l.validateKeys()
	l.validateRandom()
	l.validateAudit()
	l.validateLimits()
	l.validateStore()
	l.validateObservation()
	l.validatePolicy()
}

func (l *loader) required(path, value, example string) {
	if value == "" {
		l.report(path, "is missing; write %s", example)
	}
}

// positive reports a duration that is not.
func (l *loader) positive(path string, d time.Duration) {
	if d <= 0 {
		l.report(path, "must be more than zero, such as 30s, 5m or 24h")
	}
}

// between reports a number outside its bounds.
func between[T int | uint64 | Size | time.Duration](l *loader, path string, n, least, most T) {
	if n < least || n > most {
		l.report(path, "must be between %v and %v", least, most)
	}
}

func (l *loader) validateSockets() {
	c := l.cfg
	l.required("runtime_dir", c.RuntimeDir, "a directory for sockets, such as /run/kms-agent")
	if len(c.RuntimeDir) > maxRuntimeDir {
		l.report("runtime_dir", "is %d bytes long; with more than %d there is no room for a socket's name", len(c.RuntimeDir), maxRuntimeDir)
	}
	for path, socket := range map[string]string{"listen.native.socket": c.Listen.Native.Socket, "admin.socket": c.Admin.Socket} {
		if len(socket) > maxSocketPath {
			l.report(path, "is %d bytes long; the kernel takes %d, so choose a shorter path", len(socket), maxSocketPath)
		}
	}
	if c.Listen.Native.Socket != "" && c.Listen.Native.Socket == c.Admin.Socket {
		l.report("admin.socket", "is the native socket too; each needs its own")
	}
	if c.Listen.Native.Mode&ownerReadWrite != ownerReadWrite {
		l.report("listen.native.mode", `must let the owner read and write, such as "0660"`)
	}
}

func (l *loader) validateAdmin() {
	for i, rule := range l.cfg.Admin.Allow {
		at := fmt.Sprintf("admin.allow[%d]", i)
		if rule.UID == nil && rule.GID == nil {
			l.report(at, "names nobody; write uid, gid or both")
		}
		if len(rule.Operations) == 0 {
			l.report(at+".operations", "is missing; write [operator], or [status]")
		}
		for j, word := range rule.Operations {
			if known := adminWords(); !slices.Contains(known, word) {
				l.report(fmt.Sprintf("%s.operations[%d]", at, j), "the operation %s", unknownWord(word, known))
			}
		}
	}
}

// adminWords are the operations of administrators and the roles made of them.
func adminWords() []string {
	var words []string
	for _, operation := range kms.AdminOperations() {
		words = append(words, string(operation))
	}
	return append(words, slices.Sorted(maps.Keys(kms.AdminRoles()))...)
}

func (l *loader) validateLimits() {
	c := l.cfg.Limits
	between(l, "limits.max_message", c.MaxMessage, minMessageSize, maxMessageSize)
	between(l, "limits.max_stream", c.MaxStream, minStreamSize, maxStreamSize)
	l.positive("limits.max_deadline", c.MaxDeadline)
	l.positive("limits.default_deadline", c.DefaultDeadline)
	if c.DefaultDeadline > c.MaxDeadline {
		l.report("limits.default_deadline", "is longer than max_deadline (%v)", c.MaxDeadline)
	}
	between(l, "limits.max_concurrent", c.MaxConcurrent, 1, maxConcurrentCalls)
	between(l, "limits.max_concurrent_per_caller", c.MaxConcurrentPerCaller, 1, maxConcurrentCalls)
	if c.MaxConcurrentPerCaller > c.MaxConcurrent {
		l.report("limits.max_concurrent_per_caller", "is more than max_concurrent (%d)", c.MaxConcurrent)
	}
	between(l, "limits.max_connections", c.MaxConnections, 1, maxConcurrentCalls)
	between(l, "limits.max_connections_per_user", c.MaxConnectionsPerUser, 1, maxConcurrentCalls)
	l.positive("limits.data_key_use", c.DataKeyUse)
	between(l, "cache.max_entries", l.cfg.Cache.MaxEntries, 1, maxCacheEntries)
}

func (l *loader) validateKeys() {
	var backends []string
	for _, backend := range l.cfg.Backends {
		backends = append(backends, backend.Name)
	}
	names, wrapping := map[string]string{}, map[[2]string]string{}
	for i, key := range l.cfg.Keys {
		at := fmt.Sprintf("keys[%d]", i)
		l.keyName(names, at+".name", key.Name)
		for j, former := range key.FormerNames {
			l.keyName(names, fmt.Sprintf("%s.former_names[%d]", at, j), former)
		}
		l.validateLabels(at+".labels", key.Labels)
		l.validateWraps(wrapping, backends, i, &key)
		if key.MaxVersionAge < 0 {
			l.report(at+".max_version_age", "must not be less than zero; leave it out where versions have no end")
		}
		l.validateKeyCache(at+".cache", key.Cache)
		l.validateGrace(at+".grace", key.Grace)
		for j, pattern := range key.Prewarm {
			if _, err := filepath.Match(pattern, ""); err != nil || pattern == "" {
				l.report(fmt.Sprintf("%s.prewarm[%d]", at, j), "must be a file's path, with * ? [] as in a shell where several are meant")
			}
		}
	}
}

// validateRandom finds what can be known without the backend's process.
func (l *loader) validateRandom() {
	const path = "random.backend"
	var known []string
	for _, backend := range l.cfg.Backends {
		if backend.Plugin != pluginLocal {
			known = append(known, backend.Name)
		}
	}
	switch name := l.cfg.Random.Backend; {
	case name == "" && l.main.has("random"):
		l.report(path, "is missing; write the name of a backend, or leave random out: without it the system's random is used")
	case name == "" || slices.Contains(known, name):
	case l.builtIn(name):
		l.report(path, "%s gives no random: the built-in plugin has no other than the system's, which is used anyway; name the backend of an HSM", quote(name))
	default:
		l.report(path, "the backend %s", unknownWord(name, known))
	}
}

var errBadName = errors.New("must be lower case letters, digits and . _ - between slashes, and begin with a letter or digit, such as orders or shop/orders")

func checkName(name string) error {
	segment := `[a-z0-9][a-z0-9._-]*`
	if len(name) > maxNameLength {
		return fmt.Errorf("is longer than %d bytes", maxNameLength)
	}
	if !regexp.MustCompile(`^` + segment + `(/` + segment + `)*$`).MatchString(name) {
		return errBadName
	}
	return nil
}

// keyName checks a name and that no key has, or had, it before.
func (l *loader) keyName(taken map[string]string, at, name string) {
	if name == "" {
		l.report(at, "is missing; write the name that callers use")
		return
	}
	if err := checkName(name); err != nil {
		l.report(at, "%v", err)
		return
	}
	if other, twice := taken[name]; twice {
		l.report(at, "%s is taken by %s; a name, present or former, belongs to one key", quote(name), other)
		return
	}
	taken[name] = at
}

func (l *loader) validateLabels(at string, labels map[string]string) {
	if len(labels) > maxLabels {
		l.report(at, "are %d; %d at most", len(labels), maxLabels)
	}
	for name, value := range labels {
		if name == "" || len(name) > maxNameLength || len(value) > maxLabelLength {
			l.report(join(at, name), "is too long, or has no name; a label's name has 1 to %d bytes, its value %d at most", maxNameLength, maxLabelLength)
		}
	}
}

// placeOfWrap is where the jth wrapping key of the ith key stands.
func placeOfWrap(i, j int) string {
	if j == 0 {
		return fmt.Sprintf("keys[%d]", i)
	}
	return fmt.Sprintf("keys[%d].more_wraps[%d]", i, j-1)
}

// maxWraps is how many backends wrap the data keys of one key at most: as many EDKs
// stand in each message.
const maxWraps = 8

func (l *loader) validateWraps(taken map[[2]string]string, backends []string, i int, key *KeyConfig) {
	wraps := key.wraps()
	uris, names := map[string]bool{}, map[string]bool{}
	for j, wrap := range wraps {
		at := placeOfWrap(i, j)
		switch {
		case wrap.Backend == "":
			l.report(at+".backend", "is missing; write the name of one of backends")
		case !slices.Contains(backends, wrap.Backend):
			l.report(at+".backend", "the backend %s", unknownWord(wrap.Backend, backends))
		case names[wrap.Backend]:
			l.report(at+".backend", "wraps this key already; another wrap is for another backend")
		}
		l.validateWrappingKey(taken, at, wrap)
		if uris[wrap.WrappingKey] && wrap.WrappingKey != "" {
			l.report(at+".wrapping_key", "is that of another wrap of this key; a message tells them apart by their URIs alone: add the token's serial number, or name the wrapping key otherwise")
		}
		uris[wrap.WrappingKey], names[wrap.Backend] = true, true
	}
	if len(wraps) > maxWraps {
		l.report(fmt.Sprintf("keys[%d].more_wraps", i), "are %d; %d at most", len(wraps)-1, maxWraps-1)
	}
	between(l, fmt.Sprintf("keys[%d].min_wraps", i), key.MinWraps, 1, len(wraps))
}

func (l *loader) validateWrappingKey(taken map[[2]string]string, at string, key WrapConfig) {
	path := at + ".wrapping_key"
	visible := !strings.ContainsFunc(key.WrappingKey, func(r rune) bool { return r <= ' ' || r >= 0x7f })
	switch {
	case key.WrappingKey == "":
		l.report(path, "is missing; write the wrapping key's URI in the backend, such as local:orders")
		return
	case len(key.WrappingKey) > maxURILength || !visible:
		l.report(path, "must be a URI of visible ASCII characters, %d at most, such as local:orders", maxURILength)
	case l.builtIn(key.Backend):
		name, ok := strings.CutPrefix(key.WrappingKey, local.Scheme)
		if !ok || local.CheckName(name) != nil {
			l.report(path, "must be local:NAME, where NAME is a key of the backend's keystore")
		}
	}
	id := [2]string{l.upstreamOf(key.Backend), key.WrappingKey}
	if other, twice := taken[id]; twice {
		l.report(path, "belongs to %s already; a wrapping key belongs to one key", other)
	}
	taken[id] = cmp.Or(taken[id], at)
}

func (l *loader) builtIn(backend string) bool {
	return slices.ContainsFunc(l.cfg.Backends, func(b BackendConfig) bool {
		return b.Name == backend && b.Plugin == pluginLocal
	})
}

func (l *loader) validateKeyCache(at string, c KeyCacheConfig) {
	l.positive(at+".max_age", c.MaxAge)
	l.positive(at+".max_lifetime", c.MaxLifetime)
	l.positive(at+".max_idle", c.MaxIdle)
	between(l, at+".max_messages", c.MaxMessages, 1, maxMessagesPerKey)
	between(l, at+".max_bytes", c.MaxBytes, 1, 1<<60)
	between(l, at+".spares", c.Spares, 0, maxSpares)
}

const (
	// maxSpares is how many data keys a partition has ready at most.
	maxSpares = 16
	// maxGrace is how long an outage may be outlived at most: what upstream forbids
	// meanwhile is not heard.
	maxGrace = 30 * 24 * time.Hour
)

func (l *loader) validateGrace(at string, g GraceConfig) {
	between(l, at+".encrypt", g.Encrypt, 0, maxGrace)
	between(l, at+".decrypt", g.Decrypt, 0, maxGrace)
}

// validatePolicy compiles the rules; what is wrong with one is told where it is
// written.
func (l *loader) validatePolicy() {
	var known []string
	present, former := map[string]bool{}, map[string]bool{}
	for _, key := range l.cfg.Keys {
		known, present[key.Name] = append(known, key.Name), true
		for _, name := range key.FormerNames {
			former[name] = true
		}
	}
	for i, rule := range l.cfg.Policy {
		for j, name := range rule.Keys {
			place := l.rules[i]
			path := fmt.Sprintf("%s.keys[%d]", place.path, j)
			switch {
			case strings.Contains(name, "*") || present[name] || place.document.full():
			case former[name]:
				place.document.report(path, "%s is a former name; write the key's present one", quote(name))
			default:
				place.document.report(path, "the key %s", unknownWord(name, known))
			}
		}
	}
	compiled, err := policy.Compile(policy.Config{TrustDomain: l.cfg.TrustDomain, Rules: l.cfg.Policy, Roles: l.cfg.Roles})
	if err != nil {
		l.policyFaults(err)
	}
	l.cfg.compiled = compiled
}

func (l *loader) policyFaults(err error) {
	all := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		all = joined.Unwrap()
	}
	for _, err := range all {
		var fault *policy.Fault
		switch {
		case !errors.As(err, &fault):
			l.main.report("policy", "%v", err)
		case fault.Index < 0 || fault.Index >= len(l.rules):
			l.report(join("roles", fault.Rule)+strings.TrimPrefix(fault.Field, fault.Rule), "%s", fault.Message)
		default:
			place := l.rules[fault.Index]
			path := place.path
			if fault.Field != "" {
				path += "." + fault.Field
			}
			if !place.document.failed(path) {
				place.document.report(path, "%s", fault.Message)
			}
		}
	}
}
