package audit

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// Format is how a sink's lines look.
type Format string

// The formats.
const (
	// FormatJSON is the lines of the log itself, chain included: a copy can be
	// verified as the log can. The default.
	FormatJSON Format = "json"
	// FormatOCSF is one event of the Open Cybersecurity Schema Framework per
	// record; docs/audit.md has the mapping.
	FormatOCSF Format = "ocsf"
)

// SinkConfig is one more place for the records of a log. One of File, Syslog and
// Sink is set.
type SinkConfig struct {
	// File is the path of a file, or Stdout. It is rotated as the log is.
	File string
	// Syslog is the path of a syslog daemon's Unix socket, such as /dev/log.
	Syslog string
	// Sink is anything else that takes lines.
	Sink   Sink
	Format Format
	// Required: no record here, no answer. Records for a sink that is not
	// required wait in memory while it does not take them, to a bound; what does
	// not fit is lost, and counted.
	Required bool
}

// SinkStatus is the state of one of a log's further sinks.
type SinkStatus struct {
	Name     string
	Format   Format
	Required bool
	// Written counts the records that the sink has, Lost those that it will
	// never have, since Open.
	Written, Lost uint64
	// LastError is why the sink takes no records now; empty when it does.
	LastError string
}

const (
	// maxBacklog bounds what waits for a sink that is not required, in bytes.
	maxBacklog = 16 << 20
	// outletRetry is how long a sink that failed is left alone.
	outletRetry = time.Second
	// leaveBehind is how long a write may take to notice that it is over.
	leaveBehind = 100 * time.Millisecond
)

// outlet brings records to one further sink.
type outlet struct {
	sink     Sink
	format   Format
	syslog   bool
	required bool
	producer *producer

	// backlog is formatted and not taken yet. It belongs to the writer of a
	// required sink, and to the outlet's own goroutine elsewhere.
	backlog []byte

	mu      sync.Mutex // guards what follows
	queue   []byte     // lines of the log; for a sink that is not required
	closing bool
	status  SinkStatus

	wake  chan struct{} // holds one
	stop  chan struct{} // closed when it is time to give up
	ended chan struct{}
}

func (l *Log) openOutlets() error {
	host, err := os.Hostname()
	if err != nil || host == "" {
		host = "localhost"
	}
	l.producer = producer{host: host, version: l.cfg.Version, pid: os.Getpid()}
	for _, c := range l.cfg.Sinks {
		o, err := l.newOutlet(c)
		if err != nil {
			return err
		}
		l.outlets = append(l.outlets, o)
	}
	if c := l.cfg.Checkpoints; c != (SinkConfig{}) {
		c.Format, c.Required = FormatJSON, false
		l.checkpoints, err = l.newOutlet(c)
	}
	return err
}

func (l *Log) newOutlet(c SinkConfig) (*outlet, error) {
	sink, err := l.cfg.openSink(c, l.rotationFault)
	if err != nil {
		return nil, err
	}
	return &outlet{
		sink: sink, format: c.Format, syslog: c.Syslog != "", required: c.Required, producer: &l.producer,
		wake: make(chan struct{}, 1), stop: make(chan struct{}), ended: make(chan struct{}),
		status: SinkStatus{Name: sink.String(), Format: c.Format, Required: c.Required},
	}, nil
}

func (c Config) openSink(s SinkConfig, fault func(error)) (Sink, error) {
	switch {
	case s.Sink != nil:
		return s.Sink, nil
	case s.Syslog != "":
		return &syslogSink{path: s.Syslog, timeout: c.WriteTimeout}, nil
	case s.File == Stdout:
		return openStdout()
	}
	return &copyFile{file: file{path: s.File, mode: c.Mode, rotation: c.Rotation, now: c.Now}, fault: fault}, nil
}

// take brings whole lines of the log, without the last newline, on their way.
// For a required sink it returns nil only when the sink has them.
func (o *outlet) take(lines []byte) error {
	if o.required {
		if err := o.render(lines); err != nil {
			return o.fault(err)
		}
		return o.flush()
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.queue)+len(lines) > maxBacklog {
		o.status.Lost += countOf(lines) + 1
		return nil
	}
	o.queue = append(append(o.queue, lines...), '\n')
	signal(o.wake)
	return nil
}

// flush hands the backlog to the sink.
func (o *outlet) flush() error {
	if len(o.backlog) == 0 {
		return nil
	}
	n, err := o.sink.Write(o.backlog)
	written := countOf(o.backlog[:n])
	if err == nil && n < len(o.backlog) {
		err = fmt.Errorf("%s took %d of %d bytes", o.sink, n, len(o.backlog))
	}
	o.backlog = append(o.backlog[:0], o.backlog[n:]...)
	if len(o.backlog) == 0 && cap(o.backlog) > maxKeptBuffer {
		o.backlog = nil
	}
	o.mu.Lock()
	o.status.Written += written
	if err == nil {
		o.status.LastError = ""
	}
	o.mu.Unlock()
	return o.fault(err)
}

