package local

import "errors"

// The faults of a keystore, for errors.Is. The errors that carry them name the
// file, the key and the cure; none of them ever holds key material.
var (
	ErrNotExist       = errors.New("does not exist")
	ErrExists         = errors.New("exists already")
	ErrAccess         = errors.New("cannot be read")
	ErrInsecure       = errors.New("is not private")
	ErrForeign        = errors.New("is another kind of file")
	ErrNewer          = errors.New("has a newer format")
	ErrTruncated      = errors.New("is truncated")
	ErrDamaged        = errors.New("is damaged")
	ErrWrongSeal      = errors.New("is sealed by another secret")
	ErrSeal           = errors.New("the seal cannot be used")
	ErrWrite          = errors.New("cannot be written")
	ErrBusy           = errors.New("is being changed by another process")
	ErrRolledBack     = errors.New("is not a successor of the keystore in use")
	ErrLimit          = errors.New("limit reached")
	ErrMemory         = errors.New("no protected memory")
	ErrName           = errors.New("invalid name")
	ErrUnknownKey     = errors.New("no such key")
	ErrUnknownVersion = errors.New("no such key version")
	ErrKeyState       = errors.New("the key version's state does not allow it")
	ErrConflict       = errors.New("backup and keystore hold different keys under one name")
	ErrClosed         = errors.New("keystore is closed")
)
