// Package seal keeps data keys on disk, readable on this host alone and only in
// their newest state.
//
// A Sealer holds a secret and a counter outside of the disk: in the kernel
// (package keyring) or in a TPM (package tpm). A Store is a file sealed by one.
package seal

import "errors"

// Sealer encrypts for one host and counts what it was told to count. It has no
// more methods than a Store needs: two for the content, two against rollback.
// Methods are called by one goroutine at a time.
type Sealer interface {
	// Seal appends to dst plaintext, encrypted and authenticated together with
	// aad, which is not part of the result, and returns the longer slice. The
	// result is at most Overhead bytes longer than plaintext.
	Seal(dst, plaintext, aad []byte) ([]byte, error)
	// Open appends to dst what Seal was given and returns the longer slice. With
	// room for it in dst it allocates none, so that secrets stay in the caller's
	// memory. What another secret has sealed wraps ErrForeign, what was changed
	// since ErrDamaged.
	Open(dst, sealed, aad []byte) ([]byte, error)
	// Counter returns a number that never falls, as long as what Seal made can
	// still be opened.
	Counter() (uint64, error)
	// Advance adds one to the counter, durably before it returns, and returns
	// the new value. After an error the counter may have moved or not.
	Advance() (uint64, error)
	// String says what seals, for people, and what it cannot do. It holds no
	// secret.
	String() string
}

// Overhead is how many bytes Seal adds at most.
const Overhead = 2048

// The faults of a sealed store, for errors.Is. The errors that carry them name
// the file and the cure; none of them ever holds key material. Each of them but
// ErrWrite, ErrBusy, ErrTooLarge and ErrMemory means a start without the store.
var (
	ErrNotExist    = errors.New("does not exist")
	ErrAccess      = errors.New("cannot be read")
	ErrInsecure    = errors.New("is not private")
	ErrNotStore    = errors.New("is another kind of file")
	ErrNewer       = errors.New("has a newer format")
	ErrTruncated   = errors.New("is truncated")
	ErrDamaged     = errors.New("is damaged")
	ErrForeign     = errors.New("is sealed by another secret")
	ErrRolledBack  = errors.New("is not the newest state")
	ErrUnavailable = errors.New("the sealer cannot be used")
	ErrWrite       = errors.New("cannot be written")
	ErrBusy        = errors.New("is in use by another process")
	ErrTooLarge    = errors.New("is too large")
	ErrMemory      = errors.New("no protected memory")
)
