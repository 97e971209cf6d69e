package local

import (
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// Keystore administers one keystore file. Each method reads the file anew and
// changes it, if at all, as a whole: under a lock against other processes,
// atomically and durably. Methods may be called concurrently.
type Keystore struct {
	path     string
	unlocker *unlocker
}

// Info describes a keystore. It holds no secrets.
type Info struct {
	Path       string
	ID         string // 32 hex digits, random; a restored keystore keeps it
	Generation uint64 // grows with every change
	Updated    time.Time
	Seal       string // what seals it, such as "key file /etc/kms-agent/seal.key"
	Keys       int
}

// KeyInfo describes one key. It holds no secrets.
type KeyInfo struct {
	Name     string
	URI      string // of the wrapping key, "local:" and the name
	Current  string // the newest version, whatever its state
	Versions []VersionInfo
}

// VersionInfo describes one version of a key.
type VersionInfo struct {
	Version string // decimal, from "1"
	State   State
	Created time.Time // to the second, UTC
	KeyID   string    // 32 hex digits, random; part of everything wrapped under it
}

// Create makes an empty keystore at path, sealed by seal. It never replaces a
// file: then the error wraps ErrExists.
func Create(path string, seal Seal) (*Keystore, error) {
	k, err := newKeystore(path, seal)
	if err != nil {
		return nil, err
	}
	r := newRing()
	defer r.free()
	if err := k.establish(r); err != nil {
		k.Close()
		return nil, err
	}
	return k, nil
}

// Open opens the keystore at path and checks that seal opens it.
func Open(path string, seal Seal) (*Keystore, error) {
	k, err := newKeystore(path, seal)
	if err != nil {
		return nil, err
	}
	if err := k.view(func(*ring) error { return nil }); err != nil {
		k.Close()
		return nil, err
	}
	return k, nil
}

func newKeystore(path string, seal Seal) (*Keystore, error) {
	abs, err := filepath.Abs(path)
	if err != nil || path == "" {
		return nil, fmt.Errorf("keystore path %q: %w: give the path of a file", path, ErrName)
	}
	if err := seal.Validate(); err != nil {
		return nil, fmt.Errorf("keystore %s: %w", abs, err)
	}
	return &Keystore{path: abs, unlocker: &unlocker{seal: seal}}, nil
}

// Close forgets the seal's secret. The keystore may be used again; its secret
// is then read again.
func (k *Keystore) Close() { k.unlocker.close() }

// Path returns the absolute path of the keystore file.
func (k *Keystore) Path() string { return k.path }

// establish writes r as a new keystore file.
func (k *Keystore) establish(r *ring) error {
	r.generation++
	r.updated = time.Now().Unix()
	file, err := k.unlocker.sealRing(r, k.unlocker.newHeader(keystoreFile))
	if err == nil {
		err = checkDirectory(k.path)
	}
	if err == nil {
		err = writeNew(k.path, file)
	}
	return k.named(err)
}

// named says which keystore an error is about.
func (k *Keystore) named(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("keystore %s: %w", k.path, err)
}

// load reads the file. The ring is the caller's to free.
func (k *Keystore) load() (*ring, *header, error) {
	if err := checkDirectory(k.path); err != nil {
		return nil, nil, err
	}
	if info, err := os.Lstat(k.path); err == nil && info.Mode().Type() == fs.ModeSymlink {
		return nil, nil, fmt.Errorf("%w: it is a symbolic link: name the file itself", ErrAccess)
	}
	file, err := readPrivate(k.path, MaxFileSize, ownerOnly)
	if err != nil {
		return nil, nil, err
	}
	return k.unlocker.open(file, keystoreFile)
}

// view calls show with the newest content.
func (k *Keystore) view(show func(*ring) error) error {
	r, _, err := k.load()
	if err != nil {
		return k.named(err)
	}
	defer r.free()
	return k.named(show(r))
}

// edit applies change to the newest content and writes the result; change
// reports whether there is anything to write.
func (k *Keystore) edit(change func(*ring) (bool, error)) error {
	return k.named(withLock(k.path, func() error {
		r, h, err := k.load()
		if err != nil {
			return err
		}
		defer r.free()
		if changed, err := change(r); err != nil || !changed {
			return err
		}
		return k.replace(r, k.unlocker, h)
	}))
}

// replace writes r, changed, over the keystore. The caller holds the lock.
func (k *Keystore) replace(r *ring, u *unlocker, like *header) error {
	r.generation++
	r.updated = max(r.updated, time.Now().Unix())
	file, err := u.sealRing(r, like)
	if err != nil {
		return err
	}
	return writeFile(k.path, file)
}

// CreateKey adds a key with an enabled version "1". A name that is taken is an
// error that wraps ErrExists, whatever the state of its versions.
func (k *Keystore) CreateKey(name string) error {
	return k.edit(func(r *ring) (bool, error) { return true, r.create(name) })
}

// Rotate adds a version to a key, makes it the current one and returns its
// number. Older versions stay as they are.
func (k *Keystore) Rotate(name string) (string, error) {
	var version string
	err := k.edit(func(r *ring) (bool, error) {
		var err error
		version, err = r.rotate(name)
		return true, err
	})
	if err != nil {
		return "", err
	}
	return version, nil
}

// Disable makes a version refuse to wrap and unwrap until it is enabled again.
// A disabled version is left alone.
func (k *Keystore) Disable(name, version string) error {
	return k.edit(func(r *ring) (bool, error) { return r.setState(name, version, Disabled) })
}

// Enable undoes Disable. An enabled version is left alone; a destroyed one
// stays destroyed and is an error that wraps ErrKeyState.
func (k *Keystore) Enable(name, version string) error {
	return k.edit(func(r *ring) (bool, error) { return r.setState(name, version, Enabled) })
}

// Destroy erases a disabled version's key for good; what it wrapped is lost,
// except through a backup made before. Any other state is an error that wraps
// ErrKeyState. The record and the number of the version stay.
func (k *Keystore) Destroy(name, version string) error {
	return k.edit(func(r *ring) (bool, error) { return true, r.destroy(name, version) })
}

// Reseal puts the keystore under another seal and returns it opened by that;
// the receiver opens it no more. Copies and backups made before stay under the
// old seal.
func (k *Keystore) Reseal(seal Seal) (*Keystore, error) {
	to, err := newKeystore(k.path, seal)
	if err != nil {
		return nil, err
	}
	err = withLock(k.path, func() error {
		r, _, err := k.load()
		if err != nil {
			return err
		}
		defer r.free()
		return k.replace(r, to.unlocker, to.unlocker.newHeader(keystoreFile))
	})
	if err != nil {
		to.Close()
		return nil, k.named(err)
	}
	return to, nil
}

// Info describes the keystore as it is now.
func (k *Keystore) Info() (Info, error) {
	info := Info{Path: k.path, Seal: k.unlocker.seal.String()}
	err := k.view(func(r *ring) error {
		info.ID, info.Generation, info.Keys = hex.EncodeToString(r.id[:]), r.generation, len(r.keys)
		info.Updated = time.Unix(r.updated, 0).UTC()
		return nil
	})
	if err != nil {
		return Info{}, err
	}
	return info, nil
}

// List describes every key, sorted by name.
func (k *Keystore) List() ([]KeyInfo, error) {
	var list []KeyInfo
	err := k.view(func(r *ring) error {
		for i := range r.keys {
			list = append(list, r.keys[i].info())
		}
		return nil
	})
	return list, err
}

// Key describes one key. An unknown one is an error that wraps ErrUnknownKey.
func (k *Keystore) Key(name string) (KeyInfo, error) {
	var info KeyInfo
	err := k.view(func(r *ring) error {
		found, err := r.key(name)
		if err == nil {
			info = found.info()
		}
		return err
	})
	return info, err
}

func (k *key) info() KeyInfo {
	info := KeyInfo{Name: k.name, URI: Scheme + k.name, Current: strconv.Itoa(len(k.versions))}
	for i, v := range k.versions {
		info.Versions = append(info.Versions, VersionInfo{
			Version: strconv.Itoa(i + 1), State: v.state,
			Created: time.Unix(v.created, 0).UTC(), KeyID: hex.EncodeToString(v.id[:]),
		})
	}
	return info
}
