package audit

import (
	"fmt"
	"strings"
	"sync"
	"time"
)

const (
	// maxCoalesced bounds how many different denials are counted at a time.
	// Others are written one by one.
	maxCoalesced = 1024
	// summaryRetry is how soon a summary that could not be written is tried again.
	summaryRetry = time.Second
)

// denialKey is what equal denials have in common.
type denialKey struct {
	spiffeID, proof        string
	uid, gid               uint32
	operation, key, reason string
	rule, door             string
}

// denial counts what followed a denial that is on record.
type denial struct {
	key   denialKey
	count uint64
	// since and last are when the first and the last of them were, of which
	// requestID and pid are.
	since, last time.Time
	requestID   string
	pid         int32
	due         time.Time // of the next summary
}

// coalescer counts equal denials instead of having each written.
type coalescer struct {
	window time.Duration // 0: nothing is counted

	mu     sync.Mutex // guards what follows
	table  map[denialKey]*denial
	order  []*denial // by due
	closed bool
	total  uint64

	wake  chan struct{} // the first denial came, or the log closes; holds one
	ended chan struct{}
}

// coalescible says whether a record may be counted: a denial, never anything
// that was allowed.
func (c *coalescer) coalescible(r *Record) bool {
	return c.window > 0 && r.Outcome == Denied && r.Kind == KindOperation && r.Count == 0 && r.Source == nil
}

func keyOfDenial(r *Record) denialKey {
	return denialKey{
		spiffeID: r.Caller.SPIFFEID, proof: r.Caller.Proof, uid: r.Caller.UID, gid: r.Caller.GID,
		operation: r.Operation, key: r.Key, reason: r.Reason, rule: r.Rule, door: r.Door,
	}
}

// clone does not keep what the strings are parts of.
func (k denialKey) clone() denialKey {
	for _, s := range []*string{&k.spiffeID, &k.proof, &k.operation, &k.key, &k.reason, &k.rule, &k.door} {
		*s = strings.Clone(*s)
	}
	return k
}

// add counts a denial when an equal one is on record; false: it must be written.
func (c *coalescer) add(r *Record, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.table[keyOfDenial(r)]
	if d == nil || c.closed {
		return false
	}
	if d.count == 0 {
		d.since = now
	}
	d.count++
	c.total++
	d.last, d.requestID, d.pid = now, strings.Clone(r.RequestID), r.Caller.PID
	return true
}

// wrote notes a denial that is on record now: equal ones are counted from here.
func (c *coalescer) wrote(r *Record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := keyOfDenial(r)
	if c.closed || c.table[key] != nil || len(c.table) >= maxCoalesced {
		return
	}
	d := &denial{key: key.clone(), due: time.Now().Add(c.window)}
	c.table[d.key] = d
	c.order = append(c.order, d)
	if len(c.order) == 1 {
		signal(c.wake)
	}
}

// summarize writes summaries when they are due, and all of them at the end.
func (l *Log) summarize() {
	c := &l.coalescer
	defer close(c.ended)
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	for {
		select {
		case <-c.wake:
		case <-timer.C:
		}
		closed := l.summarizeDue()
		if closed {
			timer.Stop()
			return
		}
		if next, ok := c.next(); ok {
			timer.Reset(time.Until(next))
		}
	}
}

// next is when the next summary is due; false when none is to come.
func (c *coalescer) next() (time.Time, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.order) == 0 {
		return time.Time{}, false
	}
	next := c.order[0].due
	for _, d := range c.order {
		if d.due.Before(next) {
			next = d.due
		}
	}
	return next, true
}

// dueNow takes the denials whose time has come off the list; those that nothing
// followed are forgotten.
func (c *coalescer) dueNow() (due []*denial, counts []uint64, closed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	rest := c.order[:0]
	for _, d := range c.order {
		switch {
		case !c.closed && d.due.After(now):
			rest = append(rest, d)
		case d.count == 0:
			delete(c.table, d.key)
		default:
			due, counts = append(due, d), append(counts, d.count)
		}
	}
	clear(c.order[len(rest):])
	c.order = rest
	return due, counts, c.closed
}

// summarizeDue writes the summaries that are due, in one group.
func (l *Log) summarizeDue() (closed bool) {
	c := &l.coalescer
	due, counts, closed := c.dueNow()
	entries := make([]*entry, len(due))
	errs := make([]error, len(due))
	for i, d := range due {
		c.mu.Lock()
		r := d.summary(counts[i])
		c.mu.Unlock()
		entries[i], errs[i] = l.queueRecord(&r, l.cfg.Now())
	}
	for i, d := range due {
		if errs[i] == nil {
			errs[i] = l.wait(entries[i])
		}
		if errs[i] == nil {
			l.recycle(entries[i])
		}
		c.summarized(d, counts[i], errs[i])
	}
	return closed
}

// summarized goes on with a denial after its summary was tried.
func (c *coalescer) summarized(d *denial, count uint64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	wait := c.window
	if err == nil {
		d.count -= count
		d.since = d.last
	} else {
		wait = min(wait, summaryRetry) // after a timeout it may be told twice, never not at all
	}
	d.due = time.Now().Add(wait)
	c.order = append(c.order, d)
}

func (d *denial) summary(count uint64) Record {
	k := d.key
	return Record{
		Time: d.last, Kind: KindOperation, RequestID: d.requestID, Door: k.door, Operation: k.operation, Key: k.key,
		Caller: Caller{SPIFFEID: k.spiffeID, Proof: k.proof, UID: k.uid, GID: k.gid, PID: d.pid},
		Rule:   k.rule, Outcome: Denied, Reason: k.reason, Count: count, Since: d.since,
		Detail: fmt.Sprintf("%d more denials like one on record before; the request and the process are those of the last", count),
	}
}

// finish has the last summaries written.
func (c *coalescer) finish() error {
	if c.window == 0 {
		return nil
	}
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	signal(c.wake)
	<-c.ended
	c.mu.Lock()
	defer c.mu.Unlock()
	var lost uint64
	for _, d := range c.order {
		lost += d.count
	}
	if lost > 0 {
		return fmt.Errorf("%w: %d denials that were counted are not on record", ErrSink, lost)
	}
	return nil
}

// counted is how many denials were counted instead of being written.
func (c *coalescer) counted() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.total
}
