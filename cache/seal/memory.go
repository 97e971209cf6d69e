package seal

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Memory is memory for secrets: outside the Go heap, locked against swapping
// and left out of core dumps.
type Memory struct {
	mapped []byte // whole pages
	data   []byte // what was asked for
}

// NewMemory returns size bytes, all zero. An error wraps ErrMemory.
func NewMemory(size int) (*Memory, error) {
	page := os.Getpagesize()
	pages := max(1, (size+page-1)/page)
	mapped, err := unix.Mmap(-1, 0, pages*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("%w: mmap of %d bytes: %w", ErrMemory, pages*page, err)
	}
	if err := unix.Mlock(mapped); err != nil {
		_ = unix.Munmap(mapped)
		return nil, fmt.Errorf("%w: mlock of %d bytes: %w: raise the limit on locked memory (systemd: LimitMEMLOCK=, shell: ulimit -l)",
			ErrMemory, pages*page, err)
	}
	if err := unix.Madvise(mapped, unix.MADV_DONTDUMP); err != nil {
		_ = unix.Munmap(mapped)
		return nil, fmt.Errorf("%w: madvise: %w", ErrMemory, err)
	}
	return &Memory{mapped: mapped, data: mapped[:size:size]}, nil
}

// Bytes returns the memory itself; nothing may use it after Free. It is nil
// then.
func (m *Memory) Bytes() []byte { return m.data }

// Free clears the memory and gives it back. A nil or freed one is left alone.
func (m *Memory) Free() {
	if m == nil || m.mapped == nil {
		return
	}
	clear(m.mapped)
	_ = unix.Munmap(m.mapped)
	m.mapped, m.data = nil, nil
}
