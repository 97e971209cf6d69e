package hsm

import (
	"encoding/binary"
	"errors"
)

// The wrapped form of key material, docs/format.md:
//
//	magic "KAW1" | suite 1 | flags 1 | key ID 16 | version 4 | IV length 1 | IV | ciphertext
//
// What stands before the IV's length is the header. Every suite authenticates the
// header, and the data that the caller binds.
const (
	magic      = "KAW1"
	headerSize = len(magic) + 1 + 1 + idSize + 4
	idSize     = 16
	maxIV      = 16
	// MaxMaterial is how many bytes of key material one Wrap takes at most.
	MaxMaterial = 4096
	// MaxWrapped is how many bytes wrapped key material has at most.
	MaxWrapped = headerSize + 1 + maxIV + MaxMaterial + 1024
)

// flagHybrid says that the token wrapped a key of one use, and that key the
// material: for mechanisms that take only little.
const flagHybrid = 1

// ID is the CKA_ID of a key on the token: random, and new for every version.
type ID [idSize]byte

// header is what says how key material was wrapped.
type header struct {
	suite   Suite
	flags   byte
	id      ID
	version uint32
}

func (h header) append(out []byte) []byte {
	out = append(append(out, magic...), byte(h.suite), h.flags)
	return binary.BigEndian.AppendUint32(append(out, h.id[:]...), h.version)
}

// appendAAD appends what every suite authenticates: the header, and the data that
// the caller binds with its length as 64 bits before it.
func (h header) appendAAD(out, bound []byte) []byte {
	out = binary.BigEndian.AppendUint64(h.append(out), uint64(len(bound)))
	return append(out, bound...)
}

var errWrapped = errors.New("this is no wrapped key material of this format")

// parseWrapped splits wrapped key material. The results point into b.
func parseWrapped(b []byte) (h header, iv, ciphertext []byte, err error) {
	if len(b) < headerSize+1 || len(b) > MaxWrapped || string(b[:len(magic)]) != magic {
		return header{}, nil, nil, errWrapped
	}
	rest := b[len(magic):]
	h.suite, h.flags = Suite(rest[0]), rest[1]
	h.id = ID(rest[2:])
	h.version = binary.BigEndian.Uint32(rest[2+idSize:])
	n := int(b[headerSize])
	if rest = b[headerSize+1:]; n > maxIV || n > len(rest) || h.flags&^flagHybrid != 0 {
		return header{}, nil, nil, errWrapped
	}
	return h, rest[:n], rest[n:], nil
}
