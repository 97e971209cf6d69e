package cache

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// arenaOf is an arena over memory of a kind that a kernel may not have.
func arenaOf(t *testing.T, slots int, kind string, memory func(int) ([]byte, error)) *arena {
	t.Helper()
	size := unix.Getpagesize()
	m, err := memory(size)
	if err != nil {
		t.Fatalf("%s: %v", kind, err)
	}
	a := &arena{kind: kind, size: size, slots: slots, memory: m}
	t.Cleanup(a.close)
	return a
}

func key(b byte) []byte { return bytes.Repeat([]byte{b}, DataKeySize) }

func mustPut(t *testing.T, a *arena, b byte) *secret {
	t.Helper()
	s, err := a.put(key(b))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestArenas tries every kind of memory: the fallback too where the kernel has
// better.
func TestArenas(t *testing.T) {
	kinds := map[string]func(int) ([]byte, error){kindLocked: lockedMemory}
	if fd, err := unix.MemfdSecret(unix.O_CLOEXEC); err == nil {
		_ = unix.Close(fd)
		kinds[kindSecret] = secretMemory
	}
	for kind, memory := range kinds {
		t.Run(kind+": zero after release", func(t *testing.T) {
			a := arenaOf(t, 2, kind, memory)
			given := key(7)
			s, err := a.put(given)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(given, make([]byte, DataKeySize)) {
				t.Error("put did not clear what it was given")
			}
			s.hold()
			s.release()
			if !bytes.Equal(s.bytes, key(7)) {
				t.Error("zeroed while it is held")
			}
			s.release()
			if !bytes.Equal(a.memory, make([]byte, a.size)) {
				t.Error("not zeroed after the last release")
			}
		})
		t.Run(kind+": slots are apart, full and used again", func(t *testing.T) {
			a := arenaOf(t, 2, kind, memory)
			one, two := mustPut(t, a, 1), mustPut(t, a, 2)
			if cap(one.bytes) != DataKeySize {
				t.Errorf("a data key may grow to %d bytes, into another", cap(one.bytes))
			}
			three := key(3)
			if _, err := a.put(three); !errors.Is(err, ErrMemory) {
				t.Errorf("put in a full arena: %v", err)
			}
			if !bytes.Equal(three, make([]byte, DataKeySize)) {
				t.Error("a refused data key is not cleared")
			}
			one.release()
			again := mustPut(t, a, 4)
			if !bytes.Equal(again.bytes, key(4)) || !bytes.Equal(two.bytes, key(2)) {
				t.Errorf("%x, %x", again.bytes, two.bytes)
			}
			again.release()
			two.release()
		})
		t.Run(kind+": there, locked, not dumped", func(t *testing.T) {
			a := arenaOf(t, 2, kind, memory)
			if resident, size := smaps(t, a, "Rss:"), smaps(t, a, "Size:"); strings.TrimSpace(resident) != strings.TrimSpace(size) {
				t.Errorf("resident: %s of %s; it is to be found when it is reserved", resident, size)
			}
			flags := smaps(t, a, "VmFlags:")
			for _, flag := range []string{"lo", "dd"} { // locked; not in dumps
				if !strings.Contains(flags, " "+flag) {
					t.Errorf("VmFlags %q lack %q", flags, flag)
				}
			}
		})
	}
}

// smaps is what the kernel says of the mapping that holds the arena.
func smaps(t *testing.T, a *arena, field string) string {
	t.Helper()
	mappings, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	inside := false
	for line := range strings.Lines(string(mappings)) {
		if low, high, ok := mappingOf(line); ok {
			at := uint64(uintptr(unsafe.Pointer(&a.memory[0])))
			inside = low <= at && at < high
		}
		if value, ok := strings.CutPrefix(line, field); ok && inside {
			return value
		}
	}
	t.Fatal("the arena has no mapping")
	return ""
}

func TestReleaseTwice(t *testing.T) {
	a, err := newArena(4)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	s := mustPut(t, a, 1)
	s.release()
	other := mustPut(t, a, 2)
	defer other.release()
	defer func() {
		if recover() == nil {
			t.Error("a second release went unnoticed")
		}
		if !bytes.Equal(other.bytes, key(2)) {
			t.Error("a second release destroyed another's data key")
		}
	}()
	s.release()
}

func TestUseReleaseTwice(t *testing.T) {
	a, err := newArena(4)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	u := &Use{entry: &entry{secret: mustPut(t, a, 1)}}
	u.Release()
	other := mustPut(t, a, 2)
	defer other.release()
	u.Release()
	if !bytes.Equal(other.bytes, key(2)) {
		t.Error("a second release destroyed another's data key")
	}
}

// TestArenaClose: the memory goes with the last data key in it.
func TestArenaClose(t *testing.T) {
	a, err := newArena(4)
	if err != nil {
		t.Fatal(err)
	}
	s := mustPut(t, a, 1)
	a.close()
	a.close()
	if !bytes.Equal(s.bytes, key(1)) {
		t.Error("closed under a data key in use")
	}
	if _, err := a.put(key(2)); !errors.Is(err, ErrClosed) {
		t.Errorf("put in a closed arena: %v", err)
	}
	s.release()
	if a.memory != nil {
		t.Error("the memory was not given back")
	}
}

func TestKindOfMemory(t *testing.T) {
	a, err := newArena(1000)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	want := kindLocked
	if fd, err := unix.MemfdSecret(unix.O_CLOEXEC); err == nil {
		_ = unix.Close(fd)
		want = kindSecret
	}
	if a.kind != want {
		t.Errorf("kind = %q, want %q: the best that the kernel has", a.kind, want)
	}
	if a.size < 1000*DataKeySize || a.size != len(a.memory) {
		t.Errorf("size = %d of %d", a.size, len(a.memory))
	}
}

func mappingOf(line string) (low, high uint64, ok bool) {
	span, _, _ := strings.Cut(line, " ")
	from, to, ok := strings.Cut(span, "-")
	if !ok {
		return 0, 0, false
	}
	low, err1 := strconv.ParseUint(from, 16, 64)
	high, err2 := strconv.ParseUint(to, 16, 64)
	return low, high, err1 == nil && err2 == nil
}
