package local_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/local"
)

func TestBackendSeesChanges(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal, "orders")
	b := openBackend(t, k.Path(), seal)
	wrapped := wrap(t, b, orders1)
	for range 20 { // as fast as the file system allows: no state may be missed
		must(t, k.Disable("orders", "1"))
		_, err := b.Unwrap(t.Context(), orders1, wrapped, binding)
		wantClass(t, "after disable", err, plugins.KeyUnusable)
		must(t, k.Enable("orders", "1"), k.Disable("orders", "1"), k.Enable("orders", "1"))
		_, err = b.Unwrap(t.Context(), orders1, wrapped, binding)
		must(t, err)
	}
	version, err := k.Rotate("orders")
	must(t, err, k.CreateKey("new"))
	wrap(t, b, plugins.KeyRef{URI: "local:orders", Version: version})
	wrap(t, b, plugins.KeyRef{URI: "local:new", Version: "1"})
	resealed, err := k.Reseal(keyFile(t))
	must(t, err)
	defer resealed.Close()
	_, err = b.Unwrap(t.Context(), orders1, wrapped, binding)
	wantClass(t, "after a reseal that the settings do not know", err, plugins.Unavailable, "name the seal it was made with")
}

// The inode of the file that is loaded is not used again while it is: a new
// file could look like it within one tick of the file system's clock.
func TestLoadedInodeIsPinned(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal, "orders")
	openBackend(t, k.Path(), seal)
	loaded := inode(t, k.Path())
	must(t, k.Disable("orders", "1"))
	for i := range 50 {
		path := filepath.Join(filepath.Dir(k.Path()), strconv.Itoa(i))
		write(t, path, nil)
		if inode(t, path) == loaded {
			t.Fatal("the loaded file's inode was used again")
		}
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	return st.Ino
}

// Whatever happens to the file is an outage with a cure, and over once mended.
func TestUnreadableKeystoreIsAnOutage(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal, "orders")
	good := read(t, k.Path())
	for _, c := range []struct {
		what, cure string
		harm       func() error
	}{
		{"removed", "create it, or check the path", func() error { return os.Remove(k.Path()) }},
		{"truncated", "restore it from a backup", func() error { return os.Truncate(k.Path(), 60) }},
		{"emptied", "restore it from a backup", func() error { return os.Truncate(k.Path(), 0) }},
		{"damaged", "restore it from a backup", func() error { return os.WriteFile(k.Path(), flip(good), 0o600) }},
		{"opened to others", "chmod 600", func() error { return os.Chmod(k.Path(), 0o604) }},
		{"foreign", "check the path", func() error { return os.WriteFile(k.Path(), []byte("hello there"), 0o600) }},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := openBackend(t, k.Path(), seal)
			wrapped := wrap(t, b, orders1)
			must(t, c.harm())
			for range 2 {
				_, err := b.Unwrap(t.Context(), orders1, wrapped, binding)
				wantClass(t, c.what, err, plugins.Unavailable, k.Path(), c.cure)
				_, err = b.Check(t.Context())
				wantClass(t, c.what, err, plugins.Unavailable)
				_, err = b.Describe(t.Context(), "local:missing")
				wantClass(t, c.what, err, plugins.Unavailable)
			}
			write(t, k.Path(), good)
			must(t, os.Chmod(k.Path(), 0o600))
			_, err := b.Unwrap(t.Context(), orders1, wrapped, binding)
			must(t, err)
		})
	}
}

// A missing seal is asked for again, though the keystore file did not change.
func TestSealComesBack(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal, "orders")
	synctest.Test(t, func(t *testing.T) {
		b := local.New()
		defer func() { _ = b.Close() }()
		aside := seal.KeyFile + ".aside"
		must(t, os.Rename(seal.KeyFile, aside))
		_, err := b.Open(t.Context(), config(t, k.Path(), seal))
		wantClass(t, "open without the key file", err, plugins.Unavailable, seal.KeyFile, "create it")
		must(t, os.Rename(aside, seal.KeyFile))
		_, err = b.Open(t.Context(), config(t, k.Path(), seal))
		must(t, err)
		wrapped := wrap(t, b, orders1)

		other := keyFile(t)
		resealed, err := k.Reseal(other)
		must(t, err)
		defer resealed.Close()
		_, err = b.Unwrap(t.Context(), orders1, wrapped, binding)
		wantClass(t, "resealed", err, plugins.Unavailable)
		must(t, os.Rename(other.KeyFile, seal.KeyFile))
		_, err = b.Unwrap(t.Context(), orders1, wrapped, binding)
		wantClass(t, "within the second in which a failure stands", err, plugins.Unavailable)
		time.Sleep(time.Second)
		_, err = b.Unwrap(t.Context(), orders1, wrapped, binding)
		must(t, err)
	})
}

