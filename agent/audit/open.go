package audit

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"
)

const (
	initialKeyName = "audit-initial.key"
	contextKeyName = "audit-context.key"
)

// Open opens the log of cfg and follows its chain to the end. The first time,
// it makes the chain and writes its initial key: Notes then says to move that
// key to the verifier. It fails with ErrInUse, ErrGap, ErrTampered or ErrState;
// a sink that cannot be written is no failure of Open but of each Write, so
// that an agent with a full disk starts and says so.
func Open(cfg Config) (*Log, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	state, err := openState(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	l := &Log{
		coalescer: coalescer{
			window: cfg.CoalesceDenials, table: map[denialKey]*denial{}, wake: make(chan struct{}, 1), ended: make(chan struct{}),
		},
		cfg: cfg, wake: make(chan struct{}, 1), ended: make(chan struct{}), entries: sync.Pool{New: newEntry},
	}
	if err := l.open(state); err != nil {
		return nil, errors.Join(err, state.close())
	}
	return l, nil
}

func (l *Log) open(state *stateFile) error {
	var err error
	if l.encoder, err = newEncoder(l.cfg); err != nil {
		return err
	}
	sink, f, err := l.openSink()
	if err != nil {
		return err
	}
	t, stored, err := l.openChain(state, f)
	if err != nil {
		return errors.Join(err, sink.Close())
	}
	if err := l.openOutlets(); err != nil {
		return errors.Join(err, sink.Close())
	}
	l.producer.chain = state.id
	l.notes = append(l.notes, t.notes...)
	l.status = Status{Path: sink.String(), Chain: state.id, Sequence: t.chain.next - 1}
	l.saver = saver{state: state, sink: sink, every: l.cfg.SaveEvery, after: l.cfg.SaveRecords, fault: l.fault,
		checkpoints: l.checkpoints, checkpointEvery: l.cfg.CheckpointEvery, now: l.cfg.Now}
	l.writer = writer{
		tail: *t, sink: sink, file: f, durable: l.cfg.Durable,
		encoder: l.encoder, now: l.cfg.Now, saver: &l.saver, rotationFault: l.rotationFault, wrote: l.wrote,
		outlets: l.outlets, unrecorded: &l.unrecorded,
	}
	l.saver.start(stored)
	if l.checkpoints != nil {
		go l.checkpoints.run()
	}
	if l.coalescer.window > 0 {
		go l.summarize()
	}
	for _, o := range l.outlets {
		if o.required {
			close(o.ended)
		} else {
			go o.run()
		}
	}
	begun := make(chan struct{})
	go l.run(begun)
	timer := time.NewTimer(l.cfg.WriteTimeout)
	defer timer.Stop()
	select {
	case <-begun:
	case <-timer.C: // the sink blocks: every Write will say so
	}
	return nil
}

func newEncoder(cfg Config) (encoder, error) {
	e := encoder{values: cfg.ContextValues}
	if cfg.ContextValues != ContextHMAC {
		return e, nil
	}
	var err error
	e.key, _, err = readOrCreateKey(filepath.Join(cfg.StateDir, contextKeyName))
	if err != nil {
		return e, fmt.Errorf("key for the context values of audit records: %w", err)
	}
	return e, nil
}

func (l *Log) openSink() (Sink, *file, error) {
	if l.cfg.Sink != nil {
		return l.cfg.Sink, nil, nil
	}
	if l.cfg.Path == Stdout {
		s, err := openStdout()
		return s, nil, err
	}
	f, err := openFile(l.cfg.Path, l.cfg.Mode, l.cfg.Rotation, l.cfg.Now)
	if err != nil {
		return nil, nil, err
	}
	return f, f, nil
}

// openChain finds the chain's end, or makes a new chain, and marks the state as
// that of an open log.
func (l *Log) openChain(state *stateFile, f *file) (t *tail, stored chain, err error) {
	saved, found, err := state.load()
	if err != nil {
		return nil, stored, err
	}
	switch {
	case !found:
		t, err = l.beginChain(state, f)
	case f != nil:
		t, err = recoverTail(f, saved)
	case saved.Closed:
		t = &tail{}
		t.chain, err = saved.chain()
	default:
		t, err = skipped(saved, saved.Sequence+1, "the agent ended unexpectedly, and the sink cannot be read back")
	}
	if err != nil {
		return nil, stored, err
	}
	if t.chain.next == 1 {
		t.events = []*Record{{Kind: KindEvent, Operation: EventStarted, Log: &LogEvent{Chain: state.id}}}
	}
	if path := l.initialKeyPath(); found && exists(path) {
		l.notes = append(l.notes, fmt.Sprintf("the initial key of the audit chain still is in %s: "+
			"move it to where audit logs are verified, so that nobody on this host can forge old records", path))
	}
	if f != nil {
		// What was found is durable before the state says so.
		if err := f.Sync(); err != nil {
			return nil, stored, fmt.Errorf("sync audit log %s: %w", f, err)
		}
	}
	stored = t.chain
	if t.skipped {
		// The record of the gap is not written yet: until it is, the gap
		// begins where it began.
		if stored, err = saved.chain(); err != nil {
			return nil, stored, fmt.Errorf("%w: %w", ErrState, err)
		}
	}
	return t, stored, state.save(&stored, false)
}

func (l *Log) initialKeyPath() string {
	if l.cfg.InitialKeyPath != "" {
		return l.cfg.InitialKeyPath
	}
	return filepath.Join(l.cfg.StateDir, initialKeyName)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// beginChain makes a new chain, from the key that lies ready or a new one.
func (l *Log) beginChain(state *stateFile, f *file) (*tail, error) {
	if f != nil && f.size > 0 {
		return nil, fmt.Errorf("%w: the log %s exists, the state in %s does not. Restore the state directory; "+
			"if it is lost, move the log and its initial key away, and a new chain begins", ErrState, f, l.cfg.StateDir)
	}
	path := l.initialKeyPath()
	key, created, err := readOrCreateKey(path)
	if err != nil {
		return nil, fmt.Errorf("initial key of the audit chain: %w", err)
	}
	c, err := newChain(key)
	if err != nil {
		return nil, err
	}
	state.id = c.id()
	how := "was found"
	if created {
		how = "is new"
	}
	return &tail{chain: c, notes: []string{fmt.Sprintf("audit chain %s begins; its initial key %s in %s: "+
		"move it to where audit logs are verified, so that nobody on this host can forge old records", state.id, how, path)}}, nil
}

// AcceptGap lets a log go on that Open refuses with ErrGap or ErrTampered: it
// writes a record that says which records may be missing, with reason, and
// stores the state behind it. The gap begins after the last record that the log
// holds or, when it holds none, the files beside it; Open need not have trusted
// that record. It is an administrator's decision; no agent may have the log
// open. Verification reports the gap for ever.
func AcceptGap(cfg Config, reason string) error {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return err
	}
	if cfg.Sink != nil || cfg.Path == Stdout {
		return errors.New("a gap is accepted in a log file; a stream writes its own")
	}
	state, err := openState(cfg.StateDir)
	if err != nil {
		return err
	}
	f, err := openFile(cfg.Path, cfg.Mode, Rotation{}, cfg.Now)
	if err != nil {
		return errors.Join(err, state.close())
	}
	return errors.Join(acceptGap(cfg, state, f, reason), f.Close(), state.close())
}

func acceptGap(cfg Config, state *stateFile, f *file, reason string) error {
	saved, found, err := state.load()
	if err != nil {
		return err
	}
	if !found {
		return fmt.Errorf("%w: there is no state in %s, so that no chain can go on", ErrState, cfg.StateDir)
	}
	kept, err := lastKept(f)
	if err != nil {
		return fmt.Errorf("read audit log %s: %w", f, err)
	}
	t, err := skipped(saved, kept+1, reason)
	if err != nil {
		return err
	}
	unsealed, err := endsInside(f.open.Load(), f.size)
	if err != nil {
		return fmt.Errorf("read audit log %s: %w", f, err)
	}
	var line []byte
	if unsealed {
		line = append(line, '\n')
	}
	e := encoder{values: cfg.ContextValues}
	line = append(t.chain.seal(line, e.append(nil, t.events[0], cfg.Now())), '\n')
	if _, err := f.Write(line); err != nil {
		return fmt.Errorf("write the record of the gap: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("write the record of the gap: %w", err)
	}
	return state.save(&t.chain, true)
}
