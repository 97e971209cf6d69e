package audit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// ContextValues says how encryption context values are written.
type ContextValues string

// The ways to write encryption context values.
const (
	// ContextKeysOnly writes the names alone. The default.
	ContextKeysOnly ContextValues = "keys"
	// ContextHMAC writes each value as an HMAC-SHA256, cut to 128 bits, under a
	// key that stays in the state directory: equal values of one name can be
	// told, values cannot be read.
	ContextHMAC ContextValues = "hmac"
	// ContextClear writes the values as they are.
	ContextClear ContextValues = "clear"
)

// OnFailure says what becomes of an operation that cannot be recorded.
type OnFailure string

// The answers to a record that cannot be written: no answer (the default), or
// an answer without a record, of which a record says how many there were once
// it can.
const (
	RefuseOnFailure OnFailure = "refuse"
	AnswerOnFailure OnFailure = "answer"
)

// Why a Write was refused. Every error of Log.Write wraps one of these, or the
// error of its context.
var (
	ErrSink      = errors.New("audit record could not be written")
	ErrQueueFull = errors.New("audit queue is full")
	ErrTimeout   = errors.New("audit record was not written in time")
	ErrClosed    = errors.New("audit log is closed")
	ErrTooLong   = errors.New("audit record is too long")
)

// Why Open refuses a log. Each error names the cure.
var (
	// ErrGap: records that the state knows of are not in the log.
	ErrGap = errors.New("audit log lacks records")
	// ErrTampered: lines at the end of the log are not those that were written.
	ErrTampered = errors.New("audit log was changed")
	// ErrInUse: another process has the log or its state open.
	ErrInUse = errors.New("audit log is in use")
	// ErrState: the chain state is missing or unreadable where a log exists.
	ErrState = errors.New("audit state does not fit the log")
)

// Config configures a Log.
type Config struct {
	// Path is the log file, or Stdout. Ignored when Sink is set.
	Path string
	// Sink takes the lines instead of a file; such a log cannot be read back
	// after a crash, so that a record of the gap stands there then.
	Sink Sink
	// OnFailure is one of the constants; empty is RefuseOnFailure.
	OnFailure OnFailure
	// CoalesceDenials is how long equal denials are counted before a record tells
	// how many; 0 writes each.
	CoalesceDenials time.Duration
	// Checkpoints is where the chain's state is told, in JSON whatever its
	// Format, every CheckpointEvery and when the log closes; 0 is a minute. It is
	// no required sink. The zero value is nowhere.
	Checkpoints     SinkConfig
	CheckpointEvery time.Duration
	// Sinks get the records too. They are for those who read them: it is the log
	// that proves itself, and that Open goes on with.
	Sinks []SinkConfig
	// Version is the agent's, for formats that tell it.
	Version string
	// Rotation sets the log file aside when it is large or old.
	Rotation Rotation
	// StateDir is an existing directory of the agent; its files are private.
	StateDir string
	// InitialKeyPath is where the initial key of a new chain is written, or
	// found when the verifier made it; empty is "audit-initial.key" in StateDir.
	InitialKeyPath string
	// Mode of a new log file; 0 is 0600. The umask applies.
	Mode os.FileMode
	// Durable adds one fdatasync per group of records.
	Durable bool
	// WriteTimeout bounds how long a Write waits; 0 is five seconds.
	WriteTimeout time.Duration
	// MaxQueue is how many records may wait, 32768 at most; 0 is 4096.
	MaxQueue int
	// ContextValues is one of the constants; empty is ContextKeysOnly.
	ContextValues ContextValues
	// SaveEvery and SaveRecords say when the evolved key is stored: after that
	// time or that many records. 0 is one second and 16384 records.
	SaveEvery   time.Duration
	SaveRecords uint64
	// Now is the wall clock; nil is time.Now.
	Now func() time.Time
}

const (
	// maxUnsaved bounds how many records a chain may be ahead of its stored
	// state: a later Write waits for the state to be stored.
	maxUnsaved = 1 << 16
	// maxQueuedBytes bounds the memory of the records that wait.
	maxQueuedBytes = 64 << 20
	maxMaxQueue    = maxUnsaved / 2
)

