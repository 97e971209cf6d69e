package agent

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/kms-agent/kms-agent/plugins/host"
)

// pluginLocal is the plugin inside the agent's own binary.
const pluginLocal = "local"

func (l *loader) validateBackends() {
	taken := map[string]string{}
	for i := range l.cfg.Backends {
		b, at := &l.cfg.Backends[i], fmt.Sprintf("backends[%d]", i)
		if b.Name == "" {
			l.report(at+".name", "is missing; write a name for keys to refer to")
		} else if err := checkName(b.Name); err != nil {
			l.report(at+".name", "%v", err)
		} else if other, twice := taken[b.Name]; twice {
			l.report(at+".name", "%s is the name of %s too", quote(b.Name), other)
		}
		taken[b.Name] = at
		l.positive(at+".call_timeout", b.CallTimeout)
		l.positive(at+".start_timeout", b.StartTimeout)
		between(l, at+".max_concurrent", b.MaxConcurrent, 1, maxBackendCalls)
		l.validateBreaker(at+".breaker", b)
		l.validateEnvironment(at, b)
		l.validateDescriptors(at+".descriptors", b.Descriptors)
		l.validateAccess(at+".access", b.Access)
		l.validateProgram(at, b)
		l.refuseInlineSecrets(at+".settings", b.Settings)
	}
}

// Bounds of a breaker.
const (
	maxBreakerFailures = 1000
	minBreakerWait     = time.Second
	maxBreakerWait     = 10 * time.Minute
)

func (l *loader) validateBreaker(at string, b *BackendConfig) {
	c := b.Breaker
	between(l, at+".failures", c.Failures, 1, maxBreakerFailures)
	if c.FailureRate == 0 {
		l.report(at+".failure_rate", "must be more than 0, such as 0.6; 1 is only where every call fails")
	}
	if c.Slow < 0 || c.Slow > 0 && c.Slow > b.CallTimeout {
		l.report(at+".slow", "must be between 0s, which is a quarter of call_timeout, and call_timeout (%s)", b.CallTimeout)
	}
	if c.MaxWait < minBreakerWait || c.MaxWait > maxBreakerWait {
		l.report(at+".max_wait", "must be between %s and %s", minBreakerWait, maxBreakerWait)
	}
}

// validateProgram checks which program the backend is.
func (l *loader) validateProgram(at string, b *BackendConfig) {
	switch {
	case b.Plugin == "" && b.Path == "":
		l.report(at, "has no program; write plugin: local, or path and sha256 of a plugin's binary")
	case b.Plugin != "" && b.Path != "":
		l.report(at+".path", "stands beside plugin; a backend is one or the other")
	case b.Path != "":
		if sum, err := hex.DecodeString(b.SHA256); err != nil || len(sum) != 32 {
			l.report(at+".sha256", "must be the 64 hex digits that sha256sum prints for %s", b.Path)
		}
	case b.Plugin != pluginLocal:
		l.report(at+".plugin", "the plugin %s", unknownWord(b.Plugin, []string{pluginLocal}))
	default:
		for field, given := range map[string]bool{"sha256": b.SHA256 != "", "args": len(b.Args) > 0, "descriptors": len(b.Descriptors) > 0} {
			if given {
				l.report(at+"."+field, "is for a plugin with a path; the built-in one needs none")
			}
		}
		l.localSettings(at+".settings", b)
	}
}

func (l *loader) validateEnvironment(at string, b *BackendConfig) {
	name := regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	for variable, value := range b.Env {
		path := join(at+".env", variable)
		switch {
		case !name.MatchString(variable):
			l.report(path, "is not the name of an environment variable")
		case strings.ContainsRune(value, 0):
			l.report(path, "holds a zero byte")
		case isSecretVariable(variable):
			l.report(path, "looks like a secret, which has no place in this file; put it into a file of its own and name that in env_from_files")
		}
	}
	for variable, file := range b.EnvFromFiles {
		path := join(at+".env_from_files", variable)
		if _, twice := b.Env[variable]; twice {
			l.report(path, "stands in env too")
		}
		if !name.MatchString(variable) || file == "" {
			l.report(path, "must be the name of an environment variable, and the path of the file with its value")
		}
	}
}

