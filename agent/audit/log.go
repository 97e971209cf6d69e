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
	if c.WriteTimeout < 0 || c.SaveEvery < 0 {
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

	producer producer
	outlets  []*outlet

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
// r and what it points to are read during the call only.
func (l *Log) Write(ctx context.Context, r *Record) error {
	err := l.write(ctx, r)
	if err != nil {
		l.refused.Add(1)
	}
	return err
}

func (l *Log) write(ctx context.Context, r *Record) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("audit record not queued: %w", err)
	}
	e := l.entries.Get().(*entry)
	now := l.cfg.Now()
	own := *r
	own.Log = nil
	e.fields = l.encoder.append(e.fields[:0], &own, now)
	if len(e.fields) > MaxRecordSize {
		return fmt.Errorf("%w: %d bytes; %d are the limit", ErrTooLong, len(e.fields), MaxRecordSize)
	}
	if err := l.enqueue(e); err != nil {
		return l.fault(err)
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
	l.mu.Lock()
	defer l.mu.Unlock()
	l.status.LastError, l.status.LastErrorTime, l.status.Failing = err.Error(), now, true
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
	s.Refused, s.Queued = l.refused.Load(), len(l.queue)
	for _, o := range l.outlets {
		s.Sinks = append(s.Sinks, o.state())
	}
	return s
}

// Close writes the records that wait, stores the state and closes the sink. It
// waits for WriteTimeout at most; a sink that blocks longer is left behind and
// reported. Later calls return the same.
func (l *Log) Close() error {
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
	return l.closing
}