func (c Config) withDefaults() (Config, error) {
	switch c.ContextValues {
	case "":
		c.ContextValues = ContextKeysOnly
	case ContextKeysOnly, ContextHMAC, ContextClear:
	default:
		return c, fmt.Errorf("unknown way %q to write context values; use %q, %q or %q", c.ContextValues, ContextKeysOnly, ContextHMAC, ContextClear)
	}
	if c.MaxQueue < 0 || c.MaxQueue > maxMaxQueue {
		return c, fmt.Errorf("audit queue of %d records; use 1 to %d", c.MaxQueue, maxMaxQueue)
	}
	if c.OnFailure != "" && c.OnFailure != RefuseOnFailure && c.OnFailure != AnswerOnFailure {
		return c, fmt.Errorf("unknown way %q to go on without a record; use %q or %q", c.OnFailure, RefuseOnFailure, AnswerOnFailure)
	}
	if c.WriteTimeout < 0 || c.SaveEvery < 0 || c.CoalesceDenials < 0 || c.CheckpointEvery < 0 {
		return c, errors.New("negative audit timeout or save interval; use a positive duration, or 0 for the default")
	}
	if c.Rotation.MaxSize < 0 || c.Rotation.MaxAge < 0 || c.Rotation.Retention < 0 {
		return c, errors.New("negative size, age or retention of the audit log; use a positive one, or 0 for none")
	}
	for i, s := range c.Sinks {
		if s.Format != "" && s.Format != FormatJSON && s.Format != FormatOCSF {
			return c, fmt.Errorf("unknown format %q of an audit sink; use %q or %q", s.Format, FormatJSON, FormatOCSF)
		}
		c.Sinks = slices.Clone(c.Sinks)
		setDefault(&c.Sinks[i].Format, FormatJSON)
	}
	if c.StateDir == "" || (c.Path == "" && c.Sink == nil) {
		return c, errors.New("audit needs a path for the log and a state directory")
	}
	setDefault(&c.WriteTimeout, 5*time.Second)
	setDefault(&c.MaxQueue, 4096)
	setDefault(&c.SaveEvery, time.Second)
	setDefault(&c.SaveRecords, 16384)
	setDefault(&c.CheckpointEvery, time.Minute)
	setDefault(&c.Mode, 0o600)
	if c.Now == nil {
		c.Now = time.Now
	}
	return c, nil
}

func setDefault[V comparable](v *V, value V) {
	var zero V
	if *v == zero {
		*v = value
	}
}

// Status is the state of a Log.
type Status struct {
	// Path is the log file, or the name of the sink.
	Path string
	// Chain identifies the initial key, as verification reports it.
	Chain string
	// Sequence is that of the last record written; 0 when there is none.
	Sequence uint64
	// Queued is how many records wait.
	Queued int
	// Refused counts the records that could not be written since Open.
	Refused uint64
	// LastError is the last fault and when it was; Failing says that nothing
	// was written since.
	LastError     string
	LastErrorTime time.Time
	Failing       bool
	// Unrecorded counts the operations that were answered without a record, which
	// only happens with AnswerOnFailure, and Coalesced the denials that were
	// counted instead of being written, since Open.
	Unrecorded, Coalesced uint64
	// Checkpoints is the sink of the checkpoints, whose records they are; nil
	// where none are configured.
	Checkpoints *SinkStatus
	// Sinks are the further sinks, in the order of their configuration.
	Sinks []SinkStatus
	// RotationError is why the log could not be set aside or a file that has
	// expired could not be deleted; empty when all is well. Records are written
	// all the same.
	RotationError string
}

// Log writes records. It is safe for concurrent use.
type Log struct {
	cfg     Config
	encoder encoder
	notes   []string
	entries sync.Pool // of *entry
	refused atomic.Uint64

	// failing is status.Failing, stuck that a write has timed out since one ended.
	failing, stuck atomic.Bool
	unrecorded     atomic.Uint64
	coalescer      coalescer

	producer producer
	outlets  []*outlet
	// checkpoints is nil where none are configured.
	checkpoints *outlet

	wake   chan struct{} // the queue is not empty, or the log closes; holds one
	ended  chan struct{} // closed when the writer has ended
	writer writer
	saver  saver

	mu      sync.Mutex // guards what follows
	queue   []*entry
	queued  int // bytes in queue
	closed  bool
	status  Status // but Refused and Queued
	closing error  // of Close, once ended

	summarized sync.Once
	uncounted  error // of the last summaries, once summarized
}

// Notes are sentences for the operator's log: what Open found and did.
func (l *Log) Notes() []string { return l.notes }

// Write writes r and returns nil only when the kernel has it (with Durable:
// when it is on disk); r.Sequence and, if it was zero, r.Time are set then. Any
// error means that the operation must not be answered. A context that ends
// before the record is queued stops it; a queued record is no longer stopped by
// its context, only WriteTimeout ends the wait. After ErrTimeout, and after a
// failed sync with Durable, the record may stand in the log all the same.
//
// There are two exceptions, both by configuration. With CoalesceDenials, a
// denial whose equal is on record is counted, and r.Sequence stays as it is;
// not while records cannot be written. With AnswerOnFailure, nil may mean that
// there is no record, and this is counted.
//
// r and what it points to are read during the call only.
func (l *Log) Write(ctx context.Context, r *Record) error {
	coalescible := l.coalescer.coalescible(r)
	if coalescible && !l.failing.Load() && l.coalescer.add(r, l.timeOf(r)) {
		return nil
	}
	err := l.write(ctx, r)
	switch {
	case err == nil && coalescible:
		l.coalescer.wrote(r)
	case err != nil && l.mayAnswer(ctx, err):
		l.unrecorded.Add(1)
		return nil
	case err != nil:
		l.refused.Add(1)
	}
	return err
}

