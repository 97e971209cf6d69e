package local

import (
	"crypto/rand"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// MaxKeys bounds the keys of one keystore.
	MaxKeys = 4096
	// MaxVersions bounds the versions of one key, destroyed ones included.
	MaxVersions = 1000

	keySize = 32 // AES-256
	idSize  = 16
)

// State is the state of one key version. Values are those of the file format.
type State uint8

// States of a key version, with the terms of NIST SP 800-57 part 1 section 7.
const (
	Enabled   State = 1 // active: wraps and unwraps
	Disabled  State = 2 // suspended: refuses both, can be enabled again
	Destroyed State = 3 // destroyed: the key is erased, its record stays
)

// String returns "enabled", "disabled" or "destroyed".
func (s State) String() string {
	switch s {
	case Enabled:
		return "enabled"
	case Disabled:
		return "disabled"
	case Destroyed:
		return "destroyed"
	default:
		return "state " + strconv.Itoa(int(s))
	}
}

// ring is the content of a keystore. Key material lies in its regions, so a
// ring must be freed, and nothing taken out of it survives that.
type ring struct {
	id         [idSize]byte
	generation uint64
	updated    int64 // Unix seconds
	keys       []key // sorted by name
	regions    []*region
}

type key struct {
	name     string
	versions []version // version n is versions[n-1]
}

type version struct {
	state    State
	created  int64 // Unix seconds
	id       [idSize]byte
	material []byte // keySize bytes; nil once destroyed
}

func newRing() *ring {
	r := &ring{}
	_, _ = rand.Read(r.id[:])
	return r
}

func (r *ring) free() {
	if r == nil {
		return
	}
	for _, m := range r.regions {
		m.free()
	}
	*r = ring{}
}

func (r *ring) find(name string) (int, bool) {
	return slices.BinarySearchFunc(r.keys, name, func(k key, name string) int { return strings.Compare(k.name, name) })
}

// key returns the key called name, for reading or changing in place.
func (r *ring) key(name string) (*key, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	i, ok := r.find(name)
	if !ok {
		return nil, fmt.Errorf("%w: %q: list the keys of the keystore, or create it", ErrUnknownKey, name)
	}
	return &r.keys[i], nil
}

func (r *ring) version(name, number string) (*version, error) {
	k, err := r.key(name)
	if err != nil {
		return nil, err
	}
	n, ok := parseVersion(number)
	if !ok || n > len(k.versions) {
		return nil, fmt.Errorf("%w: key %q version %.20q: its versions are 1 to %d", ErrUnknownVersion, name, number, len(k.versions))
	}
	return &k.versions[n-1], nil
}

// create adds a key with version 1.
func (r *ring) create(name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	i, found := r.find(name)
	if found {
		return fmt.Errorf("key %q %w: rotate it for a new version", name, ErrExists)
	}
	if len(r.keys) >= MaxKeys {
		return fmt.Errorf("%w: a keystore holds %d keys: use a second keystore", ErrLimit, MaxKeys)
	}
	v, err := r.newVersion()
	if err != nil {
		return err
	}
	r.keys = slices.Insert(r.keys, i, key{name: name, versions: []version{v}})
	return nil
}

// rotate adds a version, which becomes the current one, and returns its number.
func (r *ring) rotate(name string) (string, error) {
	k, err := r.key(name)
	if err != nil {
		return "", err
	}
	if len(k.versions) >= MaxVersions {
		return "", fmt.Errorf("%w: key %q has %d versions: create a new key and re-encrypt to it", ErrLimit, name, MaxVersions)
	}
	v, err := r.newVersion()
	if err != nil {
		return "", err
	}
	k.versions = append(k.versions, v)
	return strconv.Itoa(len(k.versions)), nil
}

func (r *ring) newVersion() (version, error) {
	m, err := newRegion(keySize)
	if err != nil {
		return version{}, err
	}
	r.regions = append(r.regions, m)
	v := version{state: Enabled, created: time.Now().Unix(), material: m.data}
	_, _ = rand.Read(v.material)
	_, _ = rand.Read(v.id[:])
	return v, nil
}

// setState moves a version between enabled and disabled; changed is false
// where it is there already.
func (r *ring) setState(name, number string, to State) (changed bool, err error) {
	v, err := r.version(name, number)
	if err != nil {
		return false, err
	}
	if v.state == Destroyed {
		return false, fmt.Errorf("%w: key %q version %s is destroyed for good: restore a backup made before that to another path if its data is needed",
			ErrKeyState, name, number)
	}
	changed = v.state != to
	v.state = to
	return changed, nil
}

// destroy erases a disabled version's key.
func (r *ring) destroy(name, number string) error {
	v, err := r.version(name, number)
	if err != nil {
		return err
	}
	switch v.state {
	case Disabled:
	case Destroyed:
		return fmt.Errorf("%w: key %q version %s is destroyed already", ErrKeyState, name, number)
	default:
		return fmt.Errorf("%w: key %q version %s is %s: disable it first, and destroy it when nothing has missed it",
			ErrKeyState, name, number, v.state)
	}
	clear(v.material)
	v.state, v.material = Destroyed, nil
	return nil
}
