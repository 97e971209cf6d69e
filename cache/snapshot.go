package cache

import (
	"cmp"
	"slices"
	"time"

	"github.com/kms-agent/kms-agent/cache/seal"
)

// maxStored bounds the data keys' records, in bytes: the rest of seal.MaxContent is for
// the others. maxStoredKeys does so for their number.
const (
	maxStored     = seal.MaxContent - 2<<20
	maxStoredKeys = seal.MaxRecords - 1<<14
	// maxStanding is what there is room for beside the data keys in any case, in bytes:
	// where each is of a context of its own, their standings take more.
	maxStanding = 1 << 20
	// maxStoredContexts is how many contexts are stored: the data keys of more are not found
	// in the store.
	maxStoredContexts = 1 << 15
	// recordHeader is what a record takes beside its value, in bytes.
	recordHeader = 5
)

// stored tells whether an entry is for the store.
func (e *entry) stored() bool { return e.encoded != nil && e.limits.Store }

// encode returns a new data key's origin as the store keeps it, nil where it does not.
func (c *Cache) encode(m Material, err error, l Limits) []byte {
	if err != nil || c.disk == nil || !l.Store {
		return nil
	}
	encoded, err := c.disk.Marshal(m.Origin)
	if err != nil || len(encoded) > maxOrigin {
		return nil
	}
	return encoded
}

// snapshot is what one save puts on disk.
type snapshot struct {
	// items are the data keys; left are those that disk does not have after it.
	items    []item
	left     []*entry
	standing []standingRecord
	notes    []Note
	clock    clockRecord
	urgency  urgency
}

// item is one data key in a snapshot, which holds its secret.
type item struct {
	*entry
	public keyRecord // as it was when the snapshot was taken
	// first: it has never been in a snapshot before.
	first bool
}

// snapshotLocked takes what is to be saved. From here on what it says of a data key's
// uses may be on disk, whatever becomes of the save. exact: nothing is used any more.
func (c *Cache) snapshotLocked(notes []Note, exact bool) *snapshot {
	d, now := c.disk, c.cfg.Now()
	s := &snapshot{notes: notes, urgency: d.pending}
	wall := d.Wall().UnixNano()
	d.highWater, d.began, d.pending = max(d.highWater, wall), now, nothing
	s.clock = clockRecord{boot: d.Boot, now: now, wall: wall, highWater: d.highWater}
	contexts := 0
	for _, a := range c.authorities {
		if a.Context != "" {
			contexts++
		}
		if a.kept && (a.Context == "" || contexts <= maxStoredContexts) {
			s.standing = append(s.standing, a.record())
		}
		for _, e := range a.entries {
			switch {
			case e.stored():
				s.items = append(s.items, e.item(exact))
			case e.durable:
				s.left = append(s.left, e)
			}
		}
	}
	for name, r := range c.reaches {
		if r.down {
			s.clock.outages = append(s.clock.outages, outageRecord{name, r.since, r.failed})
		}
	}
	return s
}

func (a *authority) record() standingRecord {
	r := standingRecord{
		Authority: a.Authority, known: a.known, confirmed: a.confirmed,
		standing: a.standing, suspendedAt: a.suspendedAt, refusedAt: a.refusedAt,
	}
	if a.refusal != nil {
		r.refusal = a.refusal.Error()
	}
	return r
}

// item promises what the data key may be used for until the next save.
func (e *entry) item(exact bool) item {
	e.secret.hold()
	i := item{entry: e, first: !e.durable}
	if e.place.Authority.Direction == Encrypt {
		e.promise(exact)
	}
	i.public = keyRecord{
		place: e.place, spare: e.spare, caller: e.caller(), created: e.created, used: e.lastUsed(),
		uses: e.promised, origin: e.encoded,
	}
	return i
}

func (e *entry) promise(exact bool) {
	switch {
	case exact:
		e.promised = amount{e.messages, e.bytes}
	case e.durable:
		e.promised = e.granted.raised(e.reserve(1))
	default:
		// No older state on disk has it: either the new one is found after a crash, or
		// none.
		e.promised = e.reserve(1)
		e.granted, e.durable = e.promised, true
	}
	e.waiting = amount{}
}

