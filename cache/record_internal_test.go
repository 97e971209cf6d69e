package cache

import (
	"bytes"
	"encoding/hex"
	"errors"
	"reflect"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/cache/seal"
)

// These are the layouts of version 1, and of 2, which records with a context have: stores
// that exist have them.
const (
	contextVector = "0200000001620000" + "00036b656b020000000131" + "0000000163" + "010000000000000009" + "02" + "000000000000000a000000000000000b" + "000000026e6f"
	keyVector     = "01000000066f726465727300000001620000000" + "36b656b010000000131" + "00000005616c696365" +
		"000000200102000000000000000000000000000000000000000000000000000000000000" + "01" + "00000003626f62" +
		"00000000000000050000000000000006" + "00000000000000070000000000000008" + "000000066f726967696e"
	standingVector = "0100000001620000" + "00036b656b020000000131" + "010000000000000009" + "02" + "000000000000000a000000000000000b" + "000000026e6f"
	noteVector     = "01fffffffffffffff4" + "0000000176"
	clockVector    = "0100000004626f6f74" + "000000000000000d000000000000000e000000000000000f" + "0000000000000001" +
		"00000001620000" + "00036b656b01" + "00000000000000100000000000000011"
)

var (
	keyExample = keyRecord{
		place: place{Slot{"orders", Authority{"b", "kek", "1", Encrypt, ""}, "alice"}, DecryptID{1, 2}}, spare: true, caller: "bob",
		created: 5, used: 6, uses: amount{7, 8}, origin: []byte("origin"),
	}
	standingExample = standingRecord{Authority{"b", "kek", "1", Decrypt, ""}, true, 9, revoked, 10, 11, "no"}
	contextExample  = standingRecord{Authority{"b", "kek", "1", Decrypt, "c"}, true, 9, revoked, 10, 11, "no"}
	noteExample     = Note{[]byte("v"), -12}
	clockExample    = clockRecord{"boot", 13, 14, 15, []outageRecord{{span{"b", "kek", Encrypt}, 16, 17}}}
)

func TestRecords(t *testing.T) {
	for name, c := range map[string]struct {
		got  []byte
		want string
	}{
		"data key": {keyExample.encode(), keyVector}, "standing": {standingExample.encode(), standingVector},
		"of a context": {contextExample.encode(), contextVector},
		"note":         {noteExample.encode(), noteVector}, "clock": {clockExample.encode(), clockVector},
	} {
		if got := hex.EncodeToString(c.got); got != c.want {
			t.Errorf("%s is\n%s, want\n%s", name, got, c.want)
		}
	}
	secret := bytes.Repeat([]byte{9}, DataKeySize)
	k, s, err := decodeKey(append(keyExample.encode(), secret...))
	if err != nil || !reflect.DeepEqual(k, keyExample) || !bytes.Equal(s, secret) {
		t.Errorf("data key: %+v, %x, %v", k, s, err)
	}
	for _, want := range []standingRecord{standingExample, contextExample} {
		if r, err := decodeStanding(want.encode()); err != nil || r != want {
			t.Errorf("standing: %+v, %v", r, err)
		}
	}
	bound := keyExample
	bound.place.Authority.Context = "c"
	if k, _, err := decodeKey(append(bound.encode(), secret...)); err != nil || !reflect.DeepEqual(k, bound) {
		t.Errorf("data key of a context: %+v, %v", k, err)
	}
	if n, err := decodeNote(noteExample.encode()); err != nil || !reflect.DeepEqual(n, noteExample) {
		t.Errorf("note: %+v, %v", n, err)
	}
	if c, err := decodeClock(clockExample.encode()); err != nil || !reflect.DeepEqual(c, clockExample) {
		t.Errorf("clock: %+v, %v", c, err)
	}
}