func (o *outlet) fault(err error) error {
	if err == nil {
		return nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.status.LastError = err.Error()
	return err
}

// render adds lines to the backlog in the sink's format.
func (o *outlet) render(lines []byte) error {
	if o.format == FormatJSON && !o.syslog {
		o.backlog = append(append(o.backlog, lines...), '\n')
		return nil
	}
	for line := range bytes.SplitSeq(lines, []byte("\n")) {
		if c, ok := parseCheckpoint(line); ok && bytes.HasPrefix(line, []byte(checkpointPrefix)) {
			about := Record{Kind: "checkpoint", Time: c.Time, Operation: "audit-checkpoint"}
			o.backlog = append(append(o.producer.appendSyslog(o.backlog, &about, c.Sequence), line...), '\n')
			continue
		}
		s, ok := parseLine(line)
		if !ok {
			return errors.New("a line of the log is no record")
		}
		r, err := s.record()
		if err != nil {
			return fmt.Errorf("read record %d: %w", s.sequence, err)
		}
		if o.syslog {
			o.backlog = o.producer.appendSyslog(o.backlog, &r, s.sequence)
		}
		if o.format == FormatOCSF {
			if line, err = o.producer.ocsf(&r, s); err != nil {
				return err
			}
		}
		o.backlog = append(append(o.backlog, line...), '\n')
	}
	return nil
}

// run brings records to a sink that is not required, until close.
func (o *outlet) run() {
	defer close(o.ended)
	var lines []byte
	for closing := false; !closing; {
		select {
		case <-o.wake:
		case <-o.stop:
			return
		}
		o.mu.Lock()
		lines, o.queue, closing = o.queue, lines[:0], o.closing
		o.mu.Unlock()
		if len(lines) > 0 {
			if err := o.render(lines[:len(lines)-1]); err != nil {
				_ = o.fault(err) // it stands in the status
			}
		}
		if !o.persist() {
			return
		}
		if cap(lines) > maxKeptBuffer {
			lines = nil
		}
	}
}

// persist tries until the sink has the backlog; it returns false when it is time
// to give up.
func (o *outlet) persist() bool {
	for o.flush() != nil {
		retry := time.NewTimer(outletRetry)
		select {
		case <-retry.C:
		case <-o.stop:
			retry.Stop()
			return false
		}
	}
	return true
}

// closeOutlets ends the outlets. What a sink that is not required has not taken
// within the time is lost; one that blocks is left behind.
func closeOutlets(outlets []*outlet, within time.Duration) {
	for _, o := range outlets {
		o.mu.Lock()
		o.closing = true
		o.mu.Unlock()
		signal(o.wake)
	}
	timer := time.AfterFunc(within, func() {
		for _, o := range outlets {
			close(o.stop)
		}
	})
	defer timer.Stop()
	for _, o := range outlets {
		o.close()
	}
}

// close waits for the end of what closeOutlets has begun.
func (o *outlet) close() {
	select {
	case <-o.ended:
	case <-o.stop:
		blocked := time.NewTimer(leaveBehind)
		defer blocked.Stop()
		select {
		case <-o.ended:
		case <-blocked.C: // in a write that does not return
			return
		}
	}
	lost := countOf(o.queue) + countOf(o.backlog)
	err := o.sink.Close()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.status.Lost += lost
	if err != nil {
		o.status.LastError = err.Error()
	}
}

// countOf counts the lines of text that have an end.
func countOf(text []byte) uint64 { return uint64(bytes.Count(text, []byte("\n"))) }

func (o *outlet) state() SinkStatus {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.status
}

// copyFile is the sink for a file beside the log. It is opened when it is
// written first, and again when it was moved away.
type copyFile struct {
	file
	maintained time.Time
	failed     bool // the last rotation did
	fault      func(error)
}

// Write appends to the file that stands at the path now.
func (c *copyFile) Write(p []byte) (int, error) {
	if c.open.Load() == nil {
		if err := c.begin(); err != nil {
			return 0, err
		}
	}
	moved, _, err := c.look()
	if err != nil {
		return 0, err
	}
	if moved {
		if err := c.begin(); err != nil {
			return 0, err
		}
	}
	c.maintain()
	return c.file.Write(p)
}

// maintain sets the file aside and deletes what has expired. What fails here
// stops no record.
func (c *copyFile) maintain() {
	now := c.now()
	lately := now.Sub(c.maintained).Abs() < maintainEvery
	if lately && (c.failed || !c.due(now)) {
		return
	}
	c.maintained = now
	var err error
	if c.due(now) {
		err = errors.Join(c.Sync(), c.rotate(now))
	}
	c.failed = err != nil
	files, listErr := c.expired(now)
	err = errors.Join(err, listErr)
	for _, f := range files {
		if looksWritten(f.name) {
			err = errors.Join(err, os.Remove(f.name))
		}
	}
	if err != nil {
		c.fault(err)
	}
}

// looksWritten says whether a file begins like what a sink writes.
func looksWritten(name string) bool {
	f, err := os.Open(name)
	if err != nil {
		return false
	}
	begin := make([]byte, 1)
	_, err = f.Read(begin)
	return errors.Join(err, f.Close()) == nil && begin[0] == '{'
}

// begin opens the file; a line that a crash left unfinished is ended.
func (c *copyFile) begin() error {
	if err := c.reopen(); err != nil {
		return err
	}
	unsealed, err := endsInside(c.open.Load(), c.size)
	if err == nil && unsealed {
		_, err = c.file.Write([]byte("\n"))
	}
	return err
}

// Sync makes the file durable.
func (c *copyFile) Sync() error {
	if c.open.Load() == nil {
		return nil
	}
	return c.file.Sync()
}

// Close closes the file.
func (c *copyFile) Close() error {
	if c.open.Load() == nil {
		return nil
	}
	return c.file.Close()
}
