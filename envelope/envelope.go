// Package envelope reads and writes encrypted messages.
//
// The format is the AWS Encryption SDK message format, version 2, with the
// algorithm suite 0478: AES-256-GCM, keys derived with HKDF-SHA512, key
// commitment, no signature. docs/format.md specifies it in full. A message
// carries its data key encrypted under one or more wrapping keys; this package
// neither wraps nor unwraps data keys, it is given them in clear.
//
// One-shot messages are made by [Seal] and opened by [Parse] and
// [Message.Open]; streams by [NewWriter] and [NewReader]. Every function is
// safe for concurrent use with distinct values; a Writer or a Reader belongs to
// one goroutine at a time.
package envelope

import (
	"errors"
	"fmt"
)

// Sizes of the format, in bytes.
const (
	DataKeySize   = 32 // DataKeySize is the size of a data key.
	MessageIDSize = 32 // MessageIDSize is the size of a message ID.

	// MinFrameLength is the least frame length of a one-shot message. The frame
	// length of a longer one is the length of its plaintext.
	MinFrameLength = 4096
	// StreamFrameLength is the frame length that a Writer writes.
	StreamFrameLength = 64 << 10
)

// Bounds on what is read and written. A message beyond one of them is refused
// with ErrLimit, even where the format would allow it.
const (
	MaxEDKs             = 16       // MaxEDKs bounds the encrypted data keys of a message.
	MaxProviderIDSize   = 256      // MaxProviderIDSize bounds EDK.ProviderID.
	MaxProviderInfoSize = 4 << 10  // MaxProviderInfoSize bounds EDK.ProviderInfo.
	MaxEDKSize          = 8 << 10  // MaxEDKSize bounds EDK.Ciphertext.
	MaxContextPairs     = 64       // MaxContextPairs bounds the pairs of an encryption context.
	MaxContextSize      = 16 << 10 // MaxContextSize bounds the serialised encryption context.
	MaxHeaderSize       = 64 << 10 // MaxHeaderSize bounds a header with its commitment and tag.
	MaxFrameLength      = 64 << 20 // MaxFrameLength bounds a frame's plaintext, so also that of a one-shot message.
	MaxNonFramedSize    = 64 << 20 // MaxNonFramedSize bounds the plaintext of a message without frames.
)

// What can be wrong with a message. Errors of this package wrap one of these.
var (
	// ErrMalformed means that the bytes are no message of this format: they are
	// something else, of another version or algorithm suite, or damaged.
	ErrMalformed = errors.New("malformed message")
	// ErrTruncated means that the bytes end before the message does. It is an
	// ErrMalformed too.
	ErrTruncated = fmt.Errorf("%w: it ends too early", ErrMalformed)
	// ErrDecrypt means that the message does not open under the data key: the
	// key is another message's, or the message was changed. Which, is not told.
	ErrDecrypt = errors.New("message does not open: it was changed or belongs to another data key")
	// ErrLimit means that a bound of this package would be exceeded.
	ErrLimit = errors.New("beyond a limit of the message format")
)

// errDataKey is a caller's mistake when writing.
var errDataKey = fmt.Errorf("data key must have %d bytes", DataKeySize)

// EDK is a data key encrypted under one wrapping key, as a message carries it.
type EDK struct {
	ProviderID   string // who can decrypt it: ProviderID, "aws-kms", or another's name; UTF-8
	ProviderInfo []byte // which wrapping key, in the provider's own encoding
	Ciphertext   []byte // the encrypted data key
}
