package seal

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
)

// File is a sealer for development: secret and counter are a file of 40 bytes,
// so that whoever can read the disk reads the store, and whoever puts back an
// older copy of both files rolls it back unseen.
type File struct {
	path    string
	key     *Key
	counter uint64
}

const fileSize = SecretSize + 8

// OpenFile reads the sealer at path, or makes a new one where there is none.
// The caller closes it.
func OpenFile(path string) (*File, error) {
	abs, err := filepath.Abs(path)
	if err != nil || path == "" {
		return nil, fmt.Errorf("%w: file sealer %q: give the path of a file", ErrUnavailable, path)
	}
	f := &File{path: abs}
	if err := f.open(); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUnavailable, f, err)
	}
	return f, nil
}

func (f *File) open() error {
	if err := checkDirectory(filepath.Dir(f.path)); err != nil {
		return err
	}
	state, err := readPrivate(f.path, fileSize)
	defer clear(state)
	switch {
	case errors.Is(err, ErrNotExist):
		return f.create()
	case err != nil:
		return err
	case len(state) != fileSize:
		return fmt.Errorf("%w: %d bytes, not %d: remove it, and the store with it", ErrTruncated, len(state), fileSize)
	}
	f.counter = binary.BigEndian.Uint64(state[SecretSize:])
	f.key, err = NewKey(state[:SecretSize])
	return err
}

func (f *File) create() error {
	secret := make([]byte, SecretSize)
	defer clear(secret)
	_, _ = rand.Read(secret)
	key, err := NewKey(secret)
	if err != nil {
		return err
	}
	f.key = key
	if err := f.write(0); err != nil {
		key.Free()
		return err
	}
	return nil
}

func (f *File) write(counter uint64) error {
	state := make([]byte, 0, fileSize)
	state = binary.BigEndian.AppendUint64(append(state, f.key.secret.Bytes()...), counter)
	defer clear(state)
	return writeFile(f.path, state)
}

// Close clears the secret. The sealer must not be used afterwards.
func (f *File) Close() { f.key.Free() }

// Seal is Sealer's.
func (f *File) Seal(dst, plaintext, aad []byte) ([]byte, error) {
	return f.key.Seal(dst, plaintext, aad)
}

// Open is Sealer's.
func (f *File) Open(dst, sealed, aad []byte) ([]byte, error) { return f.key.Open(dst, sealed, aad) }

// Counter is Sealer's.
func (f *File) Counter() (uint64, error) { return f.counter, nil }

// Advance is Sealer's.
func (f *File) Advance() (uint64, error) {
	if f.key.secret.Bytes() == nil {
		return 0, fmt.Errorf("%w: %s is closed", ErrUnavailable, f)
	}
	if err := f.write(f.counter + 1); err != nil {
		return 0, fmt.Errorf("%s: %w", f, err)
	}
	f.counter++
	return f.counter, nil
}

// String is Sealer's.
func (f *File) String() string {
	return "file " + f.path + " (DEVELOPMENT ONLY: it cannot refuse a store that was rolled back, and protects no key from who reads the disk)"
}
