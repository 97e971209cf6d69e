package audit

import (
	"sync"
	"time"
)

// saver stores the state of the chain behind the writer's back.
type saver struct {
	state *stateFile // for the saver's goroutine alone, once it runs
	sink  Sink
	every time.Duration
	after uint64
	fault func(error) error

	checkpoints     *outlet // nil: none
	checkpointEvery time.Duration
	now             func() time.Time
	told            uint64    // next of the chain at the last checkpoint
	toldAt          time.Time // by the monotonic clock
	tell            *time.Timer

	due      chan struct{}     // something is to be stored; holds one
	full     chan struct{}     // ... and at once; holds one
	requests chan chan<- error // store at once and tell
	ended    chan final        // store for the last time and tell

	mu     sync.Mutex // guards what follows
	latest chain      // the last one committed
	stored uint64     // next of the last one stored
}

func (s *saver) start(c chain) {
	s.due, s.full = make(chan struct{}, 1), make(chan struct{}, 1)
	s.requests, s.ended = make(chan chan<- error), make(chan final)
	s.latest, s.stored = c, c.next
	go s.run()
}

// run stores until stop.
func (s *saver) run() {
	timer := time.NewTimer(s.every)
	timer.Stop()
	s.tell = time.NewTimer(s.every)
	s.tell.Stop()
	defer s.tell.Stop()
	for {
		select {
		case <-s.due:
			timer.Reset(s.every)
		case <-timer.C:
			_ = s.save() // it told the status
		case <-s.tell.C:
			_ = s.save() // it told the status
			s.mu.Lock()
			c, stored := s.latest, s.stored
			s.mu.Unlock()
			if c.next == stored {
				s.checkpoint(&c, false)
			}
		case <-s.full:
			_ = s.save() // it told the status
		case reply := <-s.requests:
			reply <- s.save()
		case f := <-s.ended:
			timer.Stop()
			f.reply <- s.last(f.closed)
			return
		}
	}
}

// save stores what was committed, after the log itself is durable: the state is
// never ahead of it.
func (s *saver) save() error {
	s.mu.Lock()
	c, stored := s.latest, s.stored
	s.mu.Unlock()
	if c.next == stored {
		return nil
	}
	err := s.sink.Sync()
	if err == nil {
		err = s.state.save(&c, false)
	}
	if err != nil {
		signal(s.due) // again, later
		return s.fault(err)
	}
	s.mu.Lock()
	s.stored = c.next
	s.mu.Unlock()
	s.checkpoint(&c, false)
	return nil
}

// checkpoint tells the state that has just been stored, when it is time; last
// says that it is.
func (s *saver) checkpoint(c *chain, last bool) {
	if s.checkpoints == nil || c.next == s.told || c.next == 1 {
		return
	}
	if wait := s.checkpointEvery - time.Since(s.toldAt); !last && !s.toldAt.IsZero() && wait > 0 {
		s.tell.Reset(wait)
		return
	}
	s.told, s.toldAt = c.next, time.Now()
	_ = s.checkpoints.take(c.appendCheckpoint(nil, s.state.id, s.now())) // it waits in memory, or is counted as lost
}

// final asks for the last save; closed says that the log holds all it should.
type final struct {
	closed bool
	reply  chan<- error
}

func (s *saver) last(closed bool) error {
	s.mu.Lock()
	c := s.latest
	s.mu.Unlock()
	err := s.sink.Sync()
	if err == nil {
		err = s.state.save(&c, closed)
	}
	if err == nil {
		s.checkpoint(&c, true)
	}
	if closeErr := s.state.close(); err == nil {
		err = closeErr
	}
	return err
}

// committed tells that the log has everything up to c.
func (s *saver) committed(c *chain) {
	s.mu.Lock()
	s.latest = *c
	ahead := c.next - s.stored
	s.mu.Unlock()
	signal(s.due)
	if ahead >= s.after {
		signal(s.full)
	}
}

// reserve makes sure that n more records do not lead the chain too far from its
// stored state.
func (s *saver) reserve(c *chain, n uint64) error {
	s.mu.Lock()
	ahead := c.next - s.stored
	s.mu.Unlock()
	if ahead+n <= maxUnsaved {
		return nil
	}
	return s.flush()
}

// flush stores what was committed and waits for it.
func (s *saver) flush() error {
	reply := make(chan error, 1)
	s.requests <- reply
	return <-reply
}

// stop stores the state for the last time and ends the goroutine.
func (s *saver) stop(closed bool) error {
	reply := make(chan error, 1)
	s.ended <- final{closed, reply}
	return <-reply
}

// signal makes c ready without waiting.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
