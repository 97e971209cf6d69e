package agent

import (
	"hash"
	"iter"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/identity"
)

// Config is one configuration file, decoded, with defaults in place and every
// path absolute. LoadConfig and ParseConfig return it only when it has no
// fault, so its readers need not check it again. It is not to be changed.
//
// Secrets never stand in it: where one is needed, the path of the file that
// holds it does.
type Config struct {
	// Version of the configuration's schema: 1.
	Version int `yaml:"version"`
	// TrustDomain is the agent's own.
	TrustDomain spiffeid.TrustDomain `yaml:"trust_domain"`
	// StateDir outlives the process: audit chain state, use counters, sealed store. Made
	// with mode 0700 where it is missing.
	StateDir string `yaml:"state_dir"`
	// RuntimeDir holds sockets and nothing else.
	RuntimeDir string `yaml:"runtime_dir"`

	Listen   ListenConfig   `yaml:"listen"`
	Admin    AdminConfig    `yaml:"admin"`
	Identity IdentityConfig `yaml:"identity"`
	// Backends by order of the file; names are unique.
	Backends []BackendConfig `yaml:"backends"`
	// Keys by order of the file; names, former names and wrapping keys are unique.
	Keys []KeyConfig `yaml:"keys"`
	// Policy holds the rules of the file itself, then those of PolicyFiles.
	Policy []policy.Rule `yaml:"policy"`
	// PolicyFiles are patterns (path.Match) of files that hold lists of rules.
	PolicyFiles []string `yaml:"policy_files"`
	// Roles name lists of operations.
	Roles  map[string][]policy.Operation `yaml:"roles"`
	Audit  AuditConfig                   `yaml:"audit"`
	Limits LimitsConfig                  `yaml:"limits"`
	Cache  CacheConfig                   `yaml:"cache"`
	Random RandomConfig                  `yaml:"random"`
	Store  StoreConfig                   `yaml:"store"`
	Log    LogConfig                     `yaml:"log"`

	Metrics MetricsConfig `yaml:"metrics"`
	Tracing TracingConfig `yaml:"tracing"`

	compiled *policy.Policy
	// digest has taken name and content of every file that was read.
	digest hash.Hash
	files  []string
	// read is the fingerprint of what the configuration was read from, from
	// before it was.
	read string
}

// ListenConfig names the doors of the agent.
type ListenConfig struct {
	// Native is the gRPC door. It is always there.
	Native NativeConfig `yaml:"native"`
}

// NativeConfig describes the native socket.
type NativeConfig struct {
	// Socket defaults to kms.sock in the runtime directory.
	Socket string `yaml:"socket"`
	// Mode of the socket file; it is created so, never widened.
	Mode Mode `yaml:"mode"`
	// Group owns the socket file; nil leaves the agent's own group.
	Group *GID `yaml:"group"`
	// Proofs that callers may prove themselves by here; nil is every one.
	Proofs []identity.Proof `yaml:"proofs"`
}

// AdminConfig describes the administrators' socket. Its mode is always 0600.
type AdminConfig struct {
	// Socket defaults to admin.sock in the runtime directory.
	Socket string `yaml:"socket"`
	// Allow is empty by default: nobody administers.
	Allow []AdminRule `yaml:"allow"`
}

// AdminRule gives operations to the peers that match every field it has.
type AdminRule struct {
	UID *UID `yaml:"uid"`
	GID *GID `yaml:"gid"`
	// Operations are administrators' operations, or the built-in roles that are
	// sets of them.
	Operations []string `yaml:"operations"`
}

// operations are what the rule gives, roles resolved. Words that are neither
// operation nor role give nothing.
func (r AdminRule) operations() []kms.AdminOperation {
	var all []kms.AdminOperation
	for _, word := range r.Operations {
		if role, ok := kms.AdminRoles()[word]; ok {
			all = append(all, role...)
			continue
		}
		all = append(all, kms.AdminOperation(word))
	}
	return all
}

