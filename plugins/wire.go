package plugins

import (
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	pluginv1 "github.com/kms-agent/kms-agent/api/plugin/v1"
)

// What may cross between the agent and a plugin.
const (
	// MaxCiphertextSize is how long what Wrap returns may be.
	MaxCiphertextSize = 8 << 10
	// MaxNameSize bounds URIs, versions, names and capabilities.
	MaxNameSize = 1024
	// MaxVersions is how many versions a wrapping key may have.
	MaxVersions = 4096
	// MaxMessageSize bounds every message of the RPC service.
	MaxMessageSize = 1 << 20

	maxCapabilities = 64
	maxHealthDetail = 1024
)

func (r KeyRef) proto() *pluginv1.KeyRef {
	return &pluginv1.KeyRef{Uri: r.URI, Version: r.Version}
}

func keyRefOf(r *pluginv1.KeyRef) KeyRef { return KeyRef{URI: r.GetUri(), Version: r.GetVersion()} }

// check refuses what no backend could have.
func (r KeyRef) check() *Error {
	if !validName(r.URI) || !validName(r.Version) {
		return Errorf(Invalid, "the URI and the version of a wrapping key are 1 to %d bytes of UTF-8 each", MaxNameSize)
	}
	return nil
}

func (b Binding) proto() *pluginv1.Binding {
	p := &pluginv1.Binding{Purpose: b.Purpose, ProviderInfo: b.ProviderInfo, ContextBound: b.ContextBound}
	if b.ContextBound {
		p.Context = b.Context
	}
	return p
}

func bindingOf(b *pluginv1.Binding) Binding {
	return Binding{
		Purpose: b.GetPurpose(), ProviderInfo: b.GetProviderInfo(), ContextBound: b.GetContextBound(), Context: b.GetContext(),
	}
}

func (d Description) proto() *pluginv1.DescribeResponse {
	p := &pluginv1.DescribeResponse{CurrentVersion: d.Current}
	for _, v := range d.Versions {
		version := &pluginv1.KeyVersion{Version: v.Version, State: pluginv1.KeyVersion_State(v.State)}
		if !v.Created.IsZero() {
			version.Created = timestamppb.New(v.Created)
		}
		p.Versions = append(p.Versions, version)
	}
	return p
}

func descriptionOf(p *pluginv1.DescribeResponse) (Description, *Error) {
	d := Description{Current: p.GetCurrentVersion()}
	if len(p.GetVersions()) > MaxVersions {
		return Description{}, malformed("describes %d versions, %d are allowed", len(p.GetVersions()), MaxVersions)
	}
	for _, v := range p.GetVersions() {
		if s := v.GetState(); s < pluginv1.KeyVersion_STATE_ENABLED || s > pluginv1.KeyVersion_STATE_DESTROYED {
			return Description{}, malformed("describes a version with the unknown state %d", s)
		}
		version := KeyVersion{Version: v.GetVersion(), State: KeyState(v.GetState())}
		if v.GetCreated() != nil {
			if err := v.GetCreated().CheckValid(); err != nil {
				return Description{}, malformed("describes a version with an impossible creation time")
			}
			version.Created = v.GetCreated().AsTime()
		}
		d.Versions = append(d.Versions, version)
	}
	return d, checkDescription(d)
}

// checkDescription holds a description to the contract.
func checkDescription(d Description) *Error {
	seen := make(map[string]bool, len(d.Versions))
	for _, v := range d.Versions {
		switch {
		case !validName(v.Version):
			return malformed("describes a version without a proper name")
		case seen[v.Version]:
			return malformed("describes version %q twice", v.Version)
		}
		seen[v.Version] = true
	}
	if !seen[d.Current] {
		return malformed("names %q as the current version, which is not among those it describes", Printable(d.Current, 64))
	}
	return nil
}

func (i Info) check() *Error {
	if !validName(i.Name) || len(i.Version) > MaxNameSize || len(i.FIPS140) > MaxNameSize || len(i.Capabilities) > maxCapabilities {
		return malformed("gives no proper name, version, FIPS 140 module or capabilities of itself")
	}
	for _, c := range i.Capabilities {
		if !validName(c) {
			return malformed("names an improper capability")
		}
	}
	return nil
}

func (h Health) check() *Error {
	if h.UpstreamLatency < 0 || h.UpstreamLatency > time.Hour {
		return malformed("tells an impossible upstream latency")
	}
	return nil
}

func malformed(format string, a ...any) *Error {
	return Errorf(Internal, "malformed answer: the plugin "+format, a...)
}

func validName(s string) bool { return s != "" && len(s) <= MaxNameSize && utf8.ValidString(s) }

func checkMaterial(plaintext []byte) *Error {
	if len(plaintext) == 0 || len(plaintext) > MaxMaterialSize {
		return Errorf(Invalid, "key material is 1 to %d bytes, not %d", MaxMaterialSize, len(plaintext))
	}
	return nil
}

func checkCiphertext(ciphertext []byte) *Error {
	if len(ciphertext) == 0 || len(ciphertext) > MaxCiphertextSize {
		return Errorf(BadCiphertext, "a ciphertext is 1 to %d bytes, not %d", MaxCiphertextSize, len(ciphertext))
	}
	return nil
}
