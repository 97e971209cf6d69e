package envelope

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"
)

// reservedPrefixes begin the keys that callers may not put in a context: the
// format's own and ours.
func reservedPrefixes() []string { return []string{"aws-crypto-", "kms-agent-"} }

// CheckContext reports whether context may be written into a message: at most
// MaxContextPairs pairs and MaxContextSize bytes serialised, UTF-8, no empty
// key, no key that begins with "aws-crypto-" or "kms-agent-". A nil or empty
// context is fine. Errors of size wrap ErrLimit; they may name a key, never a
// value.
func CheckContext(context map[string]string) error {
	if len(context) > MaxContextPairs {
		return fmt.Errorf("%w: encryption context of %d pairs, at most %d", ErrLimit, len(context), MaxContextPairs)
	}
	if n := contextSize(context); n > MaxContextSize {
		return fmt.Errorf("%w: encryption context of %d bytes, at most %d", ErrLimit, n, MaxContextSize)
	}
	for key, value := range context {
		if err := checkPair(key, value); err != nil {
			return err
		}
	}
	return nil
}

func checkPair(key, value string) error {
	if key == "" {
		return fmt.Errorf("encryption context has an empty key")
	}
	if !utf8.ValidString(key) || !utf8.ValidString(value) {
		return fmt.Errorf("encryption context: key %q or its value is not UTF-8", key)
	}
	for _, prefix := range reservedPrefixes() {
		if strings.HasPrefix(key, prefix) {
			return fmt.Errorf("encryption context: key %q begins with the reserved %q", key, prefix)
		}
	}
	return nil
}

// contextSize is the size of the serialised context without its own length.
func contextSize(context map[string]string) int {
	if len(context) == 0 {
		return 0
	}
	n := 2
	for key, value := range context {
		n += 2 + len(key) + 2 + len(value)
	}
	return n
}

// appendContext appends the context's length and the context, sorted by key.
func appendContext(dst []byte, context map[string]string) []byte {
	dst = binary.BigEndian.AppendUint16(dst, uint16(contextSize(context)))
	if len(context) == 0 {
		return dst
	}
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(context)))
	keys := slices.AppendSeq(make([]string, 0, MaxContextPairs), maps.Keys(context))
	slices.Sort(keys)
	for _, key := range keys {
		dst = appendField(dst, key)
		dst = appendField(dst, context[key])
	}
	return dst
}

// parseContext reads the context's length and the context. Keys must ascend:
// so none comes twice, and one context has one encoding.
func parseContext(c *cursor) (map[string]string, error) {
	block, err := c.field("encryption context", MaxContextSize)
	if err != nil || len(block) == 0 {
		return nil, err
	}
	in := &cursor{b: block}
	count, err := in.uint16()
	if err != nil || count == 0 {
		return nil, fmt.Errorf("%w: encryption context without a count", ErrMalformed)
	}
	if count > MaxContextPairs {
		return nil, fmt.Errorf("%w: encryption context of %d pairs, at most %d", ErrLimit, count, MaxContextPairs)
	}
	context := make(map[string]string, min(int(count), len(block)/4))
	if err := parsePairs(in, int(count), context); err != nil {
		return nil, err
	}
	return context, nil
}

func parsePairs(in *cursor, count int, context map[string]string) error {
	last := ""
	for i := range count {
		k, errKey := in.field("context key", MaxContextSize)
		v, errValue := in.field("context value", MaxContextSize)
		if errKey != nil || errValue != nil {
			return fmt.Errorf("%w: encryption context shorter than its count", ErrMalformed)
		}
		key, value := string(k), string(v)
		if !utf8.ValidString(key) || !utf8.ValidString(value) {
			return fmt.Errorf("%w: encryption context is not UTF-8", ErrMalformed)
		}
		if i > 0 && key <= last {
			return fmt.Errorf("%w: encryption context is not sorted, or has a key twice", ErrMalformed)
		}
		context[key], last = value, key
	}
	if in.off != len(in.b) {
		return fmt.Errorf("%w: encryption context longer than its count", ErrMalformed)
	}
	return nil
}