// validateDescriptors checks names as systemd has them (FileDescriptorName=).
func (l *loader) validateDescriptors(at string, names []string) {
	valid := regexp.MustCompile(`^[!-9;-~]{1,255}$`)
	if len(names) > host.MaxDescriptors {
		l.report(at, "are %d; %d are possible", len(names), host.MaxDescriptors)
	}
	for i, name := range names {
		switch {
		case !valid.MatchString(name):
			l.report(fmt.Sprintf("%s[%d]", at, i), "must be the name of a descriptor: visible ASCII characters without a colon, as OpenFile=PATH:NAME:read-only of the unit has it")
		case slices.Contains(names[:i], name):
			l.report(fmt.Sprintf("%s[%d]", at, i), "stands there twice")
		}
	}
}

func isSecretVariable(name string) bool {
	return regexp.MustCompile(`(^|_)(TOKEN|SECRET|SECRET_ID|PASSWORD|PASSPHRASE|PIN|PRIVATE_KEY|SECRET_(ACCESS_)?KEY|API_KEY)$`).
		MatchString(strings.ToUpper(name))
}

// refuseInlineSecrets finds what by its name can only be a secret.
func (l *loader) refuseInlineSecrets(at string, settings Settings) {
	var value any
	if len(settings) == 0 || json.Unmarshal(settings, &value) != nil {
		return
	}
	l.walkSettings(at, value, 0)
}

func (l *loader) walkSettings(at string, value any, depth int) {
	switch v := value.(type) {
	case map[string]any:
		for name, element := range v {
			path := join(at, name)
			if _, scalar := element.(string); scalar && isSecretSetting(name) {
				l.report(path, "is a secret, which has no place in this file; put it into a file of its own and write %s_file: PATH", name)
			}
			l.walkSettings(path, element, depth+1)
		}
	case []any:
		for i, element := range v {
			l.walkSettings(fmt.Sprintf("%s[%d]", at, i), element, depth+1)
		}
	}
}

func isSecretSetting(name string) bool {
	return regexp.MustCompile(`^((user_|so_)?pin|password|passphrase|(client_)?secret|secret_id|secret_(access_)?key|private_key|api_key)$`).
		MatchString(strings.ToLower(name))
}

// localSettings checks what the built-in plugin is given and makes its paths
// absolute: it is started in another directory than this file's.
func (l *loader) localSettings(at string, b *BackendConfig) {
	if len(b.Settings) == 0 {
		l.report(at, "is missing; write keystore (a path) and seal (key_file, passphrase_file or credential)")
		return
	}
	var settings map[string]any
	if err := json.Unmarshal(b.Settings, &settings); err != nil {
		return // reported when it was decoded
	}
	l.knownSettings(at, settings, "keystore", "seal")
	l.settingPath(at, settings, "keystore")
	seal, ok := settings["seal"].(map[string]any)
	if !ok {
		l.report(at+".seal", "is missing; write key_file: PATH, passphrase_file: PATH or credential: NAME below it")
		return
	}
	l.knownSettings(at+".seal", seal, "key_file", "passphrase_file", "credential")
	if len(seal) != 1 {
		l.report(at+".seal", "must hold exactly one of key_file, passphrase_file and credential")
	}
	for name := range seal {
		if name == "credential" {
			if text, ok := seal[name].(string); !ok || text == "" || strings.Contains(text, "/") {
				l.report(at+".seal.credential", "must be the name of a systemd credential (LoadCredential= in the unit)")
			}
			continue
		}
		l.settingPath(at+".seal", seal, name)
	}
	encoded, err := json.Marshal(settings)
	if err != nil {
		l.report(at, "has no JSON form: %v", err)
		return
	}
	b.Settings = encoded
}

func (l *loader) knownSettings(at string, settings map[string]any, known ...string) {
	for name := range settings {
		found := false
		for _, word := range known {
			found = found || word == name
		}
		if !found {
			l.report(join(at, name), "the setting %s", unknownWord(name, known))
		}
	}
}

// settingPath makes one setting, a path, absolute in place.
func (l *loader) settingPath(at string, settings map[string]any, name string) {
	path, ok := settings[name].(string)
	if !ok || path == "" {
		l.report(join(at, name), "must be the path of a file")
		return
	}
	if !filepath.IsAbs(path) {
		settings[name] = filepath.Join(l.dir, path)
	}
}

// upstreamOf names the first backend that reaches the same keys as the named
// one: the same program with the same settings, under another name.
func (l *loader) upstreamOf(name string) string {
	i := slices.IndexFunc(l.cfg.Backends, func(b BackendConfig) bool { return b.Name == name })
	if i < 0 {
		return name
	}
	for _, b := range l.cfg.Backends[:i] {
		if reflect.DeepEqual(b.reach(), l.cfg.Backends[i].reach()) {
			return b.Name
		}
	}
	return name
}
