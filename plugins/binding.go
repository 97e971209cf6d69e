package plugins

import (
	"encoding/binary"
	"maps"
	"slices"
)

// bindingVersion begins every canonical encoding.
const bindingVersion = "kms-agent/1"

// Binding is what a wrapping key authenticates together with key material. It
// can be rebuilt from a message and a request alone.
type Binding struct {
	// Purpose is "message", "exported", "wrap" or "probe".
	Purpose string
	// ProviderInfo is the EDK's provider information, as it stands in a message.
	ProviderInfo []byte
	// ContextBound tells whether Context is bound. An empty context that is
	// bound differs from none.
	ContextBound bool
	Context      map[string]string
}

// AAD returns the canonical encoding, for backends that bind additional
// authenticated data: each field with its length as 64 bits, big endian, before
// it: "kms-agent/1", the purpose, the provider information, one byte (1 where
// the context is bound, else 0), and where it is bound the number of pairs as
// 64 bits and each key and value, ordered by key.
func (b Binding) AAD() []byte {
	out := appendField(make([]byte, 0, 64+len(b.ProviderInfo)), bindingVersion)
	out = appendField(out, b.Purpose)
	out = appendField(out, string(b.ProviderInfo))
	if !b.ContextBound {
		return appendField(out, "\x00")
	}
	out = appendField(out, "\x01")
	out = binary.BigEndian.AppendUint64(out, uint64(len(b.Context)))
	for _, key := range slices.Sorted(maps.Keys(b.Context)) {
		out = appendField(appendField(out, key), b.Context[key])
	}
	return out
}

func appendField(out []byte, field string) []byte {
	return append(binary.BigEndian.AppendUint64(out, uint64(len(field))), field...)
}
