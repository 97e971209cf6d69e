// Package plugins is the contract between the agent and its backends.
package plugins

import (
	"context"
	"crypto/fips140"
	"encoding/json"
	"time"
)

// MaxMaterialSize is how many bytes of key material one Wrap takes at most.
const MaxMaterialSize = 4096

// Backend wraps and unwraps key material with wrapping keys that never leave
// it. Implementations are safe for concurrent use. Errors are of type *Error;
// others count as Internal.
type Backend interface {
	// Open configures the backend, once and before anything else.
	Open(ctx context.Context, config json.RawMessage) (Info, error)
	// Wrap wraps 1 to MaxMaterialSize bytes under one version of a wrapping key
	// and binds the binding to them. plaintext is read during the call only.
	Wrap(ctx context.Context, key KeyRef, plaintext []byte, b Binding) ([]byte, error)
	// Unwrap opens what Wrap made with the same binding. The result is owned,
	// and cleared, by the caller.
	Unwrap(ctx context.Context, key KeyRef, ciphertext []byte, b Binding) ([]byte, error)
	// Describe tells the versions of a wrapping key and which is current.
	Describe(ctx context.Context, uri string) (Description, error)
	// Check tells whether the backend could serve now. It must not cost an
	// upstream key operation where the upstream bills for it.
	Check(ctx context.Context) (Health, error)
	// Close releases what the backend holds. It is idempotent.
	Close() error
}

// KeyRef names one version of a wrapping key.
type KeyRef struct {
	// URI is independent of the backend's configuration: "local:orders".
	URI     string
	Version string
}

// KeyState says what a version may be used for.
type KeyState uint8

// The states of a version; there is no zero state.
const (
	// Enabled versions wrap and unwrap.
	Enabled KeyState = iota + 1
	// Disabled versions do neither until they are enabled again.
	Disabled
	// Destroyed versions have lost their material for good.
	Destroyed
)

// String returns "enabled", "disabled", "destroyed" or "unknown".
func (s KeyState) String() string {
	switch s {
	case Enabled:
		return "enabled"
	case Disabled:
		return "disabled"
	case Destroyed:
		return "destroyed"
	}
	return "unknown"
}

// KeyVersion describes one version of a wrapping key.
type KeyVersion struct {
	Version string
	State   KeyState
	Created time.Time // zero where it is not known
}

// Description describes a wrapping key.
type Description struct {
	// Current is the version that new data keys are wrapped under.
	Current  string
	Versions []KeyVersion
}

// Info tells what a backend is.
type Info struct {
	Name, Version string
	// Capabilities name optional services, and what is special: CapabilityRandom,
	// CapabilityContext.
	Capabilities []string
	// FIPS140 is Go's FIPS 140-3 module of the process: NoFIPS140 or its version.
	FIPS140 string
}

// CapabilityContext is the capability of a backend whose upstream sees the encryption
// context where one is bound, so that it may deny one context and allow another. What such a
// backend says to one is no word on the others. Without it each no is one to the key.
const CapabilityContext = "context"

// ContextAware is what a Backend is besides that may have CapabilityContext. Whether it does
// is not known before its plugin runs.
type ContextAware interface {
	SeesContext() (sees, known bool)
}

// NoFIPS140 stands where no FIPS 140-3 module is in force.
const NoFIPS140 = "off"

// FIPS140Module names Go's FIPS 140-3 module that is in force in this process,
// as "v1.0.0"; NoFIPS140 without one.
func FIPS140Module() string {
	if !fips140.Enabled() {
		return NoFIPS140
	}
	return fips140.Version()
}

// Health is what Check found.
type Health struct {
	Detail          string
	UpstreamLatency time.Duration
}

// StateVariable is the environment variable that names the directory in which a
// plugin keeps what must outlive its process. It is the plugin's alone.
const StateVariable = "KMS_AGENT_PLUGIN_STATE"

type callerKey struct{}

// WithCaller marks calls with who they are for, so that one caller cannot keep
// a backend from the others.
func WithCaller(ctx context.Context, caller string) context.Context {
	return context.WithValue(ctx, callerKey{}, caller)
}

// CallerFrom returns what WithCaller set, or "".
func CallerFrom(ctx context.Context) string {
	caller, _ := ctx.Value(callerKey{}).(string)
	return caller
}
