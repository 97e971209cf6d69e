package envelope

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"unicode/utf8"
)

const (
	formatVersion  = 0x02
	suiteID        = 0x0478
	commitmentSize = 32
	tagSize        = 16
	ivSize         = 12

	contentNonFramed = 0x01
	contentFramed    = 0x02
)

// Header is what a message says about itself before its body. Until the message
// was opened, or a Reader unlocked, nothing in it is authentic.
type Header struct {
	MessageID   [MessageIDSize]byte
	Context     map[string]string // the encryption context; nil when empty
	EDKs        []EDK             // at least one
	FrameLength uint32            // plaintext bytes of each frame but the last; 0: not framed

	body       []byte // the header as serialised, commitment included, tag not
	commitment []byte
	tag        []byte
}

// checkEDKs reports whether edks may be written into a message.
func checkEDKs(edks []EDK) error {
	if len(edks) == 0 {
		return errors.New("a message needs at least one encrypted data key")
	}
	if len(edks) > MaxEDKs {
		return fmt.Errorf("%w: %d encrypted data keys, at most %d", ErrLimit, len(edks), MaxEDKs)
	}
	for i, e := range edks {
		if err := checkEDK(e); err != nil {
			return fmt.Errorf("encrypted data key %d: %w", i, err)
		}
	}
	return nil
}

func checkEDK(e EDK) error {
	switch {
	case e.ProviderID == "" || !utf8.ValidString(e.ProviderID):
		return errors.New("provider ID is empty or not UTF-8")
	case len(e.Ciphertext) == 0:
		return errors.New("it is empty")
	case len(e.ProviderID) > MaxProviderIDSize:
		return fmt.Errorf("%w: provider ID of %d bytes, at most %d", ErrLimit, len(e.ProviderID), MaxProviderIDSize)
	case len(e.ProviderInfo) > MaxProviderInfoSize:
		return fmt.Errorf("%w: provider information of %d bytes, at most %d", ErrLimit, len(e.ProviderInfo), MaxProviderInfoSize)
	case len(e.Ciphertext) > MaxEDKSize:
		return fmt.Errorf("%w: encrypted data key of %d bytes, at most %d", ErrLimit, len(e.Ciphertext), MaxEDKSize)
	}
	return nil
}

// headerSize is the size of a header with its commitment and tag.
func headerSize(edks []EDK, context map[string]string) int {
	n := 1 + 2 + MessageIDSize + 2 + contextSize(context) + 2 + 1 + 4 + commitmentSize + tagSize
	for _, e := range edks {
		n += 6 + len(e.ProviderID) + len(e.ProviderInfo) + len(e.Ciphertext)
	}
	return n
}

// checkHeader reports whether a header of these parts may be written.
func checkHeader(edks []EDK, context map[string]string) error {
	if err := checkEDKs(edks); err != nil {
		return err
	}
	if err := CheckContext(context); err != nil {
		return err
	}
	if n := headerSize(edks, context); n > MaxHeaderSize {
		return fmt.Errorf("%w: header of %d bytes, at most %d", ErrLimit, n, MaxHeaderSize)
	}
	return nil
}

// append appends the header up to its commitment, which the keys give.
func (h *Header) append(dst []byte) []byte {
	dst = append(dst, formatVersion)
	dst = binary.BigEndian.AppendUint16(dst, suiteID)
	dst = append(dst, h.MessageID[:]...)
	dst = appendContext(dst, h.Context)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(h.EDKs)))
	for _, e := range h.EDKs {
		dst = appendField(dst, e.ProviderID)
		dst = appendField(dst, e.ProviderInfo)
		dst = appendField(dst, e.Ciphertext)
	}
	if h.FrameLength == 0 {
		dst = append(dst, contentNonFramed)
	} else {
		dst = append(dst, contentFramed)
	}
	return binary.BigEndian.AppendUint32(dst, h.FrameLength)
}

