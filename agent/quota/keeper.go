package quota

import (
	"context"
	"fmt"
	"hash/maphash"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Keeper counts, and keeps what it counts by the day in a file. It is safe for
// concurrent use.
type Keeper struct {
	path   string
	seed   maphash.Seed
	clock  clock
	closed atomic.Bool // set with mu held

	mu    sync.Mutex // guards what follows; locked after every other
	rules map[string]*Rule
	// inUse are the names of the rules of the configuration in use.
	inUse []string
	next  *batch // the requests that the next save is for; nil: none
	// saving: a goroutine stores until next is nil; saves waits for it.
	saving   bool
	saves    sync.WaitGroup
	fault    error // of the last save
	failedAt time.Duration
}

// Open reads the counts in the state directory dir, which belongs to the agent
// alone and which another Keeper must not use at the same time. boot is
// CLOCK_BOOTTIME, wall is the time of day. Counts that cannot be read are an
// error: without them every caller would have a day's limits again.
func Open(dir string, boot func() time.Duration, wall func() time.Time) (*Keeper, error) {
	k := &Keeper{
		path: filepath.Join(dir, stateName), seed: maphash.MakeSeed(),
		clock: clock{boot: boot, wall: wall}, rules: map[string]*Rule{},
	}
	saved, err := readState(k.path)
	if err != nil {
		return nil, err
	}
	k.clock.set(saved.HighWater)
	today := dayOf(k.clock.now())
	if today != dayOf(saved.HighWater) {
		return k, nil
	}
	for name, counts := range saved.Rules {
		r := k.rule(name)
		r.restored, r.restoredDay = counts, today
		r.callers.Store(int64(len(counts)))
	}
	return k, nil
}

// rule returns that of a name, which it makes without limits. It requires k.mu.
func (k *Keeper) rule(name string) *Rule {
	r := k.rules[name]
	if r == nil {
		r = &Rule{name: name, keeper: k, unused: -1}
		r.limits.Store(&Limits{})
		for i := range r.shards {
			r.shards[i].counters = map[string]*counter{}
		}
		k.rules[name] = r
	}
	return r
}

// Configure puts the limits of a configuration to use, by rule, and returns the
// rules to count against. A rule that keeps its name keeps its counters; counters
// of rules that are gone are kept as long as they mean something.
func (k *Keeper) Configure(limits map[string]Limits) map[string]*Rule {
	rules := make(map[string]*Rule, len(limits))
	k.mu.Lock()
	for name, l := range limits {
		rules[name] = k.rule(name)
		if *rules[name].limits.Load() != l {
			rules[name].limits.Store(&l)
		}
	}
	k.inUse = slices.Sorted(maps.Keys(rules))
	k.mu.Unlock()
	for _, r := range k.all() {
		r.sweep()
	}
	k.forget(rules)
	return rules
}

// unusedFor is how long a rule that is not in use is kept at least, with its
// limits: longer than a request lasts that began while it was.
const unusedFor = time.Hour

// forget drops rules that have not been in use for long and count nobody.
func (k *Keeper) forget(used map[string]*Rule) {
	now := k.clock.boot()
	k.mu.Lock()
	defer k.mu.Unlock()
	for name, r := range k.rules {
		switch {
		case used[name] != nil:
			r.unused = -1
		case r.unused < 0:
			r.unused = now
		case now-r.unused > unusedFor && r.callers.Load() == 0:
			delete(k.rules, name)
		}
	}
}

// batch is a save, for those who wait for it.
type batch struct {
	done chan struct{}
	err  error // once done is closed
}

// finish waits until b is stored, at most until ctx ends.
func (b *batch) finish(ctx context.Context) error {
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return fmt.Errorf("%w in time: %w", ErrUnavailable, context.Cause(ctx))
	}
}

// failurePause is how long after a save that failed no other is tried.
const failurePause = time.Second

// storing has stored what counters want, and returns what to wait for. Counters'
// mu may be held.
func (k *Keeper) storing() *batch {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.closed.Load():
		return failed(errClosed)
	case k.fault != nil && k.clock.boot()-k.failedAt < failurePause:
		return failed(k.fault)
	}
	if k.next == nil {
		k.next = &batch{done: make(chan struct{})}
	}
	if !k.saving {
		k.saving = true
		k.saves.Go(k.saveAll)
	}
	return k.next
}

func failed(err error) *batch {
	b := &batch{done: make(chan struct{}), err: err}
	close(b.done)
	return b
}

