// Package cache keeps data keys in protected memory for as long as their limits
// and the upstream's word allow.
//
// What ages is a confirmation: upstream said yes for an Authority, that is for
// one version of a wrapping key in one direction. One confirmation renews every
// data key that it covers.
package cache

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// DataKeySize is the size of every data key, in bytes.
const DataKeySize = 32

// Direction says what a confirmation is for.
type Direction uint8

// The directions: Encrypt is confirmed by a wrap, Decrypt by an unwrap.
const (
	Encrypt Direction = iota + 1
	Decrypt
)

// String returns "encrypt" or "decrypt".
func (d Direction) String() string {
	if d == Encrypt {
		return "encrypt"
	}
	return "decrypt"
}

// Authority is what upstream says yes or no to.
type Authority struct {
	Backend, WrappingKey, Version string
	Direction                     Direction
	// Context stands for the encryption context where upstream's own policy sees it: a no
	// to one says nothing of the others. "" is for whatever it does not see.
	Context string
}

// Verdict is what an answer from upstream means for the Authority behind it.
type Verdict uint8

// The verdicts.
const (
	// Yes confirms.
	Yes Verdict = iota + 1
	// Unreachable is no answer about the key: an outage.
	Unreachable
	// No is definite. It suspends, and is made sure of.
	No
	// Other concerns one request only.
	Other
)

// MaxMessages is how many messages one data key encrypts at most, whatever its
// Limits say.
const MaxMessages = 1 << 32

// Limits bound the use of one data key.
type Limits struct {
	// MaxAge is how old a confirmation may be. Zero: every use waits for a
	// confirmation of its own.
	MaxAge time.Duration
	// MaxLifetime is the age at which a data key is retired for encryption;
	// zero is no limit.
	MaxLifetime time.Duration
	// MaxIdle is how long a data key may stay unused; zero is no limit.
	MaxIdle time.Duration
	// MaxMessages and MaxBytes bound what one data key encrypts. They are hard:
	// counted before use. Zero is MaxMessages messages, and no limit of bytes.
	MaxMessages, MaxBytes uint64
	// Grace is how long, from the first failed call of an outage, the data key may
	// be used though its confirmation is older than MaxAge; zero is not at all.
	// MaxIdle does not count meanwhile.
	Grace time.Duration
	// Spares is how many data keys are kept ready for the time when the current one
	// is used up, or was dropped, and upstream cannot be asked for another. A spare
	// that is not used for MaxLifetime is replaced when there is another; its own
	// MaxLifetime begins when it is taken.
	Spares int
	// Store keeps the data key in Config.Store too, where there is one.
	Store bool
}

// Material is a data key on its way into the cache.
type Material struct {
	// DataKey is DataKeySize bytes; the cache clears it.
	DataKey []byte
	// Origin is what the caller needs to know of the data key again. It is
	// never changed and holds no secret.
	Origin any
	// Unconfirmed: that upstream gave it is no confirmation of its Authority, since others
	// have a say too. Config.Confirm asks them, unless one has been heard lately.
	Unconfirmed bool
}

// Slot names the one current data key that a partition encrypts with.
type Slot struct {
	// Key is the logical key, for EvictKey.
	Key       string
	Authority Authority
	// Partition says who shares the data key.
	Partition string
}

// DecryptID names a data key that was made by somebody else: a hash over all
// that its unwrapping depends on.
type DecryptID [32]byte

// Fill asks upstream for a data key: a new one that was wrapped, or the one
// behind an encrypted data key.
type Fill func(ctx context.Context) (Material, error)

// EncryptRequest asks for a data key to encrypt one message with.
type EncryptRequest struct {
	// Caller is whose share is used.
	Caller string
	Slot   Slot
	Limits Limits
	// Bytes is the size of the message's plaintext.
	Bytes uint64
	// Reserve says that Bytes is the most that it can be, and that GiveBack will
	// be called once it is known how much it was.
	Reserve bool
	// MaxStale bounds the age of the confirmation at Arrived, beside MaxAge; nil
	// is no bound, zero is a confirmation whose call began after Arrived.
	MaxStale *time.Duration
	// Arrived is when the request did, by Config.Now; zero: now.
	Arrived time.Duration
	Fill    Fill
}