// parse reads a header from c into h. The byte slices of h alias what c read.
func (h *Header) parse(c *cursor) error {
	if err := h.parseStart(c); err != nil {
		return err
	}
	var err error
	if h.Context, err = parseContext(c); err != nil {
		return err
	}
	if h.EDKs, err = parseEDKs(c); err != nil {
		return err
	}
	if h.FrameLength, err = parseFraming(c); err != nil {
		return err
	}
	if h.commitment, err = c.take(commitmentSize); err != nil {
		return err
	}
	h.body = c.b[:c.off:c.off]
	h.tag, err = c.take(tagSize)
	return err
}

func (h *Header) parseStart(c *cursor) error {
	version, err := c.uint8()
	if err != nil {
		return err
	}
	if version != formatVersion {
		return fmt.Errorf("%w: version byte %#02x is not 0x02%s", ErrMalformed, version, guess(version))
	}
	suite, err := c.uint16()
	if err != nil {
		return err
	}
	if suite != suiteID {
		return fmt.Errorf("%w: algorithm suite %04x is not 0478, the only one opened here", ErrMalformed, suite)
	}
	id, err := c.take(MessageIDSize)
	if err != nil {
		return err
	}
	copy(h.MessageID[:], id)
	return nil
}

// guess names the commonest reasons for a wrong first byte.
func guess(version uint8) string {
	switch version {
	case 0x01:
		return " (a message of format version 1, which has no key commitment: decrypt it with the AWS Encryption SDK)"
	case 'A':
		return " (base64? decode it first)"
	default:
		return ""
	}
}

func parseEDKs(c *cursor) ([]EDK, error) {
	count, err := c.uint16()
	if err != nil {
		return nil, err
	}
	if count == 0 {
		return nil, fmt.Errorf("%w: no encrypted data key", ErrMalformed)
	}
	if count > MaxEDKs {
		return nil, fmt.Errorf("%w: %d encrypted data keys, at most %d", ErrLimit, count, MaxEDKs)
	}
	edks := make([]EDK, 0, count)
	for range count {
		e, err := parseEDK(c)
		if err != nil {
			return nil, err
		}
		edks = append(edks, e)
	}
	return edks, nil
}

func parseEDK(c *cursor) (EDK, error) {
	id, err := c.field("provider ID", MaxProviderIDSize)
	if err != nil {
		return EDK{}, err
	}
	info, err := c.field("provider information", MaxProviderInfoSize)
	if err != nil {
		return EDK{}, err
	}
	ciphertext, err := c.field("encrypted data key", MaxEDKSize)
	if err != nil {
		return EDK{}, err
	}
	if len(id) == 0 || !utf8.Valid(id) || len(ciphertext) == 0 {
		return EDK{}, fmt.Errorf("%w: encrypted data key without a provider or a key", ErrMalformed)
	}
	return EDK{ProviderID: string(id), ProviderInfo: info, Ciphertext: ciphertext}, nil
}

// parseFraming reads content type and frame length.
func parseFraming(c *cursor) (uint32, error) {
	content, err := c.uint8()
	if err != nil {
		return 0, err
	}
	length, err := c.uint32()
	if err != nil {
		return 0, err
	}
	framed := content == contentFramed && length > 0
	if !framed && (content != contentNonFramed || length != 0) {
		return 0, fmt.Errorf("%w: content type %d with frame length %d", ErrMalformed, content, length)
	}
	if length > MaxFrameLength {
		return 0, fmt.Errorf("%w: frame length %d, at most %d", ErrLimit, length, MaxFrameLength)
	}
	return length, nil
}

// clone returns a header that shares nothing with h but strings.
func (h *Header) clone() *Header {
	c := &Header{MessageID: h.MessageID, FrameLength: h.FrameLength, EDKs: slices.Clone(h.EDKs)}
	for i := range c.EDKs {
		c.EDKs[i].ProviderInfo = bytes.Clone(c.EDKs[i].ProviderInfo)
		c.EDKs[i].Ciphertext = bytes.Clone(c.EDKs[i].Ciphertext)
	}
	for key, value := range h.Context {
		if c.Context == nil {
			c.Context = make(map[string]string, len(h.Context))
		}
		c.Context[key] = value
	}
	return c
}
