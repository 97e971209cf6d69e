package cache

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// The kinds of protected memory, best first.
const (
	kindSecret = "memfd_secret"
	kindLocked = "mlock"
)

// arena is protected memory outside the Go heap, in slots of DataKeySize bytes:
// never swapped, not in core dumps, zero where it is free. memfd_secret pages
// are moreover out of the reach of other processes, ptrace and the kernel's own
// mapping.
type arena struct {
	kind string
	size int // bytes
	// slots is how many data keys fit in.
	slots int

	mu     sync.Mutex // guards what follows
	memory []byte     // nil when it is closed and nothing in it is in use
	free   []int      // slots given back
	next   int        // the first slot that was never used
	used   int
	closed bool
}

// newArena reserves slots and makes sure that the memory is there. It fails
// where the limit for locked memory is too small.
func newArena(slots int) (*arena, error) {
	page := unix.Getpagesize()
	size := (slots*DataKeySize + page - 1) / page * page
	memory, kind, err := protectedMemory(size)
	if err != nil {
		return nil, memoryError(size, err)
	}
	return &arena{kind: kind, size: size, slots: slots, memory: memory}, nil
}

func protectedMemory(size int) ([]byte, string, error) {
	if memory, err := secretMemory(size); err == nil {
		return memory, kindSecret, nil
	}
	memory, err := lockedMemory(size)
	return memory, kindLocked, err
}

// lockedMemory is for kernels that have nothing better.
func lockedMemory(size int) ([]byte, error) {
	memory, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	if err := unix.Mlock(memory); err != nil {
		return nil, errors.Join(fmt.Errorf("mlock: %w", err), unix.Munmap(memory))
	}
	for _, advice := range []int{unix.MADV_DONTDUMP, unix.MADV_WIPEONFORK} {
		if err := unix.Madvise(memory, advice); err != nil {
			return nil, errors.Join(fmt.Errorf("madvise: %w", err), unix.Munmap(memory))
		}
	}
	return memory, nil
}

// secretMemory fails where the kernel has no memfd_secret, or has it turned off.
func secretMemory(size int) ([]byte, error) {
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }() // the mapping outlives it
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, err
	}
	memory, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	clear(memory) // the kernel finds the pages now, not in the middle of a request
	return memory, err
}

func memoryError(size int, err error) error {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) == nil && limit.Cur < uint64(size) {
		return fmt.Errorf("cache: %d bytes of locked memory are needed for the configured data keys and RLIMIT_MEMLOCK allows %d: "+
			"raise it (LimitMEMLOCK= in the systemd unit, ulimit -l in a shell) or lower cache.max_entries: %w", size, limit.Cur, err)
	}
	return fmt.Errorf("cache: reserve %d bytes of locked memory: %w", size, err)
}

// secret is one data key in an arena. It is destroyed when its last reference
// is released.
type secret struct {
	arena *arena
	slot  int
	bytes []byte
	refs  atomic.Int32
}

// put copies a data key into a free slot, with one reference, and clears key.
func (a *arena) put(key []byte) (*secret, error) {
	defer clear(key)
	if len(key) != DataKeySize {
		return nil, fmt.Errorf("cache: a data key of %d bytes; it must be %d", len(key), DataKeySize)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, ErrClosed
	}
	slot, ok := a.takeLocked()
	if !ok {
		return nil, ErrMemory
	}
	s := &secret{arena: a, slot: slot, bytes: a.memory[slot*DataKeySize : (slot+1)*DataKeySize : (slot+1)*DataKeySize]}
	s.refs.Store(1)
	inSecret(func() { copy(s.bytes, key) })
	return s, nil
}

func (a *arena) takeLocked() (slot int, ok bool) {
	switch n := len(a.free); {
	case n > 0:
		slot, a.free = a.free[n-1], a.free[:n-1]
	case a.next < a.slots:
		slot = a.next
		a.next++
	default:
		return 0, false
	}
	a.used++
	return slot, true
}

func (s *secret) hold() { s.refs.Add(1) }

// release gives one reference back; the last one zeroes the slot.
func (s *secret) release() {
	switch left := s.refs.Add(-1); {
	case left > 0:
		return
	case left < 0:
		panic("cache: a data key was released twice") // its slot may be another's by now
	}
	clear(s.bytes)
	a := s.arena
	a.mu.Lock()
	defer a.mu.Unlock()
	a.free = append(a.free, s.slot)
	a.used--
	a.unmapLocked()
}

// close unmaps the memory as soon as nothing in it is in use.
func (a *arena) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	a.unmapLocked()
}

func (a *arena) unmapLocked() {
	if !a.closed || a.used > 0 || a.memory == nil {
		return
	}
	clear(a.memory)
	_ = unix.Munmap(a.memory) // it is zero; nothing more can be done
	a.memory = nil
}
