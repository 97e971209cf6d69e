package cache

import (
	"context"
	"errors"
	"time"

	"github.com/kms-agent/kms-agent/cache/seal"
)

// StoreConfig says where data keys, and what is known of them, outlive the process.
// Only data keys whose Limits say Store are kept there.
type StoreConfig struct {
	// File was opened for this process, and is closed after the Cache.
	File *seal.Store
	// Wall is the time of day. Boot names the boot that Config.Now counts from.
	Wall func() time.Time
	Boot string
	// Every is how often what may wait is saved, where something changed; 0 is 10 s.
	// A suspension and the begin of an outage wait for a tenth of it at most, a
	// revocation and a reservation not at all.
	Every time.Duration
	// Wears tells that each save costs the sealer a part of its life: reservations
	// are then bounded too. A data key that gets none gives way to another.
	Wears bool
	// Marshal and Unmarshal are of Material.Origin. An error of Marshal keeps the
	// data key out of the store. One of Unmarshal that is ErrUnfit leaves the data key
	// behind; any other means a store that is damaged.
	Marshal   func(origin any) ([]byte, error)
	Unmarshal func(encoded []byte) (origin any, err error)
	// Notes returns what the caller wants to know again after a restart. It is called
	// by one goroutine at a time, and must not call the Cache.
	Notes func() []Note
}

// Note is what the user of a Cache wants to know again, and from when it is, by
// Config.Now. It is of seal.MaxValue bytes less 64 at most, and no secret.
type Note struct {
	Value []byte
	At    time.Duration
}

// urgency says how soon a change has to be on disk.
type urgency uint8

const (
	nothing urgency = iota
	// ordinary: what is on disk is stricter, or only less.
	ordinary
	// soon: what is on disk would allow more after a crash in an outage.
	soon
	// atOnce: it would allow what is forbidden.
	atOnce
)

const (
	defaultSaveEvery = 10 * time.Second
	// soonPart is the part of StoreConfig.Every in which what is urgent is saved, and
	// after which a save that failed is tried again.
	soonPart = 10
	// maxCredit is how many reservations, and saves of what is urgent, a sealer that
	// wears takes in a row; one more comes with each soonPart of StoreConfig.Every.
	maxCredit = 32
)

// disk is what is known of the store. Its fields are guarded by Cache.mu.
type disk struct {
	StoreConfig
	// restored: Restore has been called. Nothing is saved before.
	restored bool
	pending  urgency
	noted    uint64 // how often the notes have changed
	// next is for those who wait for the next save to end; running: a goroutine saves
	// while wanted or next says so.
	next            *flight
	running, wanted bool
	// began is when the last save did, failed when the last one that failed ended.
	began, failed time.Duration
	err           error // of the last save
	highWater     int64 // the latest time of day that was seen, in nanoseconds of Unix time
	credit        int
	credited      time.Duration
	stats         StoreStats
}

// StoreStats tells of the store.
type StoreStats struct {
	// DataKeys are in the last save that succeeded, of those that should be; Saved is
	// when it was, zero for never.
	DataKeys, Wanted uint64
	Saved            time.Time
	Saves, Failures  uint64
	// Err is how the last save failed; nil where it did not.
	Err error
}

func newDisk(cfg *StoreConfig) (*disk, error) {
	if cfg == nil {
		return nil, nil //nolint:nilnil // no store is an ordinary answer
	}
	d := &disk{StoreConfig: *cfg, credit: maxCredit}
	if d.File == nil || d.Wall == nil || d.Marshal == nil || d.Unmarshal == nil {
		return nil, errors.New("cache: a store needs File, Wall, Marshal and Unmarshal")
	}
	if d.Every <= 0 {
		d.Every = defaultSaveEvery
	}
	if d.Notes == nil {
		d.Notes = func() []Note { return nil }
	}
	return d, nil
}

// StoreStats tells of the store; the zero value without one.
func (c *Cache) StoreStats() StoreStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.disk == nil {
		return StoreStats{}
	}
	s := c.disk.stats
	s.Err = c.disk.err
	return s
}

// Flush waits until all that was revoked or evicted is so on disk too, and returns
// how that failed.
func (c *Cache) Flush(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.disk == nil || !c.disk.restored || c.closed {
		return nil
	}
	if f := c.flushLocked(); f != nil {
		if err := c.awaitSaveLocked(ctx, f); err != nil {
			return err
		}
	}
	if c.disk.pending == atOnce {
		return c.disk.err
	}
	return nil
}

