package audit

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"maps"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"
)

// MaxRecordSize bounds the fields of one record, encoded, in bytes. It holds
// the largest encryption context there is, in clear and escaped.
const MaxRecordSize = 1 << 20

// maxLine bounds a line: fields, sequence number and chain.
const maxLine = MaxRecordSize + 512

// contextMACSize is how much of the HMAC of a context value is written, in bytes.
const contextMACSize = 16

// encoder writes the fields of records as encoding/json would, without the
// sequence number and without escaping for HTML. It is written by hand because
// every operation pays for it: see BenchmarkEncode.
type encoder struct {
	values ContextValues
	key    []byte // for ContextHMAC
}

// append appends the fields of r, comma separated, without braces.
func (e *encoder) append(b []byte, r *Record, now time.Time) []byte {
	at := r.Time
	if at.IsZero() {
		at = now
	}
	b = append(b, `"time":"`...)
	b = at.UTC().AppendFormat(b, time.RFC3339Nano)
	b = append(b, `","kind":`...)
	b = appendString(b, string(r.Kind))
	b = appendText(b, "request_id", r.RequestID)
	b = appendText(b, "door", r.Door)
	b = appendCaller(b, r.Caller)
	b = appendText(b, "operation", r.Operation)
	b = appendText(b, "key", r.Key)
	b = appendText(b, "key_version", r.KeyVersion)
	if r.Source != nil {
		b = append(b, `,"source":{`...)
		start := len(b)
		b = appendText(b, "key", r.Source.Key)
		b = appendText(b, "key_version", r.Source.KeyVersion)
		b = appendFreshness(b, r.Source.Freshness)
		b = appendText(b, "message_id", r.Source.MessageID)
		b = appendText(b, "rule", r.Source.Rule)
		b = closeObject(b, start)
	}
	b = e.appendContext(b, r)
	b = appendText(b, "message_id", r.MessageID)
	b = appendText(b, "rule", r.Rule)
	b = appendText(b, "outcome", string(r.Outcome))
	b = appendText(b, "reason", r.Reason)
	b = appendText(b, "detail", r.Detail)
	b = appendFreshness(b, r.Freshness)
	b = appendText(b, "backend", r.Backend)
	b = appendInt(b, "duration_us", r.DurationMicros)
	b = appendInt(b, "upstream_us", r.UpstreamMicros)
	b = appendUint(b, "bytes_in", r.BytesIn)
	b = appendUint(b, "bytes_out", r.BytesOut)
	b = appendUint(b, "count", r.Count)
	if !r.Since.IsZero() {
		b = append(b, `,"since":"`...)
		b = append(r.Since.UTC().AppendFormat(b, time.RFC3339Nano), '"')
	}
	return appendLogEvent(b, r.Log)
}

func appendCaller(b []byte, c Caller) []byte {
	if c == (Caller{}) {
		return b
	}
	b = append(b, `,"caller":{`...)
	start := len(b)
	b = appendText(b, "spiffe_id", c.SPIFFEID)
	b = appendText(b, "proof", c.Proof)
	b = strconv.AppendUint(append(b, `,"uid":`...), uint64(c.UID), 10)
	b = strconv.AppendUint(append(b, `,"gid":`...), uint64(c.GID), 10)
	b = strconv.AppendInt(append(b, `,"pid":`...), int64(c.PID), 10)
	return closeObject(b, start)
}

func appendFreshness(b []byte, f Freshness) []byte {
	if f == (Freshness{}) {
		return b
	}
	b = append(b, `,"freshness":{`...)
	start := len(b)
	b = appendText(b, "source", f.Source)
	b = appendInt(b, "age_ms", f.AgeMillis)
	b = appendInt(b, "grace_left_ms", f.GraceLeftMillis)
	return closeObject(b, start)
}