// Nobody brings a disabled version back to life under a running backend by
// putting an old file, or another keystore, in place.
func TestRollback(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal, "orders")
	old := read(t, k.Path())
	must(t, k.Disable("orders", "1"))
	b := openBackend(t, k.Path(), seal)
	write(t, k.Path(), old)
	_, err := b.Wrap(t.Context(), orders1, dataKey, binding)
	wantClass(t, "older file", err, plugins.Unavailable, "generation 2", "restart the agent")
	write(t, k.Path(), read(t, newStore(t, seal, "orders", "a", "b", "c").Path()))
	_, err = b.Wrap(t.Context(), orders1, dataKey, binding)
	wantClass(t, "another keystore", err, plugins.Unavailable, "ID", "restart the agent")
	wrap(t, openBackend(t, k.Path(), seal), orders1) // a restart accepts it
}

// Nor by restoring a backup, which counts as one change: the file then has the
// generation of the one that it undoes.
func TestRollbackByRestore(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal, "orders")
	var backup bytes.Buffer
	must(t, k.Backup(&backup, seal))
	must(t, k.Disable("orders", "1"))
	b := openBackend(t, k.Path(), seal)
	write(t, k.Path(), read(t, k.Path())) // the same file again is no rollback
	_, err := b.Wrap(t.Context(), orders1, dataKey, binding)
	wantClass(t, "disabled version", err, plugins.KeyUnusable)
	must(t, os.Remove(k.Path()))
	restored, err := local.Restore(&backup, seal, k.Path(), seal)
	must(t, err)
	defer restored.Close()
	_, err = b.Wrap(t.Context(), orders1, dataKey, binding)
	wantClass(t, "restored", err, plugins.Unavailable, "generation 3", "restart the agent")
	wrap(t, openBackend(t, k.Path(), seal), orders1) // a restart accepts it
}

// A call whose context has ended does nothing, and one that waits for another
// call's load ends with its context.
func TestContextEnds(t *testing.T) {
	seal := passphrase(t, "correct horse battery staple")
	k := newStore(t, seal, "orders")
	b := openBackend(t, k.Path(), seal)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := b.Wrap(ended, orders1, dataKey, binding)
	wantClass(t, "ended context", err, plugins.Unavailable)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("ended context: got %v, want context.Canceled", err)
	}
	resealed, err := k.Reseal(seal) // with new salts: the next call stretches for long
	must(t, err)
	defer resealed.Close()
	short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	var calls sync.WaitGroup
	var waited atomic.Int32
	for range 4 {
		calls.Go(func() {
			_, err := b.Wrap(short, orders1, dataKey, binding)
			if errors.Is(err, context.DeadlineExceeded) {
				waited.Add(1)
			} else if err != nil {
				t.Errorf("got %v", err)
			}
		})
	}
	calls.Wait()
	if n := waited.Load(); n < 3 {
		t.Errorf("%d of 4 calls ended with their context, want all but the one that loads", n)
	}
	wrap(t, b, orders1)
}

// Calls go on, each with a whole keystore, while the file changes under them
// and the backend is closed.
func TestConcurrentUse(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal, "orders")
	b := openBackend(t, k.Path(), seal)
	wrapped := wrap(t, b, orders1)
	stop := make(chan struct{})
	var calls sync.WaitGroup
	for range 4 {
		calls.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				plain, err := b.Unwrap(context.Background(), orders1, wrapped, binding)
				if err != nil && !strings.Contains(err.Error(), local.ErrClosed.Error()) || err == nil && !bytes.Equal(plain, dataKey) {
					t.Errorf("got %q, %v", plain, err)
					return
				}
			}
		})
	}
	for range 30 {
		_, err := k.Rotate("orders")
		must(t, err)
	}
	must(t, b.Close())
	close(stop)
	calls.Wait()
}
