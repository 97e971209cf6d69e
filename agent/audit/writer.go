package audit

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"
)

// What became of an entry.
const (
	entryWaiting   int32 = iota
	entryTaken           // by the writer
	entryAbandoned       // by the one who waited
)

// entry is a record on its way to the writer.
type entry struct {
	fields   []byte
	sequence uint64
	state    atomic.Int32
	result   chan error // holds one
	timer    *time.Timer
}

func newEntry() any {
	e := &entry{result: make(chan error, 1), timer: time.NewTimer(time.Hour)}
	e.timer.Stop()
	return e
}

// writer writes groups of records. It belongs to one goroutine.
type writer struct {
	tail    tail
	sink    Sink
	file    *file // the sink, when it is a file
	outlets []*outlet
	durable bool
	encoder encoder
	now     func() time.Time
	saver   *saver

	buffer  []byte
	begin   int // of the first line in buffer
	ends    []lineEnd
	working []*entry
	tried   bool // the sink was asked to take something
	// resuming: tail.events holds EventResumed.
	resuming bool

	maintained     time.Time // when rotation and retention were looked at last
	rotationFailed bool
	doomed         []string // files to be deleted once that is on record
	rotationFault  func(error)
	wrote          func(error) // brings the status up to date

	unrecorded *atomic.Uint64 // operations answered without a record
	declared   uint64         // of which records have told or are about to
	declaring  *Record        // that record
}

// lineEnd is a place in the buffer where a line ends without its newline, and
// the chain after it.
type lineEnd struct {
	offset int
	chain  chain
}

// probeEvery is how often a log that fails is tried without a record to write,
// so that it is known to work again before anybody asks.
const probeEvery = 5 * time.Second

// run writes the log's own events, then what is queued until the log closes,
// and then ends it.
func (l *Log) run(begun chan<- struct{}) {
	defer close(l.ended)
	l.writeGroup(nil)
	_ = l.saver.flush() // what fails stands in the status, and is tried again
	close(begun)
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	var group []*entry
	for closed := false; !closed; {
		select {
		case <-l.wake:
		case <-tick.C:
			l.probe()
		}
		if group, closed = l.take(group); len(group) > 0 || !closed {
			l.writeGroup(group)
		}
	}
	err := l.saver.stop(len(l.writer.tail.events) == 0)
	outlets := l.outlets
	if l.checkpoints != nil {
		outlets = append(slices.Clip(outlets), l.checkpoints)
	}
	closeOutlets(outlets, l.cfg.WriteTimeout/4)
	err = errors.Join(err, l.writer.sink.Close())
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closing = err
}

// probe leaves a record, with the next write that succeeds, of a time in which
// records could not be written.
func (l *Log) probe() {
	s := l.Status()
	if !s.Failing || l.writer.resuming {
		return
	}
	l.writer.resuming = true
	l.writer.tail.events = append(l.writer.tail.events, &Record{Kind: KindEvent, Operation: EventResumed,
		Detail: fmt.Sprintf("records could be written again; before: %s", s.LastError)})
}

// writeGroup writes a group and brings the status up to date.
func (l *Log) writeGroup(group []*entry) { l.writer.writeGroup(group) }

// take swaps the queue for the emptied group of before.
func (l *Log) take(before []*entry) (group []*entry, closed bool) {
	clear(before)
	l.mu.Lock()
	defer l.mu.Unlock()
	group, l.queue, l.queued = l.queue, before[:0], 0
	return group, l.closed
}

// wrote brings the status up to date after a group.
func (l *Log) wrote(err error) {
	l.mu.Lock()
	l.status.Sequence = l.writer.tail.chain.next - 1
	l.mu.Unlock()
	l.stuck.Store(false)
	if err == nil {
		l.failing.Store(false)
	}
	if err != nil {
		_ = l.fault(err)
	}
}

// writeGroup writes the entries in one write, and tells wrote, if there was
// anything to write, and then each entry its result.
func (w *writer) writeGroup(group []*entry) {
	w.working, w.tried = w.working[:0], false
	for _, e := range group {
		if e.state.CompareAndSwap(entryWaiting, entryTaken) {
			w.working = append(w.working, e)
		}
	}
	written, err := w.write(w.working)
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrSink, err)
	}
	if w.tried || err != nil {
		w.wrote(err)
	}
	for i, e := range w.working {
		if i < written {
			e.result <- nil
		} else {
			e.result <- err
		}
	}
	clear(w.working)
}

// write returns how many of the entries the sink has.
func (w *writer) write(entries []*entry) (int, error) {
	if err := w.prepare(len(entries)); err != nil {
		return 0, err
	}
	if len(entries) == 0 && len(w.tail.events) == 0 && w.tail.torn.empty() {
		return 0, nil
	}
	w.tried = true
	events := w.encode(entries)
	n, err := w.sink.Write(w.buffer)
	lines := w.commit(n)
	missed := w.distribute(lines)
	w.forget()
	if err == nil && n < len(w.buffer) {
		err = fmt.Errorf("%s took %d of %d bytes", w.sink, n, len(w.buffer))
	}
	if lines > 0 {
		w.resuming = w.resuming && len(w.tail.events) > 0
	}
	if lines > 0 && w.durable {
		if syncErr := w.sync(); syncErr != nil {
			return 0, errors.Join(err, syncErr)
		}
	}
	if missed != nil {
		return 0, errors.Join(err, missed)
	}
	if err == nil {
		w.bury()
	}
	return max(lines-events, 0), err
}