// saveAll stores until nobody waits.
func (k *Keeper) saveAll() {
	for {
		k.mu.Lock()
		b := k.next
		k.next = nil
		if b == nil {
			k.saving = false
			k.mu.Unlock()
			return
		}
		k.mu.Unlock()
		b.err = k.save()
		close(b.done)
	}
}

// save stores what counters want, and lets them use it.
func (k *Keeper) save() error {
	highWater := k.clock.now()
	day := dayOf(highWater)
	saved := state{HighWater: highWater, Rules: map[string]map[callerKey]daily{}}
	var pending []stored
	for _, r := range k.all() {
		pending = r.snapshot(day, saved.of(r.name), pending)
	}
	err := saved.write(k.path)
	for _, p := range pending {
		p.counter.mu.Lock()
		switch {
		case p.counter.day != day:
		case err == nil:
			p.counter.stored = p.wanted
		default:
			p.counter.wanted = p.counter.stored // a crash is not to cost what nobody could use
		}
		p.counter.mu.Unlock()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fault = err; err != nil {
		k.failedAt = k.clock.boot()
	}
	return err
}

func (k *Keeper) all() []*Rule {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Collect(maps.Values(k.rules))
}

// stored is what a save has stored for a counter.
type stored struct {
	counter *counter
	wanted  daily
}

// end makes every counter of r count no more, and want what it has used.
func (r *Rule) end() {
	for i := range r.shards {
		s := &r.shards[i]
		s.mu.RLock()
		for _, c := range s.counters {
			c.mu.Lock()
			c.gone, c.wanted = true, c.used
			c.mu.Unlock()
		}
		s.mu.RUnlock()
	}
}

// snapshot puts what counters want of a day into counts, and appends those that
// want another amount than they have to pending.
func (r *Rule) snapshot(day int64, counts map[callerKey]daily, pending []stored) []stored {
	// Before the counters: whoever comes meanwhile goes from here to there.
	r.mu.Lock()
	if r.restoredDay == day {
		maps.Copy(counts, r.restored)
	}
	r.mu.Unlock()
	for i := range r.shards {
		s := &r.shards[i]
		s.mu.RLock()
		for caller, c := range s.counters {
			c.mu.Lock()
			if c.day == day && c.wanted != (daily{}) {
				counts[keyOf(caller)] = c.wanted
				if c.wanted != c.stored {
					pending = append(pending, stored{c, c.wanted})
				}
			}
			c.mu.Unlock()
		}
		s.mu.RUnlock()
	}
	return pending
}

// Close stores exactly what was used today. Whoever asks from then on is refused.
// It is idempotent.
func (k *Keeper) Close() error {
	k.mu.Lock()
	closed := k.closed.Swap(true)
	k.mu.Unlock()
	k.saves.Wait()
	if closed {
		return nil
	}
	for _, r := range k.all() {
		r.end()
	}
	highWater := k.clock.now() // not before: nothing is counted by a later day
	saved := state{HighWater: highWater, Rules: map[string]map[callerKey]daily{}}
	counted := false
	for _, r := range k.all() {
		counts := saved.of(r.name)
		r.snapshot(dayOf(highWater), counts, nil)
		counted = counted || len(counts) > 0
	}
	if !counted && !exists(k.path) {
		return nil // nothing was ever counted by the day
	}
	return saved.write(k.path)
}

// RuleStatus tells of one rule with limits.
type RuleStatus struct {
	Rule string
	// Callers that are counted at present.
	Callers int
	// Refused counts refusals since the start of the process, by limit.
	Refused map[Limit]uint64
}

// Status tells of every rule of the configuration in use, by name, and why
// counts cannot be stored; nil where they can. Where they could not, that is
// tried again meanwhile.
func (k *Keeper) Status() ([]RuleStatus, error) {
	rules, fault := k.status()
	if fault != nil {
		k.storing()
	}
	return rules, fault
}

func (k *Keeper) status() ([]RuleStatus, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := make([]RuleStatus, 0, len(k.inUse))
	for _, name := range k.inUse {
		r := k.rules[name]
		s := RuleStatus{Rule: name, Callers: int(r.callers.Load()), Refused: map[Limit]uint64{}}
		for i, kind := range kinds() {
			s.Refused[kind] = r.refused[i].Load()
		}
		all = append(all, s)
	}
	return all, k.fault
}
