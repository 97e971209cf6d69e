package cache

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/kms-agent/kms-agent/cache/seal"
)

// The values of a store's records. Numbers are big endian, texts and bytes have their
// length in four bytes before them, a truth is one byte, 0 or 1. Each value begins with
// its layout's version. A data key's secret is at the end of its record.
const (
	recordVersion = 1
	// contextVersion is that of records whose authority has a context.
	contextVersion = 2
	maxOrigin      = 32 << 10
)

type encoder struct{ out []byte }

func newEncoder() *encoder { return &encoder{out: []byte{recordVersion}} }

func (e *encoder) bytes(b []byte) {
	e.out = append(binary.BigEndian.AppendUint32(e.out, uint32(len(b))), b...)
}
func (e *encoder) text(s string)        { e.bytes([]byte(s)) }
func (e *encoder) number(n uint64)      { e.out = binary.BigEndian.AppendUint64(e.out, n) }
func (e *encoder) time(d time.Duration) { e.number(uint64(d)) }
func (e *encoder) octet(b byte)         { e.out = append(e.out, b) }
func (e *encoder) truth(b bool)         { e.octet(map[bool]byte{true: 1}[b]) }
func (e *encoder) authority(a *Authority) {
	e.span(a.span())
	e.text(a.Version)
	if a.Context != "" {
		e.out[0] = contextVersion
		e.text(a.Context)
	}
}
func (e *encoder) span(s span) {
	e.text(s.backend)
	e.text(s.wrappingKey)
	e.octet(byte(s.direction))
}

// decoder reads what encoder wrote; the first fault makes everything zero.
type decoder struct {
	version byte
	rest    []byte
	err     error
}

// newDecoder reads records up to the layout latest.
func newDecoder(value []byte, latest byte) *decoder {
	d := &decoder{rest: value}
	if d.version = d.octet(); d.err == nil && (d.version < recordVersion || d.version > latest) {
		d.err = fmt.Errorf("%w: a record has layout %d, this program knows %d", seal.ErrNewer, d.version, latest)
	}
	return d
}

func (d *decoder) take(n int) []byte {
	if d.err == nil && n > len(d.rest) {
		d.err = fmt.Errorf("%w: a record ends early", seal.ErrDamaged)
	}
	if d.err != nil {
		return nil
	}
	b := d.rest[:n:n]
	d.rest = d.rest[n:]
	return b
}

// bytes copies.
func (d *decoder) bytes() []byte {
	length := d.take(4)
	if d.err != nil {
		return nil
	}
	return append([]byte(nil), d.take(int(binary.BigEndian.Uint32(length)))...)
}

func (d *decoder) text() string { return string(d.bytes()) }

func (d *decoder) number() uint64 {
	const size = 8
	if b := d.take(size); d.err == nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (d *decoder) time() time.Duration { return time.Duration(d.number()) }

func (d *decoder) octet() byte {
	if b := d.take(1); d.err == nil {
		return b[0]
	}
	return 0
}

// oneOf reads a byte that is at least least and at most most.
func (d *decoder) oneOf(least, most byte) byte {
	b := d.octet()
	if d.err == nil && (b < least || b > most) {
		d.err = fmt.Errorf("%w: a record has the byte %d where %d to %d may be", seal.ErrDamaged, b, least, most)
	}
	return b
}

func (d *decoder) truth() bool { return d.oneOf(0, 1) == 1 }

func (d *decoder) span() span {
	return span{d.text(), d.text(), Direction(d.oneOf(byte(Encrypt), byte(Decrypt)))}
}

func (d *decoder) authority() Authority {
	s := d.span()
	a := Authority{Backend: s.backend, WrappingKey: s.wrappingKey, Direction: s.direction, Version: d.text()}
	if d.version < contextVersion {
		return a
	}
	if a.Context = d.text(); d.err == nil && a.Context == "" {
		d.err = fmt.Errorf("%w: a record of layout %d has no context", seal.ErrDamaged, d.version)
	}
	return a
}

// end returns the first fault; what is left over is one.
func (d *decoder) end() error {
	if d.err == nil && len(d.rest) > 0 {
		d.err = fmt.Errorf("%w: %d bytes follow a record", seal.ErrDamaged, len(d.rest))
	}
	return d.err
}

func (k *keyRecord) encode() []byte {
	e := newEncoder()
	e.text(k.place.Key)
	e.authority(&k.place.Authority)
	e.text(k.place.Partition)
	e.bytes(k.place.id[:])
	e.truth(k.spare)
	e.text(k.caller)
	e.time(k.created)
	e.time(k.used)
	e.number(k.uses.messages)
	e.number(k.uses.bytes)
	e.bytes(k.origin)
	return e.out
}

// decodeKey returns the secret as a part of value.
func decodeKey(value []byte) (k keyRecord, secret []byte, err error) {
	d := newDecoder(value, contextVersion)
	k.place.Key, k.place.Authority, k.place.Partition = d.text(), d.authority(), d.text()
	if id := d.bytes(); copy(k.place.id[:], id) != len(id) || d.err == nil && len(id) != len(k.place.id) {
		d.err = fmt.Errorf("%w: an identifier of %d bytes", seal.ErrDamaged, len(id))
	}
	k.spare, k.caller, k.created, k.used = d.truth(), d.text(), d.time(), d.time()
	k.uses = amount{d.number(), d.number()}
	k.origin = d.bytes()
	secret = d.take(DataKeySize)
	return k, secret, d.end()
}

func (r *standingRecord) encode() []byte {
	e := newEncoder()
	e.authority(&r.Authority)
	e.truth(r.known)
	e.time(r.confirmed)
	e.octet(byte(r.standing))
	e.time(r.suspendedAt)
	e.time(r.refusedAt)
	e.text(r.refusal[:min(len(r.refusal), maxRefusal)])
	return e.out
}

// maxRefusal bounds what is stored of upstream's words, in bytes.
const maxRefusal = 1024

func decodeStanding(value []byte) (standingRecord, error) {
	d := newDecoder(value, contextVersion)
	r := standingRecord{
		Authority: d.authority(), known: d.truth(), confirmed: d.time(), standing: standing(d.oneOf(0, byte(revoked))),
		suspendedAt: d.time(), refusedAt: d.time(), refusal: d.text(),
	}
	return r, d.end()
}

func (n *Note) encode() []byte {
	e := newEncoder()
	e.time(n.At)
	e.bytes(n.Value)
	return e.out
}

func decodeNote(value []byte) (Note, error) {
	d := newDecoder(value, recordVersion)
	n := Note{At: d.time(), Value: d.bytes()}
	return n, d.end()
}

func (c *clockRecord) encode() []byte {
	e := newEncoder()
	e.text(c.boot)
	e.time(c.now)
	e.number(uint64(c.wall))
	e.number(uint64(c.highWater))
	e.number(uint64(len(c.outages)))
	for _, o := range c.outages {
		e.span(o.span)
		e.time(o.since)
		e.time(o.failed)
	}
	return e.out
}

func decodeClock(value []byte) (clockRecord, error) {
	d := newDecoder(value, recordVersion)
	c := clockRecord{boot: d.text(), now: d.time(), wall: int64(d.number()), highWater: int64(d.number())}
	for n := d.number(); n > 0 && d.err == nil; n-- {
		c.outages = append(c.outages, outageRecord{d.span(), d.time(), d.time()})
	}
	return c, d.end()
}
