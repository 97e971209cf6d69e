package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/cache/seal/tpm"
	"github.com/kms-agent/kms-agent/plugins/host"
)

// maxConfigSize bounds one file, in bytes.
const maxConfigSize = 4 << 20

// LoadConfig reads the configuration file at path, and the policy files that it
// names, and checks all of it without touching the network. Relative paths in
// it are relative to the file's directory. The error is a Faults with every
// fault of the files, or that of opening path.
func LoadConfig(path string) (*Config, error) {
	before := ""
	if name, err := filepath.Abs(path); err == nil {
		before = stamp(name)
	}
	name, data, err := ReadConfig(path)
	if err != nil {
		return nil, err
	}
	return newLoader(name, data, before, false).result()
}

// ErrConfigFile is wrapped by the errors of a file that is no configuration: no
// regular file, too large, or one that everybody may write.
var ErrConfigFile = errors.New("read configuration")

// ReadConfig reads the configuration file at path for ParseConfig, and returns
// its absolute path with it.
func ReadConfig(path string) (name string, data []byte, err error) {
	name, err = filepath.Abs(path)
	if err == nil {
		data, err = readBounded(name)
	}
	if err != nil {
		return "", nil, fmt.Errorf("%w: %w", ErrConfigFile, err)
	}
	return name, data, nil
}

// ParseConfig is LoadConfig for a file that has been read: name stands in
// faults and says what relative paths are relative to.
func ParseConfig(name string, data []byte) (*Config, error) {
	return newLoader(name, data, stamp(name), false).result()
}

func (l *loader) result() (*Config, error) {
	if err := l.faults().err(); err != nil {
		return nil, err
	}
	return l.cfg, nil
}

// newLoader reads and checks a configuration; stamped is its file's stamp from
// before it was read, elsewhere says that it is of another host.
func newLoader(name string, data []byte, stamped string, elsewhere bool) *loader {
	cfg := &Config{}
	cfg.setDefaults()
	cfg.digest = sha256.New()
	cfg.takeFile(name, data)
	main := decodeYAML(name, data, cfg, elsewhere)
	l := &loader{cfg: cfg, main: main, dir: filepath.Dir(name)}
	l.cfg.files = []string{name}
	for i := range cfg.Policy {
		l.rules = append(l.rules, rulePlace{main, fmt.Sprintf("policy[%d]", i)})
	}
	l.resolvePaths()
	found := l.findPolicyFiles()
	for _, path := range l.environmentFiles() {
		l.watch(path)
	}
	cfg.read = stamped + cfg.othersFingerprint()
	for _, f := range found {
		l.loadPolicyFile(f.at, f.name)
	}
	l.validate()
	return l
}

// faults are those of every file, in order.
func (l *loader) faults() Faults {
	all := slices.Clone(l.main.faults)
	for _, d := range l.policyFiles {
		all = append(all, d.faults...)
	}
	return all.sorted()
}

// Files returns what to watch for changes: the configuration file, the policy
// files, the directories in which policy files may appear, and the files that
// plugins' environments come from. Paths are absolute.
func (c *Config) Files() []string { return slices.Clone(c.files) }

// Digest identifies what the configuration was read from: SHA-256, in
// hexadecimal, over name, size and content of its file and of each policy file.
func (c *Config) Digest() string { return hex.EncodeToString(c.digest.Sum(nil)) }

func (c *Config) takeFile(name string, data []byte) {
	_, _ = fmt.Fprintf(c.digest, "%s\x00%d\x00", name, len(data))
	_, _ = c.digest.Write(data)
}

// CompiledPolicy returns the policy that Policy, PolicyFiles and Roles make.
func (c *Config) CompiledPolicy() *policy.Policy { return c.compiled }

// loader is one configuration on its way from text to a valid Config.
type loader struct {
	cfg         *Config
	main        *document
	dir         string
	policyFiles []*document
	// rules has the place of each of cfg.Policy.
	rules []rulePlace
}

// rulePlace is where a rule is written.
type rulePlace struct {
	document *document
	path     string
}

func (l *loader) resolvePaths() {
	c := l.cfg
	for _, path := range []*string{&c.StateDir, &c.RuntimeDir, &c.Listen.Native.Socket, &c.Admin.Socket, &c.Store.TPM.Device} {
		l.resolve(path)
	}
	for _, path := range l.auditPaths() {
		l.resolve(path)
	}
	if c.Listen.Native.Socket == "" && c.RuntimeDir != "" {
		c.Listen.Native.Socket = filepath.Join(c.RuntimeDir, "kms.sock")
	}
	if c.Admin.Socket == "" && c.RuntimeDir != "" {
		c.Admin.Socket = filepath.Join(c.RuntimeDir, "admin.sock")
	}
	if path, ok := strings.CutPrefix(c.Identity.WorkloadAPI, "unix:"); ok && !strings.HasPrefix(path, "/") && path != "" {
		l.resolve(&path)
		c.Identity.WorkloadAPI = "unix://" + path
	}
	for i := range c.PolicyFiles {
		l.resolve(&c.PolicyFiles[i])
	}
	for i := range c.Keys {
		for j := range c.Keys[i].Prewarm {
			l.resolve(&c.Keys[i].Prewarm[j])
		}
	}
	for i := range c.Backends {
		l.resolve(&c.Backends[i].Path)
		for name, path := range c.Backends[i].EnvFromFiles {
			l.resolve(&path)
			c.Backends[i].EnvFromFiles[name] = path
		}
	}
}