// decoders read a record of each kind and write it again.
var decoders = []func([]byte) ([]byte, error){
	func(b []byte) ([]byte, error) {
		k, s, err := decodeKey(b)
		return append(k.encode(), s...), err
	},
	func(b []byte) ([]byte, error) { r, err := decodeStanding(b); return r.encode(), err },
	func(b []byte) ([]byte, error) { n, err := decodeNote(b); return n.encode(), err },
	func(b []byte) ([]byte, error) { c, err := decodeClock(b); return c.encode(), err },
}

// TestBadRecords are refused, whatever is wrong.
func TestBadRecords(t *testing.T) {
	for i, good := range [][]byte{
		append(keyExample.encode(), make([]byte, DataKeySize)...), standingExample.encode(), noteExample.encode(), clockExample.encode(),
	} {
		for n := range good {
			if _, err := decoders[i](good[:n]); !errors.Is(err, seal.ErrDamaged) {
				t.Errorf("kind %d, %d of %d bytes: %v, want ErrDamaged", i, n, len(good), err)
			}
		}
		if _, err := decoders[i](append(bytes.Clone(good), 0)); !errors.Is(err, seal.ErrDamaged) {
			t.Errorf("kind %d with one byte more: %v, want ErrDamaged", i, err)
		}
		if _, err := decoders[i](append([]byte{3}, good[1:]...)); !errors.Is(err, seal.ErrNewer) {
			t.Errorf("kind %d of layout 3: %v, want ErrNewer", i, err)
		}
	}
	without := bytes.Replace(contextExample.encode(), []byte{0, 0, 0, 1, 'c'}, make([]byte, 4), 1)
	if _, err := decodeStanding(without); !errors.Is(err, seal.ErrDamaged) {
		t.Errorf("layout 2 without a context: %v, want ErrDamaged", err)
	}
	if _, err := (&disk{}).decode(nil); !errors.Is(err, seal.ErrDamaged) {
		t.Errorf("a store without a clock: %v, want ErrDamaged", err)
	}
}

func FuzzRecords(f *testing.F) {
	f.Add(append(keyExample.encode(), make([]byte, DataKeySize)...))
	f.Add(standingExample.encode())
	f.Add(contextExample.encode())
	f.Add(noteExample.encode())
	f.Add(clockExample.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		for i, decode := range decoders {
			again, err := decode(b)
			if err == nil && !bytes.Equal(again, b) && len(b) < maxRefusal {
				t.Errorf("kind %d: %x was read and is written as %x", i, b, again)
			}
		}
	})
}

// TestShift is what becomes of times.
func TestShift(t *testing.T) {
	const hour = int64(time.Hour)
	for name, c := range map[string]struct {
		saved clockRecord
		boot  string
		wall  int64
		age   time.Duration
		ok    bool
	}{
		"same boot":            {clockRecord{"a", 50, 100 * hour, 100 * hour, nil}, "a", 7, 50, true},
		"same boot, earlier":   {clockRecord{"a", 101, 100 * hour, 100 * hour, nil}, "a", 101 * hour, 0, false},
		"another boot":         {clockRecord{"a", 50, 100 * hour, 100 * hour, nil}, "b", 101 * hour, time.Hour, true},
		"clock behind":         {clockRecord{"a", 50, 100 * hour, 102 * hour, nil}, "b", 101 * hour, 0, false},
		"clock was set back":   {clockRecord{"a", 50, 100 * hour, 102 * hour, nil}, "b", 103 * hour, 3 * time.Hour, true},
		"no boot is known":     {clockRecord{"", 50, 100 * hour, 100 * hour, nil}, "", 101 * hour, 0, false},
		"not before, not here": {clockRecord{"", 50, 100 * hour, 100 * hour, nil}, "b", 101 * hour, time.Hour, true},
	} {
		d := &disk{StoreConfig: StoreConfig{Boot: c.boot, Wall: func() time.Time { return time.Unix(0, c.wall) }}}
		shift, age, ok := d.since(&c.saved, 100)
		if age != c.age || ok != c.ok || c.saved.now+shift != 100-c.age {
			t.Errorf("%s: shift %v, age %v, %v; want age %v, %v", name, shift, age, ok, c.age, c.ok)
		}
	}
}