// DecryptRequest asks for the data key behind an encrypted data key. Its fields
// are those of EncryptRequest.
type DecryptRequest struct {
	Caller string
	// Hold keeps the data key from giving way to others, for as long as it is asked
	// for again within MaxIdle. Its caller must be "", which is the agent itself.
	Hold      bool
	Key       string
	ID        DecryptID
	Authority Authority
	Limits    Limits
	MaxStale  *time.Duration
	Arrived   time.Duration
	Fill      Fill
}

// Errors of this package. What Fill and Confirm return is wrapped, not replaced.
var (
	// ErrSuspended: upstream said no, and a later yes has not been heard.
	ErrSuspended = errors.New("the key is suspended: its backend refused it")
	// ErrRevoked: upstream said no, and said it again when it was asked with the
	// agent's own means. A later yes is needed.
	ErrRevoked = errors.New("the key is revoked: its backend refuses it")
	// ErrOverShare: the caller has too many misses waiting.
	ErrOverShare = errors.New("too many cache misses in flight")
	// ErrUnfit: a stored data key has no place any more.
	ErrUnfit = errors.New("the data key does not fit what is configured")
	// ErrTooLarge: one message is larger than a data key may encrypt.
	ErrTooLarge = errors.New("the message is larger than the key's max_bytes")
	// ErrMemory: protected memory is used up by data keys in use.
	ErrMemory = errors.New("no protected memory left for another data key")
	// ErrClosed: the cache is closed.
	ErrClosed   = errors.New("the cache is closed")
	errUnwanted = errors.New("the data key is not wanted any more")
)

// Config is what a Cache needs.
type Config struct {
	// Now is a clock that does not stop while the host sleeps: CLOCK_BOOTTIME.
	Now func() time.Duration
	// MaxEntries bounds the data keys of both directions together.
	MaxEntries int
	// MaxEntriesPerCaller bounds those of one caller; 0 is MaxEntries. In a
	// full cache whoever has the most gives way first, whatever the bound.
	MaxEntriesPerCaller int
	// MaxMisses and MaxMissesPerCaller bound the fills in flight; 0 is 1024 and
	// a quarter of MaxMisses. Nobody may have more than are left for the others.
	MaxMisses, MaxMissesPerCaller int
	// Classify tells what an error of Fill or Confirm means. It is called with
	// errors only.
	Classify func(error) Verdict
	// Confirm asks upstream again, with means of the agent's own. sample is the
	// Origin of a data key that the answer covers, cached now or before; nil
	// where there was none yet.
	Confirm func(ctx context.Context, a Authority, sample any) error
	// ConfirmTimeout bounds one Confirm or Fill; 0 is 10 s. Until then a call
	// goes on, even when nobody waits for it any more: its answer is worth having.
	ConfirmTimeout time.Duration
	// Patience is how long a request waits for a confirmation that does not come,
	// where it can be served in grace: upstream is taken to be out of reach then,
	// until the answer comes. 0 is 1 s.
	Patience time.Duration
	// Rand gives numbers in [0, 1) for jitter; nil is math/rand/v2.
	Rand func() float64
	// OnOutage is told by Run when an outage has begun, and when it is over. It
	// may be nil.
	OnOutage func(Outage)
	// Store is where data keys outlive the process; nil: nowhere. What was saved comes
	// back with Restore, and nothing is saved before.
	Store *StoreConfig
}

func (c *Config) setDefaults() error {
	if c.Now == nil || c.Classify == nil || c.Confirm == nil {
		return errors.New("cache: Now, Classify and Confirm are required")
	}
	if c.MaxEntries < 1 {
		return fmt.Errorf("cache: max_entries is %d; it must be 1 at least", c.MaxEntries)
	}
	if c.MaxEntriesPerCaller <= 0 || c.MaxEntriesPerCaller > c.MaxEntries {
		c.MaxEntriesPerCaller = c.MaxEntries
	}
	if c.MaxMisses <= 0 {
		c.MaxMisses = 1024
	}
	if c.MaxMissesPerCaller <= 0 {
		c.MaxMissesPerCaller = max(1, c.MaxMisses/4)
	}
	if c.ConfirmTimeout <= 0 {
		c.ConfirmTimeout = 10 * time.Second
	}
	if c.Patience <= 0 {
		c.Patience = time.Second
	}
	if c.Rand == nil {
		c.Rand = rand.Float64 // jitter, no secret
	}
	return nil
}