func appendLogEvent(b []byte, l *LogEvent) []byte {
	if l == nil {
		return b
	}
	b = append(b, `,"log":{`...)
	start := len(b)
	b = appendText(b, "chain", l.Chain)
	b = appendUint(b, "torn_bytes", l.TornBytes)
	b = appendText(b, "torn_sha256", l.TornSHA256)
	b = appendUint(b, "gap_from", l.GapFrom)
	b = appendUint(b, "gap_to", l.GapTo)
	b = appendText(b, "file", l.File)
	b = appendUint(b, "expired_from", l.ExpiredFrom)
	b = appendUint(b, "expired_to", l.ExpiredTo)
	return closeObject(b, start)
}

// appendContext writes the encryption context in the one way configured.
func (e *encoder) appendContext(b []byte, r *Record) []byte {
	if len(r.Context) == 0 {
		return b
	}
	var space [16]string
	keys := slices.AppendSeq(space[:0], maps.Keys(r.Context))
	slices.Sort(keys)
	open, end := `,"context_keys":[`, byte(']')
	switch e.values {
	case ContextHMAC:
		open, end = `,"context_hmac":{`, '}'
	case ContextClear:
		open, end = `,"context":{`, '}'
	case ContextKeysOnly:
	}
	b = append(b, open...)
	for i, key := range keys {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendString(b, key)
		switch e.values {
		case ContextHMAC:
			b = append(b, ':', '"')
			b = hex.AppendEncode(b, e.contextMAC(key, r.Context[key]))
			b = append(b, '"')
		case ContextClear:
			b = appendString(append(b, ':'), r.Context[key])
		case ContextKeysOnly:
		}
	}
	return append(b, end)
}

// contextMAC covers the name with the value, so that equal values under two
// names cannot be told.
func (e *encoder) contextMAC(name, value string) []byte {
	h := hmac.New(sha256.New, e.key)
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(name))))
	h.Write([]byte(name))
	h.Write([]byte(value))
	return h.Sum(nil)[:contextMACSize]
}

// closeObject ends an object that began at start: it drops the comma before
// the first field.
func closeObject(b []byte, start int) []byte {
	if len(b) > start {
		b = slices.Delete(b, start, start+1)
	}
	return append(b, '}')
}

func appendText(b []byte, name, value string) []byte {
	if value == "" {
		return b
	}
	return appendString(appendName(b, name), value)
}

func appendInt(b []byte, name string, value int64) []byte {
	if value == 0 {
		return b
	}
	return strconv.AppendInt(appendName(b, name), value, 10)
}

func appendUint(b []byte, name string, value uint64) []byte {
	if value == 0 {
		return b
	}
	return strconv.AppendUint(appendName(b, name), value, 10)
}

func appendName(b []byte, name string) []byte {
	b = append(b, ',', '"')
	b = append(b, name...)
	return append(b, '"', ':')
}

// appendString appends s as a JSON string (RFC 8259, section 7); invalid UTF-8
// becomes U+FFFD.
func appendString(b []byte, s string) []byte {
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); {
		if c := s[i]; c < utf8.RuneSelf {
			if c < ' ' || c == '"' || c == '\\' {
				b = appendEscape(append(b, s[start:i]...), rune(c))
				start = i + 1
			}
			i++
			continue
		}
		r, size := utf8.DecodeRuneInString(s[i:])
		if (r == utf8.RuneError && size == 1) || r == '\u2028' || r == '\u2029' {
			b = appendEscape(append(b, s[start:i]...), r)
			start = i + size
		}
		i += size
	}
	return append(append(b, s[start:]...), '"')
}

func appendEscape(b []byte, r rune) []byte {
	switch r {
	case '"', '\\':
		return append(b, '\\', byte(r))
	case '\b':
		return append(b, `\b`...)
	case '\f':
		return append(b, `\f`...)
	case '\n':
		return append(b, `\n`...)
	case '\r':
		return append(b, `\r`...)
	case '\t':
		return append(b, `\t`...)
	}
	const digits = "0123456789abcdef"
	return append(b, '\\', 'u', digits[r>>12&15], digits[r>>8&15], digits[r>>4&15], digits[r&15])
}
