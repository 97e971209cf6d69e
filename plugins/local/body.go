package local

import (
	"encoding/binary"
	"fmt"
)

// The sealed body, integers big endian (docs/local-backend.md, "File format"):
//
//	keystore ID 16, generation 8, updated 8, number of keys 2, then by name
//	  name length 1, name, number of versions 2, then from version 1
//	    state 1, created 8, key ID 16, key 32 (absent when destroyed)
const (
	bodyFixed    = idSize + 8 + 8 + 2
	versionFixed = 1 + 8 + idSize

	// maxTime is the end of the year 9999.
	maxTime = 253402300799
)

func (r *ring) size() int {
	n := bodyFixed
	for _, k := range r.keys {
		n += 1 + len(k.name) + 2
		for _, v := range k.versions {
			n += versionFixed + len(v.material)
		}
	}
	return n
}

// marshal writes the ring into protected memory, which the caller frees.
func (r *ring) marshal() (*region, error) {
	size := r.size()
	if size > maxBody {
		return nil, fmt.Errorf("%w: the keystore would be larger than %d bytes: use a second keystore", ErrLimit, maxBody)
	}
	m, err := newRegion(size)
	if err != nil {
		return nil, err
	}
	b := m.data[:0]
	b = append(b, r.id[:]...)
	b = binary.BigEndian.AppendUint64(b, r.generation)
	b = binary.BigEndian.AppendUint64(b, uint64(r.updated))
	b = binary.BigEndian.AppendUint16(b, uint16(len(r.keys)))
	for _, k := range r.keys {
		b = append(b, byte(len(k.name)))
		b = append(b, k.name...)
		b = binary.BigEndian.AppendUint16(b, uint16(len(k.versions)))
		for _, v := range k.versions {
			b = append(b, byte(v.state))
			b = binary.BigEndian.AppendUint64(b, uint64(v.created))
			b = append(b, v.id[:]...)
			b = append(b, v.material...)
		}
	}
	return m, nil
}

// parseBody reads a whole body. The ring's keys alias body: whoever owns that
// memory gives it to the ring. Errors wrap ErrDamaged.
func parseBody(body []byte) (*ring, error) {
	in := &cursor{rest: body}
	r := &ring{}
	in.copy(r.id[:])
	r.generation = in.uint64()
	r.updated = in.time()
	n := int(in.uint16())
	if n > MaxKeys {
		in.fail("%d keys", n)
	}
	if r.generation == 0 {
		in.fail("generation 0")
	}
	ids := map[[idSize]byte]bool{}
	for i := 0; i < n && in.err == nil; i++ {
		k := in.key(ids)
		if i > 0 && k.name <= r.keys[i-1].name {
			in.fail("key %q out of order", k.name)
		}
		r.keys = append(r.keys, k)
	}
	if in.err == nil && len(in.rest) > 0 {
		in.fail("%d bytes after the last key", len(in.rest))
	}
	if in.err != nil {
		return nil, in.err
	}
	return r, nil
}

// cursor reads a body from the front. After the first fault it yields zeros.
type cursor struct {
	rest []byte
	err  error
}

func (c *cursor) fail(format string, a ...any) {
	if c.err == nil {
		c.err = fmt.Errorf("%w: "+format, append([]any{ErrDamaged}, a...)...)
	}
}

// take returns the next n bytes, aliasing the body, or nil.
func (c *cursor) take(n int) []byte {
	if c.err == nil && n > len(c.rest) {
		c.fail("a field of %d bytes, %d left", n, len(c.rest))
	}
	if c.err != nil {
		return nil
	}
	b := c.rest[:n:n]
	c.rest = c.rest[n:]
	return b
}

func (c *cursor) copy(to []byte) { copy(to, c.take(len(to))) }

func (c *cursor) byte() byte {
	var b [1]byte
	c.copy(b[:])
	return b[0]
}

func (c *cursor) uint16() uint16 {
	var b [2]byte
	c.copy(b[:])
	return binary.BigEndian.Uint16(b[:])
}

func (c *cursor) uint64() uint64 {
	var b [8]byte
	c.copy(b[:])
	return binary.BigEndian.Uint64(b[:])
}

func (c *cursor) time() int64 {
	t := c.uint64()
	if t > maxTime {
		c.fail("a time after the year 9999")
		return 0
	}
	return int64(t)
}

func (c *cursor) key(ids map[[idSize]byte]bool) key {
	k := key{name: string(c.take(int(c.byte())))}
	if c.err == nil && !validName(k.name) {
		c.fail("key name %q", k.name)
	}
	n := int(c.uint16())
	if c.err == nil && (n < 1 || n > MaxVersions) {
		c.fail("key %q with %d versions", k.name, n)
	}
	for i := 0; i < n && c.err == nil; i++ {
		v := c.version()
		if ids[v.id] {
			c.fail("key %q: key ID used twice", k.name)
		}
		ids[v.id] = true
		k.versions = append(k.versions, v)
	}
	return k
}

func (c *cursor) version() version {
	v := version{state: State(c.byte()), created: c.time()}
	c.copy(v.id[:])
	switch v.state {
	case Enabled, Disabled:
		v.material = c.take(keySize)
	case Destroyed:
	default:
		c.fail("key version in unknown state %d", v.state)
	}
	return v
}
