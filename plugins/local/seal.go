package local

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha512"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"
)

const (
	// SealKeySize is the size of a key file and of a credential, in bytes.
	SealKeySize = 32
	// MinPassphrase is the size of the shortest passphrase, in bytes.
	MinPassphrase = 16
	// MaxPassphrase is the size of the longest passphrase, in bytes.
	MaxPassphrase = 1024

	// minRounds is OWASP's figure for PBKDF2-HMAC-SHA512 and what is written;
	// maxRounds bounds what a foreign file can make us compute.
	minRounds = 210_000
	maxRounds = 10_000_000

	credentialsVariable = "CREDENTIALS_DIRECTORY"
)

// Seal says where the secret that seals a keystore is read from. Exactly one
// field is set. Paths are absolute. The zero Seal is refused.
type Seal struct {
	// KeyFile holds exactly SealKeySize random bytes (see CreateKeyFile).
	KeyFile string `json:"key_file,omitempty"`
	// Credential names a systemd credential with exactly SealKeySize random
	// bytes, read from $CREDENTIALS_DIRECTORY (systemd.exec(5)).
	Credential string `json:"credential,omitempty"`
	// PassphraseFile holds one line of MinPassphrase to MaxPassphrase bytes of
	// UTF-8; the line's end is not part of it.
	PassphraseFile string `json:"passphrase_file,omitempty"`
}

// Validate checks the seal without reading its secret. Errors wrap ErrSeal.
func (s Seal) Validate() error {
	set := 0
	for _, v := range []string{s.KeyFile, s.Credential, s.PassphraseFile} {
		if v != "" {
			set++
		}
	}
	switch {
	case set == 0:
		return fmt.Errorf("%w: none is named: set one of key_file, credential, passphrase_file", ErrSeal)
	case set > 1:
		return fmt.Errorf("%w: several are named: set only one of key_file, credential, passphrase_file", ErrSeal)
	case s.Credential != "":
		return checkCredential(s.Credential)
	}
	if path := s.KeyFile + s.PassphraseFile; !filepath.IsAbs(path) {
		return fmt.Errorf("%w: %q is a relative path: give an absolute one", ErrSeal, path)
	}
	return nil
}

// checkCredential takes the names that systemd takes: one path element.
func checkCredential(name string) error {
	if len(name) > 255 || name == "." || name == ".." || strings.ContainsAny(name, "/:\x00") {
		return fmt.Errorf("%w: credential name %.255q: use the name given to LoadCredential=, without a path", ErrSeal, name)
	}
	return nil
}

// String names the seal without its secret.
func (s Seal) String() string {
	switch {
	case s.KeyFile != "":
		return "key file " + s.KeyFile
	case s.Credential != "":
		return "credential " + s.Credential
	case s.PassphraseFile != "":
		return "passphrase file " + s.PassphraseFile
	default:
		return "no seal"
	}
}

func (s Seal) kind() sealKind {
	if s.PassphraseFile != "" {
		return sealPassphrase
	}
	return sealKey
}

// secret reads and, for a passphrase, stretches the seal's secret into
// protected memory, which the caller frees. Errors wrap ErrSeal.
func (s Seal) secret(rounds uint32, salt []byte) (*region, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	raw, err := s.read()
	if err != nil {
		return nil, fmt.Errorf("%w: %s %w", ErrSeal, s, err)
	}
	defer clear(raw)
	if s.kind() == sealPassphrase {
		return stretch(s, raw, rounds, salt)
	}
	if len(raw) != SealKeySize {
		return nil, fmt.Errorf("%w: %s has %d bytes: it must hold exactly %d random bytes, not text: head -c %d /dev/urandom",
			ErrSeal, s, len(raw), SealKeySize, SealKeySize)
	}
	if bytes.Count(raw, raw[:1]) == len(raw) {
		return nil, fmt.Errorf("%w: %s repeats one byte: make a random one: head -c %d /dev/urandom", ErrSeal, s, SealKeySize)
	}
	m, err := newRegion(SealKeySize)
	if err != nil {
		return nil, err
	}
	copy(m.data, raw)
	return m, nil
}

func (s Seal) read() ([]byte, error) {
	switch {
	case s.KeyFile != "":
		return readPrivate(s.KeyFile, SealKeySize, ownerOnly)
	case s.PassphraseFile != "":
		return readPrivate(s.PassphraseFile, MaxPassphrase+len("\r\n"), ownerOnly)
	}
	dir := os.Getenv(credentialsVariable)
	if dir == "" {
		return nil, fmt.Errorf("%w: %s is not set: start the agent by systemd with LoadCredential= or LoadCredentialEncrypted=",
			ErrNotExist, credentialsVariable)
	}
	return readPrivate(filepath.Join(dir, s.Credential), SealKeySize, credentialMode)
}

func stretch(s Seal, raw []byte, rounds uint32, salt []byte) (*region, error) {
	line := bytes.TrimSuffix(bytes.TrimSuffix(raw, []byte("\n")), []byte("\r"))
	switch {
	case bytes.ContainsAny(line, "\r\n\x00"):
		return nil, fmt.Errorf("%w: %s has several lines: write the passphrase on one line", ErrSeal, s)
	case !utf8.Valid(line):
		return nil, fmt.Errorf("%w: %s is not UTF-8 text: use a key file for random bytes", ErrSeal, s)
	case len(line) < MinPassphrase:
		return nil, fmt.Errorf("%w: %s: a passphrase of %d bytes is too short: use at least %d, better a key file",
			ErrSeal, s, len(line), MinPassphrase)
	case len(line) > MaxPassphrase:
		return nil, fmt.Errorf("%w: %s is longer than %d bytes: shorten it", ErrSeal, s, MaxPassphrase)
	}
	m, err := newRegion(SealKeySize)
	if err != nil {
		return nil, err
	}
	erasing(func() {
		var out []byte
		out, err = pbkdf2.Key(sha512.New, string(line), salt, int(rounds), SealKeySize)
		copy(m.data, out)
		clear(out)
	})
	if err != nil {
		m.free()
		return nil, fmt.Errorf("%w: %s: PBKDF2: %w", ErrSeal, s, err)
	}
	return m, nil
}

// CreateKeyFile writes SealKeySize random bytes to a new file of mode 0600,
// durably. It never replaces a file: then the error wraps ErrExists.
func CreateKeyFile(path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("key file %s: %w", path, err)
	}
	m, err := newRegion(SealKeySize)
	if err != nil {
		return err
	}
	defer m.free()
	_, _ = rand.Read(m.data)
	if err := writeNew(path, m.data); err != nil {
		return fmt.Errorf("key file %s: %w", path, err)
	}
	return nil
}
