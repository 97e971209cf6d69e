package local

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// region is memory for keys: outside the Go heap, locked against swapping and
// left out of core dumps. Its bytes are gone after free.
type region struct {
	mapped []byte // whole pages
	data   []byte // what was asked for
}

func newRegion(size int) (*region, error) {
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
	return &region{mapped: mapped, data: mapped[:size:size]}, nil
}

// free clears and returns the memory; nothing may use it afterwards. A nil or
// freed region is left alone.
func (r *region) free() {
	if r == nil || r.mapped == nil {
		return
	}
	clear(r.mapped)
	_ = unix.Munmap(r.mapped)
	r.mapped, r.data = nil, nil
}