// IdentityConfig says how callers are recognised.
type IdentityConfig struct {
	// WorkloadAPI is the address of the SPIFFE Workload API, unix:///path or
	// tcp://ip:port; empty: static peers only.
	WorkloadAPI string `yaml:"workload_api"`
	// BundleMaxAge is how long bundles are trusted after the Workload API was
	// last heard.
	BundleMaxAge time.Duration `yaml:"bundle_max_age"`
	// FederatedTrustDomains are accepted beside the agent's own.
	FederatedTrustDomains []spiffeid.TrustDomain `yaml:"federated_trust_domains"`
	// JWTAudience lists the audiences, one of which a JWT-SVID must be for; empty:
	// the SPIFFE ID of the agent's own SVID.
	JWTAudience []string `yaml:"jwt_audience"`
	// StaticPeers give SPIFFE IDs to processes by what the kernel says of them.
	StaticPeers []StaticPeerConfig `yaml:"static_peers"`
}

// StaticPeerConfig gives ID to the processes that match all that is given; at
// least one of the others is.
type StaticPeerConfig struct {
	UID *UID `yaml:"uid"`
	GID *GID `yaml:"gid"`
	// Group matches members, GID the primary group only.
	Group *GID `yaml:"group"`
	// Unit is a service or scope of systemd's system manager.
	Unit string      `yaml:"unit"`
	ID   spiffeid.ID `yaml:"id"`
}

// BackendConfig describes one plugin process.
type BackendConfig struct {
	Name string `yaml:"name"`
	// Plugin is the name of a built-in plugin, "local"; empty when Path is set.
	Plugin string `yaml:"plugin"`
	// Path of the plugin's binary, which must have SHA256 (hex).
	Path   string   `yaml:"path"`
	SHA256 string   `yaml:"sha256"`
	Args   []string `yaml:"args"`
	// Env is the plugin's whole environment, beside EnvFromFiles.
	Env map[string]string `yaml:"env"`
	// EnvFromFiles are variables that take the content of a file.
	EnvFromFiles map[string]string `yaml:"env_from_files"`
	// Descriptors are the names of those that the plugin is handed, of what the agent
	// itself was by its service manager.
	Descriptors []string `yaml:"descriptors"`

	CallTimeout   time.Duration `yaml:"call_timeout"`
	StartTimeout  time.Duration `yaml:"start_timeout"`
	MaxConcurrent int           `yaml:"max_concurrent"`
	// Breaker says when the backend gets no calls for a while.
	Breaker BreakerConfig `yaml:"breaker"`
	// Confine is best-effort (the default), required or off.
	Confine Confinement `yaml:"confine"`
	// Access names what a confined plugin reaches.
	Access AccessConfig `yaml:"access"`
	// Settings are the plugin's own, a JSON object.
	Settings Settings `yaml:"settings"`
}

// BreakerConfig says when a backend gets no calls for a while.
type BreakerConfig struct {
	// Failures in a row, and the share of failures among the calls of ten seconds
	// (40 at least), that open it.
	Failures    int   `yaml:"failures"`
	FailureRate Ratio `yaml:"failure_rate"`
	// Slow is how long a call may take before it counts as a failure; 0 is a quarter
	// of CallTimeout.
	Slow time.Duration `yaml:"slow"`
	// MaxWait bounds the time between two looks whether the backend is back.
	MaxWait time.Duration `yaml:"max_wait"`
}

// KeyConfig describes one logical key.
type KeyConfig struct {
	Name string `yaml:"name"`
	// FormerNames open messages that were made under them.
	FormerNames []string          `yaml:"former_names"`
	Labels      map[string]string `yaml:"labels"`
	Backend     string            `yaml:"backend"`
	// WrappingKey is the URI inside Backend. It belongs to no other key.
	WrappingKey string `yaml:"wrapping_key"`
	// MoreWraps are further backends, each of which wraps every data key too.
	MoreWraps []WrapConfig `yaml:"more_wraps"`
	// MinWraps is how many of all must wrap a new data key.
	MinWraps int `yaml:"min_wraps"`
	// BindContext makes the wrapping key bind the encryption context.
	BindContext bool `yaml:"bind_context"`
	// MaxVersionAge is how old a version of the wrapping key may be that encrypts
	// something new; 0 is no limit.
	MaxVersionAge time.Duration  `yaml:"max_version_age"`
	Cache         KeyCacheConfig `yaml:"cache"`
	// Prewarm are files, or patterns of their names, whose data keys are held ready.
	Prewarm []string    `yaml:"prewarm"`
	Grace   GraceConfig `yaml:"grace"`
}