// distribute brings the first lines of the buffer to the further sinks. The
// error is that of those that are required.
func (w *writer) distribute(lines int) error {
	if lines == 0 {
		return nil
	}
	var err error
	for _, o := range w.outlets {
		err = errors.Join(err, o.take(w.buffer[w.begin:w.ends[lines-1].offset]))
	}
	return err
}

// sync makes what was written durable, wherever records are required to be.
func (w *writer) sync() error {
	err := w.sink.Sync()
	for _, o := range w.outlets {
		if o.required {
			err = errors.Join(err, o.sink.Sync())
		}
	}
	return err
}

// prepare looks after the file, the stored state and what required sinks lack
// before records are written: while such a sink is out, the log gets none either.
func (w *writer) prepare(records int) error {
	for _, o := range w.outlets {
		if !o.required {
			continue
		}
		if err := o.flush(); err != nil {
			return err
		}
	}
	if err := w.turn(); err != nil {
		return err
	}
	w.declare()
	return w.saver.reserve(&w.tail.chain, uint64(records+len(w.tail.events)+1))
}

// declare has a record tell how many operations were answered without one.
func (w *writer) declare() {
	n := w.unrecorded.Load()
	if n == w.declared {
		return
	}
	if w.declaring == nil || !slices.Contains(w.tail.events, w.declaring) {
		w.declaring = &Record{Kind: KindEvent, Operation: EventUnrecorded,
			Detail: "operations were answered that are not on record, because audit.on_failure says so"}
		w.tail.events = append(w.tail.events, w.declaring)
	}
	w.declaring.Count += n - w.declared
	w.declared = n
}

// turn goes on in a new file when the log was moved away, and notices when it
// was cut.
func (w *writer) turn() error {
	if w.file == nil {
		return nil
	}
	moved, lost, err := w.file.look()
	if err != nil {
		return err
	}
	if lost > 0 {
		w.tail.events = append(w.tail.events, &Record{Kind: KindEvent, Operation: EventTruncated,
			Detail: fmt.Sprintf("the log file lost %d bytes while it was open and has %d now", lost, w.file.size)})
		if w.tail.unsealed, err = endsInside(w.file.open.Load(), w.file.size); err != nil {
			return err
		}
	}
	if !moved {
		w.maintain()
		return nil
	}
	if err := w.settle(); err != nil {
		return err
	}
	if err := w.file.reopen(); err != nil {
		return err
	}
	w.tail.unsealed = false
	return nil
}

// encode fills the buffer with the log's own events and the entries, and returns
// how many events there are.
func (w *writer) encode(entries []*entry) (events int) {
	w.buffer, w.ends = w.buffer[:0], w.ends[:0]
	c := w.tail.chain
	line := func(fields []byte) {
		w.buffer = c.seal(w.buffer, fields)
		w.ends = append(w.ends, lineEnd{len(w.buffer), c})
		w.buffer = append(w.buffer, '\n')
	}
	if w.tail.unsealed {
		w.buffer = append(w.buffer, '\n')
	}
	w.begin = len(w.buffer)
	var fields []byte
	if !w.tail.torn.empty() {
		r := Record{Kind: KindEvent, Operation: EventRecovered, Log: w.tail.torn.event(),
			Detail: "the bytes between the record before and this one belong to no record"}
		fields = w.encoder.append(fields[:0], &r, w.now())
		line(fields)
	}
	for _, r := range w.tail.events {
		fields = w.encoder.append(fields[:0], r, w.now())
		line(fields)
	}
	events = len(w.ends)
	for _, e := range entries {
		e.sequence = c.next
		line(e.fields)
	}
	return events
}

// maxKeptBuffer is how much of the buffer's memory is kept for the next group.
const maxKeptBuffer = 4 << 20

// forget destroys the chains of the group, whose keys could forge its records.
func (w *writer) forget() {
	clear(w.ends)
	if cap(w.buffer) > maxKeptBuffer {
		w.buffer = nil
	}
}

// commit moves the tail behind the lines that lie in the first n bytes of the
// buffer, and returns how many they are. A line that lacks its newline alone is
// whole: the next write begins with one.
func (w *writer) commit(n int) (lines int) {
	if n <= 0 {
		return 0
	}
	torn := !w.tail.torn.empty()
	for lines < len(w.ends) && w.ends[lines].offset <= n {
		lines++
	}
	rest := w.buffer[:n]
	if lines > 0 {
		last := w.ends[lines-1]
		w.tail.chain = last.chain
		rest = rest[min(last.offset+1, n):]
		w.tail.torn = section{}
		events := lines
		if torn {
			events--
		}
		w.tail.events = w.tail.events[min(events, len(w.tail.events)):]
		w.saver.committed(&w.tail.chain)
	} else if !torn && w.tail.unsealed {
		rest = rest[1:] // the newline that ends the last record
	}
	w.tail.unsealed = w.buffer[n-1] != '\n'
	if len(rest) > 0 {
		w.tail.torn.add(rest, false)
	}
	return lines
}
