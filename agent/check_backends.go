package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kms-agent/kms-agent/plugins/host"
	"github.com/kms-agent/kms-agent/plugins/local"
)

// Keystore returns what the settings of the built-in plugin name; it is an error
// for any other.
func (b *BackendConfig) Keystore() (string, local.Seal, error) {
	if b.Plugin != pluginLocal {
		return "", local.Seal{}, fmt.Errorf("backend %q has no keystore: it is not the built-in plugin", b.Name)
	}
	var settings struct {
		Keystore string     `json:"keystore"`
		Seal     local.Seal `json:"seal"`
	}
	if err := json.Unmarshal(b.Settings, &settings); err != nil {
		return "", local.Seal{}, fmt.Errorf("settings of backend %q: %w", b.Name, err)
	}
	return settings.Keystore, settings.Seal, nil
}

func (h *hostCheck) backend(at string, b *BackendConfig) {
	if b.Plugin == pluginLocal {
		h.keystore(at+".settings", b)
	} else {
		h.program(at, b)
		h.reach(at, b)
	}
	for _, variable := range slices.Sorted(maps.Keys(b.EnvFromFiles)) {
		h.secretFile(join(at+".env_from_files", variable), b.EnvFromFiles[variable])
	}
	if b.Confine == Confinement(host.ConfineAlways) && host.LandlockABI() == 0 {
		h.fault(at+".confine", "is required, and this kernel has no Landlock; kms-agent check --host says what gives it")
	}
	for name, paths := range map[string][]string{"read": b.Access.Read, "write": b.Access.Write, "sockets": b.Access.Sockets} {
		for i, path := range paths {
			if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
				h.warn(fmt.Sprintf("%s.access.%s[%d]", at, name, i),
					"%s does not exist; what is made later is out of a running plugin's reach, so make it before the agent starts", path)
			}
		}
	}
}

// reach warns of files in a confined plugin's settings and environment that it will
// not reach.
func (h *hostCheck) reach(at string, b *BackendConfig) {
	var settings map[string]any
	if b.Confine == Confinement(host.ConfineNever) || json.Unmarshal(b.Settings, &settings) != nil {
		return
	}
	named := slices.Concat(b.Access.Read, b.Access.Write)
	for _, setting := range slices.Sorted(maps.Keys(settings)) {
		if path, ok := settings[setting].(string); ok {
			h.reaches(at+".settings."+setting, path, named)
		}
	}
	for _, variable := range slices.Sorted(maps.Keys(b.Env)) {
		if _, err := os.Stat(b.Env[variable]); err == nil { // else it may be no path at all
			h.reaches(join(at+".env", variable), b.Env[variable], named)
		}
	}
	if tokens := softHSMTokens(b.Env[softHSMVariable]); tokens != "" && !within(tokens, named) {
		h.warn(join(at+".env", softHSMVariable), "has its tokens in %s, which is out of the confined plugin's reach; name that in access.write", tokens)
	}
}

// softHSMVariable names the configuration of SoftHSM, with which many begin: the one
// library whose files are known.
const softHSMVariable = "SOFTHSM2_CONF"

// softHSMTokens is the directory of tokens that a configuration of SoftHSM names, "" where
// that is not known.
func softHSMTokens(config string) string {
	text, err := os.ReadFile(config)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, "=")
		if dir := strings.TrimSpace(value); strings.TrimSpace(name) == "directories.tokendir" && filepath.IsAbs(dir) {
			return filepath.Clean(dir)
		}
	}
	return ""
}

// within tells whether a path is one of those that are named, or below one.
func within(path string, named []string) bool {
	return slices.ContainsFunc(named, func(dir string) bool {
		dir = strings.TrimSuffix(dir, "/")
		return path == dir || strings.HasPrefix(path, dir+"/")
	})
}

// reaches warns where a path is not, or not for long, in what access names.
func (h *hostCheck) reaches(at, path string, named []string) {
	if !filepath.IsAbs(path) || host.ReachesBySystem(path) {
		return
	}
	info, err := os.Stat(path)
	switch {
	case slices.Contains(named, path) && err == nil && !info.IsDir():
		h.warn(at, "access names the file %s alone: once it is replaced, as editors and Kubernetes do, it is out of the running plugin's reach; "+
			"put it into a directory of its own and name that", path)
	case !within(path, named):
		h.warn(at, "%s is out of the confined plugin's reach; name its directory in access.read", path)
	}
}

