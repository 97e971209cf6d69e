package local

import (
	"encoding/binary"
	"fmt"
)

const (
	magic         = "KMSLOCAL"
	formatVersion = 1

	saltSize   = 32
	checkSize  = 32
	headerSize = len(magic) + 4 + 4 + 3*saltSize + 4

	aeadOverhead = 12 + 16 // nonce and tag
	maxBody      = 2 << 20
	// MaxFileSize bounds a keystore file and a backup, in bytes.
	MaxFileSize = headerSize + maxBody + aeadOverhead
)

// fileKind keeps backups and keystores apart: neither is taken for the other.
type fileKind uint8

const (
	keystoreFile fileKind = 1
	backupFile   fileKind = 2
)

func (k fileKind) String() string {
	if k == backupFile {
		return "backup"
	}
	return "keystore"
}

// sealKind says how the secret of a seal comes about, not where it is stored:
// a key file and a systemd credential with the same bytes are the same seal.
type sealKind uint8

const (
	sealKey        sealKind = 1 // 32 random bytes
	sealPassphrase sealKind = 2 // PBKDF2-HMAC-SHA512
)

func (k sealKind) String() string {
	if k == sealPassphrase {
		return "a passphrase"
	}
	return "a key file or credential"
}

// header is the clear part of a file, authenticated by the body's AEAD:
//
//	magic 8, version 1, file kind 1, seal kind 1, zero 1, rounds 4,
//	stretch salt 32, salt 32, check 32, body length 4
type header struct {
	kind        fileKind
	seal        sealKind
	rounds      uint32         // PBKDF2 rounds; 0 for sealKey
	stretchSalt [saltSize]byte // PBKDF2 salt; zeros for sealKey
	salt        [saltSize]byte // HKDF salt, new with every write
	check       [checkSize]byte
	bodyLength  uint32 // nonce, ciphertext and tag
}

func (h *header) marshal() []byte {
	b := append(make([]byte, 0, headerSize), magic...)
	b = append(b, formatVersion, byte(h.kind), byte(h.seal), 0)
	b = binary.BigEndian.AppendUint32(b, h.rounds)
	b = append(b, h.stretchSalt[:]...)
	b = append(b, h.salt[:]...)
	b = append(b, h.check[:]...)
	return binary.BigEndian.AppendUint32(b, h.bodyLength)
}

// parseFile splits a whole file into header and body, strictly. The body
// aliases file.
func parseFile(file []byte, want fileKind) (*header, []byte, error) {
	if err := checkBeginning(file, want); err != nil {
		return nil, nil, err
	}
	b := file[len(magic)+1:]
	h := &header{kind: fileKind(b[0]), seal: sealKind(b[1]), rounds: binary.BigEndian.Uint32(b[3:])}
	reserved := b[2]
	b = b[7:]
	for _, field := range [][]byte{h.stretchSalt[:], h.salt[:], h.check[:]} {
		b = b[copy(field, b):]
	}
	h.bodyLength = binary.BigEndian.Uint32(b)
	if err := h.validate(); err != nil {
		return nil, nil, err
	}
	if reserved != 0 {
		return nil, nil, fmt.Errorf("%w: reserved header byte is %d", ErrDamaged, reserved)
	}
	body := file[headerSize:]
	switch {
	case len(body) < int(h.bodyLength):
		return nil, nil, fmt.Errorf("%w: %d of %d bytes: %s", ErrTruncated, len(file), headerSize+int(h.bodyLength), restoreCure)
	case len(body) > int(h.bodyLength):
		return nil, nil, fmt.Errorf("%w: %d bytes after its end: %s", ErrDamaged, len(body)-int(h.bodyLength), restoreCure)
	}
	return h, body, nil
}

const restoreCure = "restore it from a backup"

// checkBeginning refuses what is no file of ours, of another version or kind,
// or shorter than a header.
func checkBeginning(file []byte, want fileKind) error {
	known := min(len(file), len(magic))
	switch {
	case len(file) == 0:
		return fmt.Errorf("%w: it is empty: %s", ErrTruncated, restoreCure)
	case string(file[:known]) != magic[:known]:
		return fmt.Errorf("%w: check the path", ErrForeign)
	case len(file) > len(magic) && file[len(magic)] > formatVersion:
		return fmt.Errorf("%w: version %d, this program reads %d: use the program that wrote it, or a newer one",
			ErrNewer, file[len(magic)], formatVersion)
	case len(file) < headerSize:
		return fmt.Errorf("%w: %d bytes, the header alone has %d: %s", ErrTruncated, len(file), headerSize, restoreCure)
	case file[len(magic)] != formatVersion:
		return fmt.Errorf("%w: format version %d: %s", ErrDamaged, file[len(magic)], restoreCure)
	}
	kind := fileKind(file[len(magic)+1])
	switch {
	case kind != keystoreFile && kind != backupFile:
		return fmt.Errorf("%w: file kind %d: %s", ErrDamaged, kind, restoreCure)
	case kind != want && want == keystoreFile:
		return fmt.Errorf("%w: it is a backup: restore it to a new path and use that", ErrForeign)
	case kind != want:
		return fmt.Errorf("%w: it is a keystore, not a backup: open it as one, or make a backup of it", ErrForeign)
	}
	return nil
}

func (h *header) validate() error {
	var zero [saltSize]byte
	switch {
	case h.seal != sealKey && h.seal != sealPassphrase:
		return fmt.Errorf("%w: seal kind %d: %s", ErrDamaged, h.seal, restoreCure)
	case h.seal == sealKey && (h.rounds != 0 || h.stretchSalt != zero):
		return fmt.Errorf("%w: stretching parameters for %s: %s", ErrDamaged, h.seal, restoreCure)
	case h.seal == sealPassphrase && (h.rounds < minRounds || h.rounds > maxRounds):
		return fmt.Errorf("%w: %d PBKDF2 rounds, outside %d to %d: %s", ErrDamaged, h.rounds, minRounds, maxRounds, restoreCure)
	case int64(h.bodyLength) < bodyFixed+aeadOverhead || int64(h.bodyLength) > maxBody+aeadOverhead:
		return fmt.Errorf("%w: a body of %d bytes: %s", ErrDamaged, h.bodyLength, restoreCure)
	}
	return nil
}
