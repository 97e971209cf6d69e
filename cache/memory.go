package cache

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Memory is protected memory for secrets that are no data keys: as that of the cache,
// outside the Go heap, never swapped, not in core dumps. It is not safe for concurrent
// use.
type Memory struct{ bytes []byte }

// NewMemory reserves size bytes, which are zero, rounded up to whole pages. It fails
// where the limit for locked memory is too small.
func NewMemory(size int) (*Memory, error) {
	page := unix.Getpagesize()
	memory, _, err := protectedMemory((size + page - 1) / page * page)
	if err != nil {
		return nil, fmt.Errorf("reserve %d bytes of locked memory; RLIMIT_MEMLOCK must allow it beside the cache (LimitMEMLOCK= in the systemd unit): %w", size, err)
	}
	return &Memory{memory}, nil
}

// Bytes returns all of it, until Free.
func (m *Memory) Bytes() []byte { return m.bytes }

// Free erases it and gives it back; Bytes is empty then. It is idempotent.
func (m *Memory) Free() {
	if m.bytes == nil {
		return
	}
	clear(m.bytes)
	_ = unix.Munmap(m.bytes) // it is zero; nothing more can be done
	m.bytes = nil
}
