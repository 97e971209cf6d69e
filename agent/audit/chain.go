package audit

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// InitialKeySize is the size of the key that a chain begins with, in bytes.
const InitialKeySize = sha256.Size

const (
	nextKeyLabel = "kms-agent audit 1: next key"
	chainIDLabel = "kms-agent audit 1: chain"
	keyPrefix    = "kms-agent-audit-key-1:"

	linePrefix     = `{"sequence":`
	previousPrefix = `,"previous":"`
	macPrefix      = `,"mac":"`
	lineSuffix     = `"}`
	hexSize        = 2 * sha256.Size
	// macSize is what the MAC adds to the end of the text that it covers.
	macSize = len(macPrefix) + hexSize + len(lineSuffix)
	// previousSize is what stands between a record's own fields and its MAC.
	previousSize = len(previousPrefix) + hexSize + 1
)

// chain is the state between two records. Its key is that of the next record;
// the keys of earlier records cannot be computed from it.
type chain struct {
	next     uint64 // sequence number of the next record
	key      [sha256.Size]byte
	previous [sha256.Size]byte // MAC of the record before; zero at the start
}

func newChain(initialKey []byte) (chain, error) {
	c := chain{next: 1}
	if len(initialKey) != len(c.key) {
		return c, fmt.Errorf("initial key has %d bytes; %d are needed", len(initialKey), len(c.key))
	}
	copy(c.key[:], initialKey)
	return c, nil
}

// seal appends the line of a record with the given fields, without its newline,
// and advances the chain.
func (c *chain) seal(dst, fields []byte) []byte {
	start := len(dst)
	dst = append(dst, linePrefix...)
	dst = strconv.AppendUint(dst, c.next, 10)
	dst = append(dst, ',')
	dst = append(dst, fields...)
	dst = append(dst, previousPrefix...)
	dst = hex.AppendEncode(dst, c.previous[:])
	dst = append(dst, '"')
	c.advance(dst[start:])
	dst = append(dst, macPrefix...)
	dst = hex.AppendEncode(dst, c.previous[:])
	return append(dst, lineSuffix...)
}

// advance moves past the record whose MAC covers text.
func (c *chain) advance(text []byte) {
	h := hmac.New(sha256.New, c.key[:])
	h.Write(text)
	h.Sum(c.previous[:0])
	h.Reset()
	h.Write([]byte(nextKeyLabel))
	h.Sum(c.key[:0])
	c.next++
}

// skip moves to the key of record n without the records between.
func (c *chain) skip(n uint64) {
	for c.next < n {
		h := hmac.New(sha256.New, c.key[:])
		h.Write([]byte(nextKeyLabel))
		h.Sum(c.key[:0])
		c.next++
	}
}

// id names the chain without telling its key. Only the chain's start has it.
func (c *chain) id() string {
	h := hmac.New(sha256.New, c.key[:])
	h.Write([]byte(chainIDLabel))
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// signedLine is a line taken apart, without a look at its MAC.
type signedLine struct {
	sequence      uint64
	text          []byte // what the MAC covers
	previous, mac [sha256.Size]byte
}

// parseLine takes a line apart, without its newline. Anything but the form that
// seal writes is no record.
func parseLine(line []byte) (s signedLine, ok bool) {
	if len(line) < len(linePrefix)+previousSize+macSize || !bytes.HasPrefix(line, []byte(linePrefix)) {
		return signedLine{}, false
	}
	s.text = line[:len(line)-macSize]
	number, _, found := bytes.Cut(s.text[len(linePrefix):], []byte(","))
	n, err := strconv.ParseUint(string(number), 10, 64)
	if !found || err != nil || number[0] == '0' ||
		!quotedHex(&s.mac, line[len(s.text):], macPrefix, lineSuffix) ||
		!quotedHex(&s.previous, s.text[len(s.text)-previousSize:], previousPrefix, `"`) {
		return signedLine{}, false
	}
	s.sequence = n
	return s, true
}

// quotedHex decodes text of the form prefix, lowercase hexadecimal, suffix.
func quotedHex(dst *[sha256.Size]byte, text []byte, prefix, suffix string) bool {
	text, begins := bytes.CutPrefix(text, []byte(prefix))
	text, ends := bytes.CutSuffix(text, []byte(suffix))
	if !begins || !ends || len(text) != hexSize || bytes.ContainsAny(text, "ABCDEF") {
		return false
	}
	_, err := hex.Decode(dst[:], text)
	return err == nil
}

// accept advances the chain past s when s is its next record: the sequence
// number and the MAC are right. The link to the record before is for the
// caller to compare.
func (c *chain) accept(s signedLine) bool {
	if s.sequence != c.next {
		return false
	}
	after := *c
	after.advance(s.text)
	if !hmac.Equal(after.previous[:], s.mac[:]) {
		return false
	}
	*c = after
	return true
}

// NewInitialKey returns a random initial key.
func NewInitialKey() []byte {
	key := make([]byte, InitialKeySize)
	rand.Read(key)
	return key
}

// FormatInitialKey is the text of an initial key file: one line,
// "kms-agent-audit-key-1:" and the key in unpadded base64url (RFC 4648, section 5).
func FormatInitialKey(key []byte) string {
	return keyPrefix + base64.RawURLEncoding.EncodeToString(key) + "\n"
}

// ParseInitialKey reads the text of an initial key file. Space around the line
// is ignored. Errors never quote the text.
func ParseInitialKey(text []byte) ([]byte, error) {
	encoded, found := strings.CutPrefix(strings.TrimSpace(string(text)), keyPrefix)
	if !found {
		return nil, fmt.Errorf("not an audit key file: it must hold one line that begins with %q", keyPrefix)
	}
	key, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil || len(key) != InitialKeySize {
		return nil, fmt.Errorf("damaged audit key file: %d bytes in unpadded base64url must follow %s", InitialKeySize, keyPrefix)
	}
	return key, nil
}