// flushLocked returns what to wait for; nil for nothing.
func (c *Cache) flushLocked() *flight {
	d := c.disk
	switch {
	case d == nil || d.pending < atOnce && !d.running || !d.restored || c.closed || d.blocked(c.cfg.Now()):
		return nil
	case d.next == nil:
		d.next = c.newSave()
	}
	c.startSaveLocked()
	return d.next
}

// changedLocked has a change saved.
func (c *Cache) changedLocked(u urgency) {
	d := c.disk
	if d == nil {
		return
	}
	d.pending = max(d.pending, u)
	if u == atOnce && !d.blocked(c.cfg.Now()) {
		d.wanted = true
		c.startSaveLocked()
	}
}

// NotesChanged has the notes saved: soon where what is on disk would allow more.
func (c *Cache) NotesChanged(stricter bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.disk != nil {
		c.disk.noted++
	}
	if stricter {
		c.changedLocked(soon)
	} else {
		c.changedLocked(ordinary)
	}
}

// sweepStoreLocked has saved what has waited for long enough.
func (c *Cache) sweepStoreLocked(now time.Duration) {
	d := c.disk
	if d == nil || d.pending == nothing || d.blocked(now) {
		return
	}
	since := now - d.began
	switch {
	case d.began == 0 || since >= d.Every || d.pending == atOnce:
	case d.pending == soon && since >= d.Every/soonPart && d.affordable(now):
		d.credit--
	default:
		return
	}
	d.wanted = true
	c.startSaveLocked()
}

// blocked tells whether a save failed just now.
func (d *disk) blocked(now time.Duration) bool {
	return d.err != nil && now-d.failed < d.Every/soonPart
}

// affordable tells whether there is credit for a save that callers can cause. A sealer
// that does not wear gives as much as is asked for.
func (d *disk) affordable(now time.Duration) bool {
	switch part := d.Every / soonPart; {
	case !d.Wears:
		d.credit = maxCredit
	case now-d.credited >= part:
		d.credit = int(min(maxCredit, int64(d.credit)+int64((now-d.credited)/part)))
		d.credited = now
	}
	return d.credit > 0
}

// newSave is a flight that lands when a save has ended.
func (c *Cache) newSave() *flight {
	f := c.newFlight(context.Background())
	f.save = true
	return f
}

func (c *Cache) startSaveLocked() {
	d := c.disk
	if d.running || !d.restored || c.closed {
		return
	}
	d.running = true
	c.work.Go(func() {
		for c.save() {
			continue
		}
	})
}

// save saves once, if there is something to save, and tells whether there may be more.
func (c *Cache) save() bool {
	d := c.disk
	c.mu.Lock()
	defer c.mu.Unlock()
	noted := d.noted
	c.mu.Unlock()
	notes := d.Notes()
	c.mu.Lock()
	if c.closed || !d.wanted && d.next == nil {
		c.endSavesLocked()
		return false
	}
	s := c.snapshotLocked(notes, false)
	if d.noted != noted {
		d.pending = max(d.pending, soon) // it may have come after Notes
	}
	waits := d.next
	d.next, d.wanted = nil, false
	c.mu.Unlock()
	err := s.save(d.File)
	c.mu.Lock()
	c.savedLocked(s, err)
	if waits != nil {
		c.landLocked(waits, nil)
	}
	if err != nil {
		c.endSavesLocked()
	}
	return err == nil
}

// endSavesLocked lets go who still waits: a save failed, or the cache is closed.
func (c *Cache) endSavesLocked() {
	d := c.disk
	d.running, d.wanted = false, false
	if f := d.next; f != nil {
		d.next = nil
		c.landLocked(f, nil)
	}
}

// savedLocked draws the consequences of a save.
func (c *Cache) savedLocked(s *snapshot, err error) {
	d := c.disk
	d.stats.Saves++
	if err != nil {
		d.stats.Failures++
		d.err, d.failed = err, c.cfg.Now()
		d.pending = max(d.pending, s.urgency)
	} else {
		d.err = nil
		d.stats.DataKeys, d.stats.Wanted = uint64(len(s.items)), uint64(len(s.items)+len(s.left))
		d.stats.Saved = time.Unix(0, s.clock.wall)
	}
	s.settle(err == nil)
}

// lastSave saves exactly what was used. The cache is closed.
func (c *Cache) lastSave() {
	d := c.disk
	if d == nil {
		return
	}
	notes := d.Notes()
	c.mu.Lock()
	if !d.restored || d.stats.Saves == 0 && d.pending == nothing {
		c.mu.Unlock()
		return
	}
	s := c.snapshotLocked(notes, true)
	c.mu.Unlock()
	err := s.save(d.File)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.savedLocked(s, err)
}