// Cache is safe for concurrent use.
type Cache struct {
	cfg   Config
	arena *arena

	mu          sync.Mutex // guards what follows
	entries     map[place]*entry
	fills       map[place]*flight    // that more requests may wait for
	filling     map[*flight]struct{} // all that are under way
	authorities map[Authority]*authority
	contexts    int // authorities that have one
	reaches     map[span]*reach
	upstreams   map[string]*upstream
	pools       map[place]*pool
	spares      int // in all pools
	callers     map[string]*share
	asking      map[string]int // confirmations in flight, by backend
	preparing   map[string]int // fills of spares in flight, by backend
	misses      int            // fills in flight
	disk        *disk          // nil without a store
	closed      bool
	stats       Stats

	// work counts goroutines that ask upstream.
	work sync.WaitGroup
}

// New returns an empty cache. It reserves and locks its memory at once: too
// small an RLIMIT_MEMLOCK is an error that names the cure.
func New(cfg Config) (*Cache, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	d, err := newDisk(cfg.Store)
	if err != nil {
		return nil, err
	}
	a, err := newArena(cfg.MaxEntries + inUseReserve)
	if err != nil {
		return nil, err
	}
	return &Cache{
		cfg: cfg, arena: a, disk: d, entries: map[place]*entry{}, fills: map[place]*flight{}, filling: map[*flight]struct{}{},
		authorities: map[Authority]*authority{}, reaches: map[span]*reach{}, upstreams: map[string]*upstream{}, pools: map[place]*pool{},
		callers: map[string]*share{}, asking: map[string]int{}, preparing: map[string]int{},
	}, nil
}

// inUseReserve is room for data keys that were evicted while in use, and for
// those on their way in.
const inUseReserve = 1024

// Close destroys every data key that is not in use, and those in use when they
// are released. It waits for calls upstream to end, and saves what was used of data
// keys that are stored. It is idempotent.
func (c *Cache) Close() {
	c.mu.Lock()
	first := !c.closed
	c.closed = true
	for f := range c.filling {
		f.cancel()
	}
	for _, a := range c.authorities {
		if a.flight != nil {
			a.flight.cancel()
		}
	}
	c.mu.Unlock()
	c.work.Wait()
	if first {
		c.lastSave()
	}
	c.mu.Lock()
	c.evictLocked(func(Slot) bool { return true })
	c.mu.Unlock()
	c.arena.close()
}

// Stats counts what the cache holds and did.
type Stats struct {
	EncryptionKeys, DecryptionKeys, MaxEntries uint64
	// Authorities are those that something is known of, Suspended those of them
	// that upstream said no to last.
	Authorities, Suspended uint64
	// LockedBytes is the protected memory that is reserved; Memory says of
	// which kind: "memfd_secret" or "mlock".
	LockedBytes uint64
	Memory      string
	// Spares are data keys that are ready and not used yet.
	Spares uint64
	// Hits were served without waiting for upstream; Misses are fills begun;
	// Refreshes are confirmations asked for; Evictions are data keys destroyed
	// before their limits. InGrace were served in an outage, Unserved could not be.
	Hits, Misses, Refreshes, Evictions, InGrace, Unserved uint64
}

// Stats returns the present counts.
func (c *Cache) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stats
	s.MaxEntries, s.LockedBytes, s.Memory = uint64(c.cfg.MaxEntries), uint64(c.arena.size), c.arena.kind
	s.Authorities, s.Spares = uint64(len(c.authorities)), uint64(c.spares)
	for _, a := range c.authorities {
		if a.standing != good {
			s.Suspended++
		}
		if a.Direction == Encrypt {
			s.EncryptionKeys += uint64(len(a.entries))
		} else {
			s.DecryptionKeys += uint64(len(a.entries))
		}
	}
	s.EncryptionKeys -= s.Spares
	return s
}