func (l *Log) timeOf(r *Record) time.Time {
	if r.Time.IsZero() {
		return l.cfg.Now()
	}
	return r.Time
}

// mayAnswer says whether an operation whose record failed with err is answered
// all the same. What a caller could bring about alone is not.
func (l *Log) mayAnswer(ctx context.Context, err error) bool {
	return l.cfg.OnFailure == AnswerOnFailure && ctx.Err() == nil && !errors.Is(err, ErrTooLong) && !errors.Is(err, ErrClosed)
}

func (l *Log) write(ctx context.Context, r *Record) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("audit record not queued: %w", err)
	}
	if l.cfg.OnFailure == AnswerOnFailure && l.stuck.Load() {
		return fmt.Errorf("%w: an earlier write still blocks", ErrTimeout)
	}
	now := l.cfg.Now()
	e, err := l.queueRecord(r, now)
	if err != nil {
		return err
	}
	if err := l.wait(e); err != nil {
		return err
	}
	r.Sequence = e.sequence
	if r.Time.IsZero() {
		r.Time = now.UTC()
	}
	l.recycle(e)
	return nil
}

// queueRecord hands a record to the writer.
func (l *Log) queueRecord(r *Record, now time.Time) (*entry, error) {
	e := l.entries.Get().(*entry)
	own := *r
	own.Log = nil
	e.fields = l.encoder.append(e.fields[:0], &own, now)
	if len(e.fields) > MaxRecordSize {
		return nil, fmt.Errorf("%w: %d bytes; %d are the limit", ErrTooLong, len(e.fields), MaxRecordSize)
	}
	if err := l.enqueue(e); err != nil {
		return nil, l.fault(err)
	}
	return e, nil
}

// maxRecycled is the largest buffer that is kept for another record.
const maxRecycled = 16 << 10

func (l *Log) recycle(e *entry) {
	if cap(e.fields) <= maxRecycled {
		e.state.Store(entryWaiting)
		l.entries.Put(e)
	}
}

func (l *Log) enqueue(e *entry) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return ErrClosed
	}
	if len(l.queue) >= l.cfg.MaxQueue || l.queued+len(e.fields) > maxQueuedBytes {
		return fmt.Errorf("%w: %d records wait; the sink %s is too slow", ErrQueueFull, len(l.queue), l.status.Path)
	}
	l.queue = append(l.queue, e)
	l.queued += len(e.fields)
	if len(l.queue) == 1 {
		l.wakeWriter()
	}
	return nil
}

func (l *Log) wakeWriter() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// wait waits for the writer. An entry that timed out is not used again.
func (l *Log) wait(e *entry) error {
	e.timer.Reset(l.cfg.WriteTimeout)
	select {
	case err := <-e.result:
		e.timer.Stop()
		return err
	case <-e.timer.C:
		after := "it may still be written"
		if e.state.CompareAndSwap(entryWaiting, entryAbandoned) {
			after = "it was not written"
		}
		l.stuck.Store(true)
		return l.fault(fmt.Errorf("%w: waited %v for %s; %s", ErrTimeout, l.cfg.WriteTimeout, l.statusPath(), after))
	}
}

func (l *Log) statusPath() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.status.Path
}

// fault remembers err for Status and returns it.
func (l *Log) fault(err error) error {
	now := l.cfg.Now()
	l.failing.Store(true)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.status.LastError, l.status.LastErrorTime = err.Error(), now
	return err
}

// rotationFault remembers err, or that there is none, for Status.
func (l *Log) rotationFault(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.status.RotationError = ""
	if err != nil {
		l.status.RotationError = err.Error()
	}
}

// Status returns the state.
func (l *Log) Status() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.status
	s.Failing = l.failing.Load()
	s.Refused, s.Queued = l.refused.Load(), len(l.queue)
	s.Unrecorded, s.Coalesced = l.unrecorded.Load(), l.coalescer.counted()
	if l.checkpoints != nil {
		c := l.checkpoints.state()
		s.Checkpoints = &c
	}
	for _, o := range l.outlets {
		s.Sinks = append(s.Sinks, o.state())
	}
	return s
}

// Close writes the records that wait, stores the state and closes the sinks. It
// waits for twice WriteTimeout at most; a sink that blocks longer is left behind
// and reported. Later calls return the same.
func (l *Log) Close() error {
	l.summarized.Do(func() { l.uncounted = l.coalescer.finish() })
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		l.wakeWriter()
	}
	l.mu.Unlock()
	timer := time.NewTimer(l.cfg.WriteTimeout)
	defer timer.Stop()
	select {
	case <-l.ended:
	case <-timer.C:
		return fmt.Errorf("close audit log: %w: the sink %s blocks", ErrTimeout, l.statusPath())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return errors.Join(l.closing, l.uncounted)
}
