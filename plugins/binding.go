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
	out := make([]byte, 0, 4*fieldOverhead+len(bindingVersion)+len(b.Purpose)+len(b.ProviderInfo)+1)
	out = appendField(appendField(out, bindingVersion), b.Purpose)
	out = appendField(out, b.ProviderInfo)
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

// fieldOverhead is how many bytes a field takes beside its own.
const fieldOverhead = 8

func appendField[T string | []byte](out []byte, field T) []byte {
	return append(binary.BigEndian.AppendUint64(out, uint64(len(field))), field...)
}