// WrapConfig names a wrapping key in a backend.
type WrapConfig struct {
	Backend     string `yaml:"backend"`
	WrappingKey string `yaml:"wrapping_key"`
}

// wraps are all the wrapping keys of the key.
func (k *KeyConfig) wraps() []WrapConfig {
	return append([]WrapConfig{{k.Backend, k.WrappingKey}}, k.MoreWraps...)
}

// Wraps gives all wrapping keys of the configuration with the places where they
// stand, such as "keys[0].more_wraps[1]".
func (c *Config) Wraps() iter.Seq2[string, WrapConfig] {
	return func(yield func(string, WrapConfig) bool) {
		for i := range c.Keys {
			for j, wrap := range c.Keys[i].wraps() {
				if !yield(placeOfWrap(i, j), wrap) {
					return
				}
			}
		}
	}
}

// in tells whether the key has a wrapping key in a backend.
func (k *KeyConfig) in(backend string) bool {
	return slices.ContainsFunc(k.wraps(), func(w WrapConfig) bool { return w.Backend == backend })
}

// GraceConfig is how long an outage upstream may last, from its first failed call,
// before a key is of no use any more; 0 is none.
type GraceConfig struct {
	Encrypt time.Duration `yaml:"encrypt"`
	Decrypt time.Duration `yaml:"decrypt"`
}

// KeyCacheConfig bounds the data keys of one key. No field but Spares and
// Store is zero.
type KeyCacheConfig struct {
	// MaxAge of an upstream confirmation: the revocation window.
	MaxAge time.Duration `yaml:"max_age"`
	// MaxLifetime of an encryption data key.
	MaxLifetime time.Duration `yaml:"max_lifetime"`
	// MaxIdle is how long an unused data key stays.
	MaxIdle time.Duration `yaml:"max_idle"`
	// MaxMessages and MaxBytes encrypted under one data key.
	MaxMessages uint64 `yaml:"max_messages"`
	MaxBytes    Size   `yaml:"max_bytes"`
	// Partition says who shares an encryption data key.
	Partition Partition `yaml:"partition"`
	// Spares is how many encryption data keys of each partition stand ready.
	Spares int `yaml:"spares"`
	// Store keeps data keys in the sealed store too.
	Store bool `yaml:"store"`
}

// LimitsConfig bounds what callers may ask of the agent. No field is zero.
type LimitsConfig struct {
	// MaxMessage bounds one request on the wire; streams are not bounded by it.
	MaxMessage Size `yaml:"max_message"`
	// MaxStream bounds the plaintext of one stream. A stream that does not say
	// how long it may become counts as so much against its data key until it ends.
	MaxStream              Size          `yaml:"max_stream"`
	MaxDeadline            time.Duration `yaml:"max_deadline"`
	DefaultDeadline        time.Duration `yaml:"default_deadline"`
	MaxConcurrent          int           `yaml:"max_concurrent"`
	MaxConcurrentPerCaller int           `yaml:"max_concurrent_per_caller"`
	MaxConnections         int           `yaml:"max_connections"`
	// MaxConnectionsPerUser bounds those of one user of the host.
	MaxConnectionsPerUser int `yaml:"max_connections_per_user"`
	// DataKeyUse is how long a caller may cache a data key that it was given.
	DataKeyUse time.Duration `yaml:"data_key_use"`
}

// CacheConfig bounds the cache of data keys as a whole.
type CacheConfig struct {
	// MaxEntries of both directions together.
	MaxEntries int `yaml:"max_entries"`
}

// RandomConfig says whose random is mixed with the system's.
type RandomConfig struct {
	// Backend is one of Config.Backends; empty: the system's random alone.
	Backend string `yaml:"backend"`
}

// LogConfig describes the log on standard error.
type LogConfig struct {
	Level  LogLevel  `yaml:"level"`
	Format LogFormat `yaml:"format"`
}
