package seal

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"sync"
)

// Store is a file of records under a sealer. One process at a time has it.
// Methods may be called concurrently.
//
// Each Save moves the sealer's counter by one, the first after OpenStore by
// two. A state is in force once Save has returned: only then may anything be
// done that a rollback must not undo, such as the use of reserved messages. A
// crash in the middle leaves the state before or the one that was being saved.
//
// A TPM's counter is in memory that wears: count on 100,000 writes. Ten minutes
// between two Saves are 53,000 a year; what only becomes stricter by being
// older, such as the time of a confirmation, can wait for the next Save that is
// needed.
type Store struct {
	path   string
	sealer Sealer

	mu   sync.Mutex // guards what follows, and the sealer
	lock *os.File   // nil: closed
	// settled is false while a file may exist, perhaps in somebody's backup, that
	// was written for the counter's next value, but did not come into force.
	settled bool
}

// Loaded is the content of a store, in protected memory.
type Loaded struct {
	Records []Record // nothing may use the values after Free
	memory  *Memory
}

// Free clears the records.
func (l *Loaded) Free() {
	l.memory.Free()
	l.Records = nil
}

// OpenStore takes the store at path, which need not exist yet, for this
// process. The directory must. A store in use wraps ErrBusy. The sealer stays
// the caller's, who closes it after the store.
func OpenStore(path string, sealer Sealer) (*Store, error) {
	abs, err := filepath.Abs(path)
	if err != nil || path == "" {
		return nil, fmt.Errorf("sealed store %q: %w: give the path of a file", path, ErrAccess)
	}
	if err := checkDirectory(filepath.Dir(abs)); err != nil {
		return nil, fmt.Errorf("sealed store %s: %w", abs, err)
	}
	locked, err := lock(abs)
	if err != nil {
		return nil, fmt.Errorf("sealed store %s: %w", abs, err)
	}
	return &Store{path: abs, sealer: sealer, lock: locked}, nil
}

// Close lets other processes have the store. A second call does nothing.
func (s *Store) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lock != nil {
		_ = s.lock.Close()
		s.lock = nil
	}
}

// Load returns what was saved last. A store that was never saved wraps
// ErrNotExist. One that is refused stays where it is until the next Save.
func (s *Store) Load() (*Loaded, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, err := s.load()
	if err != nil {
		return nil, fmt.Errorf("sealed store %s: %w", s.path, err)
	}
	return l, nil
}

func (s *Store) load() (*Loaded, error) {
	if s.lock == nil {
		return nil, fmt.Errorf("%w: it is closed", ErrAccess)
	}
	file, err := readPrivate(s.path, maxFile)
	if err != nil {
		return nil, err
	}
	e, err := parseFile(file)
	if err != nil {
		return nil, err
	}
	memory, err := NewMemory(len(e.sealed))
	if err != nil {
		return nil, err
	}
	content, err := s.sealer.Open(memory.Bytes()[:0], e.sealed, e.aad)
	if err == nil {
		err = s.checkCounter(e.counter)
	}
	var records []Record
	if err == nil {
		records, err = parseContent(content)
	}
	if err != nil {
		memory.Free()
		return nil, err
	}
	return &Loaded{Records: records, memory: memory}, nil
}

// checkCounter refuses every state but the newest, or the one after it, which a
// crash has kept from coming into force.
func (s *Store) checkCounter(written uint64) error {
	now, err := s.sealer.Counter()
	switch {
	case err != nil:
		return err
	case written < now:
		return fmt.Errorf("%w: it was written as state %d, but %s has counted to %d: an older copy was put in its place",
			ErrRolledBack, written, s.sealer, now)
	case written-now > 1:
		return fmt.Errorf("%w: it was written as state %d, but %s has counted to %d only: the counter was put back",
			ErrRolledBack, written, s.sealer, now)
	default:
		return nil
	}
}

// Save replaces the content by the records, durably, and makes all that was
// saved before unusable. The records stay the caller's.
func (s *Store) Save(records []Record) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.save(records); err != nil {
		return fmt.Errorf("sealed store %s: %w", s.path, err)
	}
	return nil
}

func (s *Store) save(records []Record) error {
	if s.lock == nil {
		return fmt.Errorf("%w: it is closed", ErrWrite)
	}
	size, err := contentSize(records)
	if err != nil {
		return err
	}
	memory, err := NewMemory(size)
	if err != nil {
		return err
	}
	defer memory.Free()
	content := appendContent(memory.Bytes()[:0], records)
	if !s.settled {
		// A file for the next value may exist: go past it, so that it cannot take
		// the place of what this call puts in force.
		if err := s.commit(content); err != nil {
			return err
		}
	}
	s.settled = false
	if err := s.commit(content); err != nil {
		return err
	}
	s.settled = true
	return nil
}

// commit writes content for the counter's next value, then moves the counter.
func (s *Store) commit(content []byte) error {
	now, err := s.sealer.Counter()
	if err != nil {
		return err
	}
	file, err := s.sealFile(content, now+1)
	if err != nil {
		return err
	}
	if err := writeFile(s.path, file); err != nil {
		return err
	}
	got, err := s.sealer.Advance()
	if err != nil {
		return err
	}
	if got != now+1 {
		return fmt.Errorf("%w: %s went from %d to %d: something else uses it too: give each agent its own", ErrWrite, s.sealer, now, got)
	}
	return nil
}

func (s *Store) sealFile(content []byte, counter uint64) ([]byte, error) {
	file := make([]byte, 0, headerSize+len(content)+Overhead+checksumSize)
	file = appendHeader(file, counter)
	aad := file[:lengthAt:lengthAt]
	file = append(file, 0, 0, 0, 0)
	file, err := s.sealer.Seal(file, content, aad)
	if err != nil {
		return nil, err
	}
	sealed := len(file) - headerSize
	if sealed > len(content)+Overhead {
		return nil, fmt.Errorf("%w: the sealer added %d bytes", ErrWrite, sealed-len(content))
	}
	binary.BigEndian.PutUint32(file[lengthAt:], uint32(sealed))
	sum := sha256.Sum256(file)
	return append(file, sum[:]...), nil
}