// caller is whose share an entry is.
func (e *entry) caller() string {
	if e.spare {
		return e.pool.owner
	}
	return e.owner.caller
}

// save puts the snapshot on disk, and lets go of its secrets.
func (s *snapshot) save(file *seal.Store) error {
	public := s.encode()
	size := 0
	for _, p := range public {
		size += len(p) + DataKeySize
	}
	memory, err := seal.NewMemory(size)
	if err != nil {
		s.release()
		return err
	}
	defer memory.Free()
	records := s.records()
	free := memory.Bytes()
	for i, p := range public {
		value := free[: len(p)+DataKeySize : len(p)+DataKeySize]
		free = free[len(value):]
		copy(value, p)
		inSecret(func() { copy(value[len(p):], s.items[i].secret.bytes) })
		records = append(records, seal.Record{Type: seal.DataKey, Value: value})
	}
	s.release()
	return file.Save(records)
}

func (s *snapshot) release() {
	for _, i := range s.items {
		i.secret.release()
	}
}

// encode returns the data keys' records without the secrets, the most recently used
// first, and leaves out those for which there is no room.
func (s *snapshot) encode() [][]byte {
	slices.SortFunc(s.items, func(a, b item) int { return cmp.Compare(b.public.used, a.public.used) })
	var public [][]byte
	kept, size := s.items[:0:0], max(0, s.standingSize()-maxStanding)
	most := min(maxStoredKeys, seal.MaxRecords-len(s.standing)-len(s.notes)-1)
	for _, i := range s.items {
		p := i.public.encode()
		size += len(p) + DataKeySize + recordHeader
		if len(p) > seal.MaxValue-DataKeySize || size > maxStored || len(kept) >= most {
			size -= len(p) + DataKeySize + recordHeader
			i.secret.release()
			s.left = append(s.left, i.entry)
			continue
		}
		public, kept = append(public, p), append(kept, i)
	}
	s.items = kept
	return public
}

// standingSize is what the standings take, in bytes.
func (s *snapshot) standingSize() int {
	size := 0
	for _, r := range s.standing {
		size += len(r.encode()) + recordHeader
	}
	return size
}

// records are those without secrets.
func (s *snapshot) records() []seal.Record {
	records := []seal.Record{{Type: seal.Clock, Value: s.clock.encode()}}
	for _, r := range s.standing {
		kind := seal.Confirmation
		if r.standing != good {
			kind = seal.Tombstone
		}
		records = append(records, seal.Record{Type: kind, Value: r.encode()})
	}
	for _, n := range s.notes {
		records = append(records, seal.Record{Type: seal.Note, Value: n.encode()})
	}
	return records
}

// settle lets data keys be used for what is on disk. It requires Cache.mu. Where the
// save failed disk may say what it did before, or what the snapshot does.
func (s *snapshot) settle(saved bool) {
	for _, i := range s.items {
		if saved {
			i.granted = i.promised
		} else if !i.first {
			i.promised = i.granted
		}
	}
	if !saved {
		return
	}
	for _, e := range s.left {
		e.durable, e.granted, e.promised = false, amount{}, amount{}
	}
}

// clockRecord is when a store was saved: by Config.Now in which boot, by the time of
// day, and the latest time of day that was ever seen; in nanoseconds.
type clockRecord struct {
	boot            string
	now             time.Duration
	wall, highWater int64
	outages         []outageRecord
}

// outageRecord is the clock of an outage.
type outageRecord struct {
	span
	since, failed time.Duration
}

// standingRecord is what is known of an Authority.
type standingRecord struct {
	Authority
	known                  bool
	confirmed              time.Duration
	standing               standing
	suspendedAt, refusedAt time.Duration
	refusal                string
}

// keyRecord is a data key without its secret.
type keyRecord struct {
	place         place
	spare         bool
	caller        string
	created, used time.Duration
	uses          amount
	origin        []byte
}