// resolve makes a path absolute; an empty one stays empty.
func (l *loader) resolve(path *string) {
	if *path != "" && !filepath.IsAbs(*path) {
		*path = filepath.Join(l.dir, *path)
	}
}

// environmentFiles lists the files of env_from_files, in a fixed order.
func (l *loader) environmentFiles() []string {
	var paths []string
	for _, b := range l.cfg.Backends {
		for _, path := range b.EnvFromFiles {
			if path != "" {
				paths = append(paths, path)
			}
		}
	}
	slices.Sort(paths)
	return paths
}

// policyFile is a file with rules, and where the configuration names it.
type policyFile struct{ at, name string }

// findPolicyFiles lists every policy file, in the patterns' order and by name
// within each. A pattern may match nothing; a plain path may not.
func (l *loader) findPolicyFiles() []policyFile {
	var found []policyFile
	for i, pattern := range l.cfg.PolicyFiles {
		at := fmt.Sprintf("policy_files[%d]", i)
		names, err := filepath.Glob(pattern)
		if err != nil {
			l.main.report(at, "%s is not a file name pattern; * ? and [a-z] are understood", quote(pattern))
			continue
		}
		literal := !strings.ContainsAny(pattern, `*?[\`)
		if len(names) == 0 && literal {
			l.main.report(at, "there is no file %s", quote(pattern))
		}
		l.watch(filepath.Dir(pattern))
		for _, name := range names {
			if slices.Contains(l.cfg.files, name) {
				continue // matched by an earlier pattern too
			}
			l.watch(name)
			found = append(found, policyFile{at, name})
		}
	}
	return found
}

func (l *loader) watch(path string) {
	if !slices.Contains(l.cfg.files, path) {
		l.cfg.files = append(l.cfg.files, path)
	}
}

func (l *loader) loadPolicyFile(at, name string) {
	data, err := readBounded(name)
	if err != nil {
		l.main.report(at, "%v", err)
		return
	}
	l.cfg.takeFile(name, data)
	var rules []policy.Rule
	file := decodeYAML(name, data, &rules, false)
	l.policyFiles = append(l.policyFiles, file)
	for i := range rules {
		l.rules = append(l.rules, rulePlace{file, fmt.Sprintf("[%d]", i)})
	}
	l.cfg.Policy = append(l.cfg.Policy, rules...)
}

// readBounded reads a regular file of at most maxConfigSize bytes.
func readBounded(path string) ([]byte, error) {
	// What is opened is what is judged; O_NONBLOCK: a pipe must not hold the
	// agent up.
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	data, err := readRegular(path, file)
	return data, errors.Join(err, file.Close())
}

func readRegular(path string, file *os.File) ([]byte, error) {
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	if info.Mode()&0o002 != 0 {
		return nil, fmt.Errorf("everybody may write %s, and so give themselves keys; run chmod o-w on it", path)
	}
	data, err := io.ReadAll(io.LimitReader(file, maxConfigSize+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxConfigSize {
		return nil, fmt.Errorf("%s is larger than %s", path, Size(maxConfigSize))
	}
	// What is half written may be valid and mean something else.
	after, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if after.Size() != int64(len(data)) || !after.ModTime().Equal(info.ModTime()) {
		return nil, fmt.Errorf("%s changed while it was read; write to another file and rename that to its place", path)
	}
	return data, nil
}

func (c *Config) setDefaults() {
	c.RuntimeDir = "/run/kms-agent"
	c.Listen.Native.Mode = 0o660
	c.Identity.BundleMaxAge = 24 * time.Hour
	c.Audit.setDefaults()
	c.Limits = LimitsConfig{
		MaxMessage: 1 << 20, MaxStream: 64 << 30, MaxDeadline: 30 * time.Second, DefaultDeadline: 10 * time.Second,
		MaxConcurrent: 1024, MaxConcurrentPerCaller: 128, MaxConnections: 4096, MaxConnectionsPerUser: 1024, DataKeyUse: 5 * time.Minute,
	}
	c.Cache.MaxEntries = 10000
	c.Store.TPM = TPMConfig{Device: tpm.DefaultDevice, Index: tpm.DefaultIndex}
	c.Log = LogConfig{Level: LogInfo, Format: LogJSON}
	c.Metrics.MaxCallers = 200
	c.Tracing.Sample = 0.01
}

func (b *BackendConfig) setDefaults() {
	b.CallTimeout, b.StartTimeout, b.MaxConcurrent = 2*time.Second, 10*time.Second, 32
	b.Breaker = BreakerConfig{
		Failures: host.DefaultBreakerFailures, FailureRate: host.DefaultBreakerRate, MaxWait: host.DefaultBreakerMaxWait,
	}
}

func (k *KeyConfig) setDefaults() {
	k.MinWraps = 1
	k.Cache = KeyCacheConfig{
		MaxAge: 5 * time.Minute, MaxLifetime: 24 * time.Hour, MaxIdle: 6 * time.Hour,
		MaxMessages: 1e9, MaxBytes: 1 << 40, Partition: PartitionCaller,
	}
}
