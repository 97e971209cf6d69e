package hsm

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// slab is memory outside the Go heap that is not swapped out and in no core dump.
type slab []byte

func newSlab(size int) (slab, error) {
	page := os.Getpagesize()
	size = (size + page - 1) / page * page
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("memory for key material: %w", err)
	}
	if err := unix.Mlock(b); err != nil {
		_ = unix.Munmap(b)
		return nil, fmt.Errorf("lock %d bytes of memory for key material: %w (raise RLIMIT_MEMLOCK: LimitMEMLOCK= in the systemd unit)", size, err)
	}
	if err := unix.Madvise(b, unix.MADV_DONTDUMP); err != nil {
		_ = unix.Munmap(b)
		return nil, fmt.Errorf("keep memory for key material out of core dumps: %w", err)
	}
	return b, nil
}

func (s slab) free() {
	clear(s)
	_ = unix.Munmap(s)
}
