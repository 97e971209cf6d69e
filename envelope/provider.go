package envelope

import (
	"crypto/hkdf"
	"crypto/sha512"
	"crypto/subtle"
	"errors"
	"fmt"
	"unicode"
	"unicode/utf8"
)

// ProviderID is the provider ID of the EDKs whose provider information is a
// [ProviderInfo].
const ProviderID = "kms-agent"

// Bounds of the strings in a ProviderInfo, in bytes.
const (
	MaxKeyNameSize    = 256
	MaxURISize        = 1024
	MaxKeyVersionSize = 256
)

// Versions of the encoding: with a key check or without.
const (
	infoUnchecked = 1
	infoChecked   = 2
)

// KeyCheckSize is the size of a key check, in bytes.
const KeyCheckSize = 16

// KeyCheck tells whether a data key is the one that was wrapped: whoever has not the data
// key learns nothing from it. The zero value is none.
type KeyCheck [KeyCheckSize]byte

const infoKeyCheck = "kms-agent key check 1"

// NewKeyCheck returns the check of a data key: 16 bytes of HKDF (RFC 5869) over SHA-512
// without a salt. Key material that could be guessed must have none, as anybody could
// try guesses on it.
func NewKeyCheck(dataKey []byte) (c KeyCheck, err error) {
	if len(dataKey) != DataKeySize {
		return c, fmt.Errorf("a key check is for data keys of %d bytes, not of %d", DataKeySize, len(dataKey))
	}
	okm, err := hkdf.Key(sha512.New, dataKey, nil, infoKeyCheck, KeyCheckSize)
	if err != nil {
		return c, fmt.Errorf("derive the key check: %w", err)
	}
	return KeyCheck(okm), nil
}

// Holds tells whether a data key may be the one that was wrapped: where there is no check
// every one may.
func (c KeyCheck) Holds(dataKey []byte) bool {
	if c == (KeyCheck{}) {
		return true
	}
	got, err := NewKeyCheck(dataKey)
	return err == nil && subtle.ConstantTimeCompare(got[:], c[:]) == 1
}

// Purpose is what an encrypted data key was made for. An operation opens only
// its own, so that none is an oracle for another.
type Purpose uint8

// The purposes; there is no zero purpose.
const (
	PurposeMessage  Purpose = 1 // made by Encrypt
	PurposeExported Purpose = 2 // made by GenerateDataKey
	PurposeWrap     Purpose = 3 // made by Wrap
	PurposeProbe    Purpose = 4 // a canary of the agent
)

// String returns "message", "exported", "wrap" or "probe".
func (p Purpose) String() string {
	switch p {
	case PurposeMessage:
		return "message"
	case PurposeExported:
		return "exported"
	case PurposeWrap:
		return "wrap"
	case PurposeProbe:
		return "probe"
	default:
		return fmt.Sprintf("purpose %d", uint8(p))
	}
}

// ProviderInfo says which wrapping key encrypted a data key, and for what. It
// is public, and as part of the header authentic once a message has opened.
type ProviderInfo struct {
	Purpose      Purpose
	Key          string   // logical key name, at most MaxKeyNameSize bytes
	URI          string   // wrapping key, such as "vault:transit/orders", at most MaxURISize bytes
	Version      string   // the wrapping key's version, at most MaxKeyVersionSize bytes
	ContextBound bool     // the wrapping key binds the encryption context; always so for exported and wrap
	Partition    [16]byte // random; tells writers apart, grants nothing
	Check        KeyCheck // of the data key; never of what Wrap wraps
}

// Marshal returns the encoding of p, or an error where p breaks a rule of it.
func (p ProviderInfo) Marshal() ([]byte, error) {
	if err := p.check(); err != nil {
		return nil, fmt.Errorf("provider information: %w", err)
	}
	b := make([]byte, 0, 3+len(p.Partition)+len(p.Check)+6+len(p.Key)+len(p.URI)+len(p.Version))
	b = append(b, infoUnchecked, byte(p.Purpose), 0)
	if p.ContextBound {
		b[2] = 1
	}
	b = append(b, p.Partition[:]...)
	if p.Check != (KeyCheck{}) {
		b[0] = infoChecked
		b = append(b, p.Check[:]...)
	}
	b = appendField(b, p.Key)
	b = appendField(b, p.URI)
	return appendField(b, p.Version), nil
}

// ParseProviderInfo reads what Marshal wrote, and nothing else. Its errors wrap
// ErrMalformed or ErrLimit. The result does not alias b.
func ParseProviderInfo(b []byte) (ProviderInfo, error) {
	p, err := parseProviderInfo(&cursor{b: b})
	if err != nil {
		return ProviderInfo{}, fmt.Errorf("provider information: %w", err)
	}
	if err := p.check(); err != nil {
		return ProviderInfo{}, fmt.Errorf("%w: provider information: %w", ErrMalformed, err)
	}
	return p, nil
}

func parseProviderInfo(c *cursor) (p ProviderInfo, err error) {
	head, err := c.take(3 + len(p.Partition))
	if err != nil {
		return p, err
	}
	if head[0] != infoUnchecked && head[0] != infoChecked || head[2] > 1 {
		return p, fmt.Errorf("%w: version %d or binding mode %d is unknown", ErrMalformed, head[0], head[2])
	}
	p.Purpose, p.ContextBound = Purpose(head[1]), head[2] == 1
	copy(p.Partition[:], head[3:])
	if head[0] == infoChecked {
		check, err := c.take(len(p.Check))
		if err != nil {
			return p, err
		}
		if copy(p.Check[:], check); p.Check == (KeyCheck{}) {
			return p, fmt.Errorf("%w: a key check of zeros", ErrMalformed)
		}
	}
	for _, f := range []struct {
		name string
		most int
		to   *string
	}{{"key name", MaxKeyNameSize, &p.Key}, {"URI", MaxURISize, &p.URI}, {"version", MaxKeyVersionSize, &p.Version}} {
		v, err := c.field(f.name, f.most)
		if err != nil {
			return p, err
		}
		*f.to = string(v)
	}
	return p, c.end()
}

// check reports which rule p breaks.
func (p ProviderInfo) check() error {
	switch p.Purpose {
	case PurposeMessage, PurposeProbe:
	case PurposeExported, PurposeWrap:
		if !p.ContextBound {
			return fmt.Errorf("purpose %s always binds the context", p.Purpose)
		}
	default:
		return fmt.Errorf("purpose %d is unknown", uint8(p.Purpose))
	}
	if p.Purpose == PurposeWrap && p.Check != (KeyCheck{}) {
		return errors.New("key material of a caller has no key check: it could be guessed with it")
	}
	return errors.Join(
		checkText("key name", p.Key, MaxKeyNameSize),
		checkText("URI", p.URI, MaxURISize),
		checkText("version", p.Version, MaxKeyVersionSize))
}

// checkText keeps out what is empty, too long or would garble a log.
func checkText(name, s string, most int) error {
	if s == "" || len(s) > most {
		return fmt.Errorf("%s has %d bytes, must have 1 to %d", name, len(s), most)
	}
	if !utf8.ValidString(s) {
		return fmt.Errorf("%s is not UTF-8", name)
	}
	for _, r := range s {
		if unicode.IsControl(r) {
			return fmt.Errorf("%s has a control character", name)
		}
	}
	return nil
}
