package local

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// retryLoad is how long a failure to load stands before it is tried again on
// an unchanged file: stretching a passphrase is expensive, and the fault may be
// in the seal.
const retryLoad = time.Second

// follower holds a keystore's content in memory and loads it anew when the file
// has changed. It is for concurrent use.
type follower struct {
	keystore *Keystore
	loading  chan struct{} // holds a token while somebody loads

	mu       sync.RWMutex // guards all below; never held over I/O
	ring     *ring        // nil: not loaded, or failed, or closed
	seen     fingerprint  // of the file that ring or failure came from
	pin      *os.File     // keeps that file's inode from being used again
	failure  error
	failedAt time.Time
	closed   bool

	// What was loaded last, failures in between apart: a process never goes
	// back to an older keystore or over to another one.
	id         [idSize]byte
	generation uint64
	salt       [saltSize]byte // of the file's header, new with every write
}

// fingerprint tells one state of a file from another. A pinned inode is not
// used again, so a replaced file always differs.
type fingerprint struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

func newFollower(k *Keystore) *follower {
	return &follower{keystore: k, loading: make(chan struct{}, 1)}
}

func (f *follower) fingerprint() (fingerprint, error) {
	var st unix.Stat_t
	if err := unix.Lstat(f.keystore.path, &st); err != nil {
		return fingerprint{}, f.keystore.named(accessError(err))
	}
	return fingerprint{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}, nil //nolint:unconvert // Dev is 32 bits elsewhere
}

// use calls act with content that is no older than the call of use. The ring
// is act's for the time of its call.
func (f *follower) use(ctx context.Context, act func(*ring) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	now, err := f.fingerprint()
	if err != nil {
		return err
	}
	if used, err := f.useLoaded(&now, act); used {
		return err
	}
	select {
	case f.loading <- struct{}{}:
		defer func() { <-f.loading }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if now, err = f.fingerprint(); err != nil { // another call may have loaded it
		return err
	}
	if used, err := f.useLoaded(&now, act); used {
		return err
	}
	f.load(now)
	_, err = f.useLoaded(nil, act)
	return err
}

// useLoaded acts on what is loaded if that is the file of now, or whatever is
// loaded where now is nil. A fresh failure of that file counts as loaded.
func (f *follower) useLoaded(now *fingerprint, act func(*ring) error) (used bool, err error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	switch {
	case f.closed:
		return true, ErrClosed
	case now != nil && f.seen != *now:
		return false, nil
	case f.ring != nil:
		return true, act(f.ring)
	case now != nil && time.Since(f.failedAt) >= retryLoad:
		return false, nil
	default:
		return true, f.failure
	}
}

// load replaces what is held by the file's content or the reason why it cannot
// be had. The caller holds the token of loading.
func (f *follower) load(seen fingerprint) {
	pin, _ := os.OpenFile(f.keystore.path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	r, h, err := f.keystore.load()
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		err = f.successor(r, h)
	}
	if err != nil || f.closed {
		r.free()
		r = nil
	}
	f.ring.free()
	if f.pin != nil {
		_ = f.pin.Close()
	}
	f.ring, f.seen, f.pin = r, seen, pin
	f.failure, f.failedAt = f.keystore.named(err), time.Now()
	if r != nil {
		f.id, f.generation, f.salt = r.id, r.generation, h.salt
	}
	if f.closed && pin != nil {
		_ = pin.Close()
		f.pin = nil
	}
}

// successor refuses a file that would undo changes which this process has seen:
// a disabled version would come to life again.
func (f *follower) successor(r *ring, h *header) error {
	switch {
	case f.generation == 0:
		return nil
	case r.id != f.id:
		return fmt.Errorf("%w: it has ID %x, the one in use %x: restart the agent if this is meant", ErrRolledBack, r.id, f.id)
	case r.generation < f.generation:
		return fmt.Errorf("%w: it is of generation %d, the one in use of %d: restart the agent if this is meant",
			ErrRolledBack, r.generation, f.generation)
	case r.generation == f.generation && h.salt != f.salt:
		return fmt.Errorf("%w: it has generation %d as that has, but is another file, made from an older one: restart the agent if this is meant",
			ErrRolledBack, r.generation)
	}
	return nil
}

func (f *follower) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	f.ring.free()
	f.ring = nil
	if f.pin != nil {
		_ = f.pin.Close()
		f.pin = nil
	}
	f.keystore.Close()
}