// program tests a plugin's binary as the host does before each start.
func (h *hostCheck) program(at string, b *BackendConfig) {
	file, err := os.Open(b.Path)
	if err != nil {
		h.fault(at+".path", "%s cannot be read: %v; install the plugin there, for uid %d to read", b.Path, bare(err), os.Geteuid())
		return
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		h.fault(at+".path", "%s is not an executable file; run chmod +x on the plugin's binary, or correct the path", b.Path)
		return
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		h.fault(at+".path", "%s cannot be read: %v", b.Path, bare(err))
		return
	}
	if got := hex.EncodeToString(hash.Sum(nil)); !strings.EqualFold(got, b.SHA256) {
		h.fault(at+".sha256", "is not that of %s, which is %s; write that if the binary was replaced on purpose", b.Path, got)
	}
}

func (h *hostCheck) secretFile(path, name string) {
	file, err := os.Open(name)
	if err != nil {
		h.fault(path, "%s cannot be read: %v; make it, for uid %d to read", name, bare(err), os.Geteuid())
		return
	}
	defer func() { _ = file.Close() }()
	switch info, err := file.Stat(); {
	case err != nil || !info.Mode().IsRegular():
		h.fault(path, "%s is not a regular file; name a file that holds the value", name)
	case info.Size() == 0:
		h.warn(path, "%s is empty", name)
	case info.Mode().Perm()&0o007 != 0:
		h.warn(path, "everybody has access to %s (%04o); run chmod o= %s", name, info.Mode().Perm(), name)
	}
}

// keystore opens the keystore with its seal and looks for the keys' wrapping
// keys in it.
func (h *hostCheck) keystore(at string, b *BackendConfig) {
	path, seal, err := b.Keystore()
	if err != nil {
		h.fault(at, "%v", err)
		return
	}
	if seal.Credential != "" && os.Getenv("CREDENTIALS_DIRECTORY") == "" {
		h.warn(at+".seal.credential", "is known inside the systemd unit only: neither it nor the keystore was tried; "+
			"run this check as an ExecStartPre= of the unit")
		return
	}
	ks, err := local.Open(path, seal)
	switch {
	case errors.Is(err, local.ErrSeal) && errors.Is(err, local.ErrNotExist) && seal.KeyFile != "":
		h.fault(at+".seal.key_file", "%s does not exist; bring the one that sealed the keystore, "+
			"or make a new keystore with its key: kms-agent keys local init --create-key-file --config %s", seal.KeyFile, h.cfg.files[0])
	case errors.Is(err, local.ErrSeal), errors.Is(err, local.ErrWrongSeal):
		h.fault(at+".seal", "%v", err)
	case errors.Is(err, local.ErrNotExist):
		command := "kms-agent keys local init --config " + h.cfg.files[0]
		if _, err := os.Lstat(seal.KeyFile); seal.KeyFile != "" && errors.Is(err, fs.ErrNotExist) {
			command += " --create-key-file"
		}
		h.fault(at+".keystore", "%v; %s makes one", err, command)
	case err != nil:
		h.fault(at+".keystore", "%v", err)
	default:
		defer ks.Close()
		h.wrappingKeys(b.Name, ks)
	}
}

func (h *hostCheck) wrappingKeys(backend string, ks *local.Keystore) {
	for place, wrap := range h.cfg.Wraps() {
		if wrap.Backend == backend {
			h.wrappingKey(place+".wrapping_key", strings.TrimPrefix(wrap.WrappingKey, local.Scheme), ks)
		}
	}
}

func (h *hostCheck) wrappingKey(at, name string, ks *local.Keystore) {
	info, err := ks.Key(name)
	if err != nil {
		h.warn(at, "%v; kms-agent keys local create %s --config %s makes it", err, name, h.cfg.files[0])
		return
	}
	if newest := info.Versions[len(info.Versions)-1]; newest.State != local.Enabled {
		h.warn(at, "its newest version, %s, is %v: nothing can be encrypted; enable it, or rotate the key", newest.Version, newest.State)
	}
}
