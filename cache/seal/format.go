package seal

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
)

// The file, numbers big endian:
//
//	magic      8  "KMSASTOR"
//	version    1  01
//	counter    8  the sealer's counter once this state is in force
//	length     4  of what follows, without the checksum
//	sealed     …  the records, sealed with the 17 bytes of magic, version and
//	              counter as additional data
//	checksum  32  SHA-256 of all before: tells a damaged file from a foreign one
//
// The records in clear:
//
//	count      4
//	count times:
//	  type     1  a RecordType
//	  length   4
//	  value    …
//
// There is one encoding of a list of records. Nothing may follow.
const (
	magic         = "KMSASTOR"
	formatVersion = 1
	counterAt     = len(magic) + 1
	lengthAt      = counterAt + 8
	headerSize    = lengthAt + 4
	checksumSize  = sha256.Size
	recordHeader  = 1 + 4
)

// What a store holds at most. An entry of a data key is under 1 KiB as a rule.
const (
	MaxRecords = 1 << 17
	MaxValue   = 64 << 10
	// MaxContent bounds the records with their headers, in bytes. All of them
	// are in locked memory while they are loaded or saved.
	MaxContent = 16 << 20

	maxSealed = MaxContent + Overhead
	maxFile   = headerSize + maxSealed + checksumSize
)

// RecordType says what a Record is about.
type RecordType uint8

// The types of records. The store does not look into their values.
const (
	// DataKey is an encrypted data key with its data key, what it is bound to, and how
	// much of its limits is reserved.
	DataKey RecordType = iota + 1
	// Confirmation is upstream's last yes to an authority, and when.
	Confirmation
	// Note is what the cache's user wants to know again.
	Note
	// Tombstone is a revocation that only a later yes clears.
	Tombstone
	// Clock is the highest wall time that was seen, and the clocks of outages.
	Clock

	lastType = Clock
)

// Record is one fact in a store. Its value may be secret.
type Record struct {
	Type  RecordType
	Value []byte // at most MaxValue bytes
}

// contentSize checks that the records can be stored and returns the size of
// their encoding.
func contentSize(records []Record) (int, error) {
	if len(records) > MaxRecords {
		return 0, fmt.Errorf("%w: %d records, at most %d are possible", ErrTooLarge, len(records), MaxRecords)
	}
	size := 4
	for i, r := range records {
		if r.Type < DataKey || r.Type > lastType {
			return 0, fmt.Errorf("%w: record %d has the unknown type %d", ErrWrite, i, r.Type)
		}
		if len(r.Value) > MaxValue {
			return 0, fmt.Errorf("%w: record %d has %d bytes, at most %d are possible", ErrTooLarge, i, len(r.Value), MaxValue)
		}
		size += recordHeader + len(r.Value)
	}
	if size > MaxContent {
		return 0, fmt.Errorf("%w: %d bytes of records, at most %d are possible", ErrTooLarge, size, MaxContent)
	}
	return size, nil
}

// appendContent appends the encoding of records that contentSize has passed.
func appendContent(dst []byte, records []Record) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(records)))
	for _, r := range records {
		dst = append(dst, byte(r.Type))
		dst = binary.BigEndian.AppendUint32(dst, uint32(len(r.Value)))
		dst = append(dst, r.Value...)
	}
	return dst
}

// parseContent returns records whose values are parts of content.
func parseContent(content []byte) ([]Record, error) {
	if len(content) < 4 || len(content) > MaxContent {
		return nil, fmt.Errorf("%w: %d bytes of records", ErrDamaged, len(content))
	}
	count, rest := binary.BigEndian.Uint32(content), content[4:]
	if count > MaxRecords || int(count) > len(rest)/recordHeader {
		return nil, fmt.Errorf("%w: %d records in %d bytes", ErrDamaged, count, len(rest))
	}
	records := make([]Record, 0, count)
	for i := range count {
		if len(rest) < recordHeader {
			return nil, fmt.Errorf("%w: record %d ends early", ErrDamaged, i)
		}
		kind, length := RecordType(rest[0]), binary.BigEndian.Uint32(rest[1:])
		rest = rest[recordHeader:]
		if kind < DataKey || kind > lastType {
			return nil, fmt.Errorf("%w: record %d has the unknown type %d", ErrDamaged, i, kind)
		}
		if length > MaxValue || int(length) > len(rest) {
			return nil, fmt.Errorf("%w: record %d has a length of %d", ErrDamaged, i, length)
		}
		records = append(records, Record{Type: kind, Value: rest[:length:length]})
		rest = rest[length:]
	}
	if len(rest) != 0 {
		return nil, fmt.Errorf("%w: %d bytes follow the last record", ErrDamaged, len(rest))
	}
	return records, nil
}

// appendHeader appends what is authenticated with the records.
func appendHeader(dst []byte, counter uint64) []byte {
	return binary.BigEndian.AppendUint64(append(append(dst, magic...), formatVersion), counter)
}

// envelope is a file, parsed; its slices are parts of the file.
type envelope struct {
	counter uint64
	aad     []byte
	sealed  []byte
}

func parseFile(file []byte) (*envelope, error) {
	if n := min(len(file), len(magic)); n == 0 || string(file[:n]) != magic[:n] {
		return nil, fmt.Errorf("%w: check the path", ErrNotStore)
	}
	if len(file) > len(magic) && file[len(magic)] != formatVersion {
		if file[len(magic)] < formatVersion {
			return nil, fmt.Errorf("%w: version %d never existed", ErrDamaged, file[len(magic)])
		}
		return nil, fmt.Errorf("%w: version %d, this program knows %d: use a newer one", ErrNewer, file[len(magic)], formatVersion)
	}
	if len(file) < headerSize {
		return nil, fmt.Errorf("%w: %d bytes", ErrTruncated, len(file))
	}
	length := binary.BigEndian.Uint32(file[lengthAt:])
	if length > maxSealed {
		return nil, fmt.Errorf("%w: a length of %d", ErrDamaged, length)
	}
	switch want := headerSize + int(length) + checksumSize; {
	case len(file) < want:
		return nil, fmt.Errorf("%w: %d of %d bytes", ErrTruncated, len(file), want)
	case len(file) > want:
		return nil, fmt.Errorf("%w: %d bytes follow the end", ErrDamaged, len(file)-want)
	}
	body, checksum := file[:len(file)-checksumSize], file[len(file)-checksumSize:]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], checksum) {
		return nil, fmt.Errorf("%w: its checksum is wrong", ErrDamaged)
	}
	return &envelope{
		counter: binary.BigEndian.Uint64(file[counterAt:]), aad: body[:lengthAt:lengthAt], sealed: body[headerSize:],
	}, nil
}
