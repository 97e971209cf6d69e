package hsm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// State says what a version may be used for.
type State uint8

// The states; there is no zero state.
const (
	// Enabled versions wrap and unwrap.
	Enabled State = iota + 1
	// Disabled versions do neither.
	Disabled
	// Destroyed versions have no key on the token any more.
	Destroyed
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
	}
	return "unknown"
}

func parseState(text string) (State, error) {
	for _, s := range []State{Enabled, Disabled, Destroyed} {
		if s.String() == text {
			return s, nil
		}
	}
	return 0, fmt.Errorf("no state %q", text)
}

// Version is one version of a key, as the catalogue on the token describes it.
// It does not change; another State makes another Version.
type Version struct {
	Key     string
	Number  uint32
	Suite   Suite
	State   State
	ID      ID
	Created time.Time

	style     IVStyle
	macID     ID     // of CBCHMAC
	canary    []byte // wrapped when the version was made
	canarySum [32]byte
	takes     int   // bytes of material that the token wraps itself
	seen      int64 // by the token's now; 0 for one that is being made, which is its maker's alone

	handles    atomic.Pointer[binding]
	illness    atomic.Pointer[illness]
	tried      atomic.Pointer[trial]
	explained  atomic.Pointer[explanation]
	explaining atomic.Bool  // somebody reads it
	opened     atomic.Int64 // when the last call that opened began, by the token's now
	wrapped    atomic.Int64 // the same of wraps
	mu         sync.Mutex   // of who begins a look
	look       atomic.Pointer[look]
	took       atomic.Int64 // how long a canary took the last time that it opened
	used       vectors
}

func (v *Version) header() header { return header{suite: v.Suite, id: v.ID, version: v.Number} }

// canaryAAD is what the canary is bound to: with the header it is all that must not
// change in the catalogue.
func (v *Version) canaryAAD() []byte { return canaryAAD(v.Key, v.macID) }

func canaryAAD(key string, macID ID) []byte {
	out := append([]byte("kms-agent canary 1"), macID[:]...)
	return append(binary.BigEndian.AppendUint64(out, uint64(len(key))), key...)
}

func (v *Version) mayWrap() error { return v.mayUnwrap() }

func (v *Version) mayUnwrap() error {
	if v.State != Enabled {
		return errorf(KeyUnusable, nil, "version %d of key %s is %s", v.Number, v.Key, v.State)
	}
	return nil
}

// Verify tells why a version is not what its record says, or cannot be used as far as its
// state lets it: its keys are gone from the token, or others; the one that new data keys
// are wrapped with may not wrap, or has made all its wraps on this host. The keys of a
// disabled version are looked for alone. An outage is of kind Unavailable, and says nothing
// of the version.
func (t *Token) Verify(ctx context.Context, v *Version) error {
	if v.State == Destroyed {
		return nil
	}
	ctx = as(ctx, verifier)
	var last error
	var a *attachment
	var d doubts
	for range attempts {
		var err error
		if a, err = t.attached(ctx); err != nil {
			return err
		}
		if err = t.verify(ctx, a, v); err == nil {
			return nil
		}
		var final bool
		if final, err = t.judge(ctx, a, v, err, false, &d); final {
			return err
		}
		last = err
	}
	if v.State != Enabled {
		return errorf(Unavailable, last, "tried %d times", attempts)
	}
	return t.inVain(ctx, a, v, t.keys.isCurrent(v), attempts, last)
}

func (t *Token) verify(ctx context.Context, a *attachment, v *Version) error {
	if v.State != Enabled {
		_, err := t.locate(ctx, a, v, v.find)
		return err
	}
	v.unbind(a) // what is known of the keys may be some seconds old
	if _, err := t.bind(ctx, a, v, false); err != nil || !t.keys.isCurrent(v) {
		return err
	}
	if t.cfg.Wraps != nil {
		if err := t.cfg.Wraps.mayTake(v); err != nil {
			return err
		}
	}
	_, err := t.bind(ctx, a, v, true)
	if errors.As(err, new(uncounted)) && KindOf(err) == Unavailable {
		return nil // the counts tell that themselves, and it is no fault of the version
	}
	return err
}
