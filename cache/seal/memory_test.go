package seal_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/cache/seal"
)

// recorder notes where a sealer's Open was told to put secrets.
type recorder struct {
	*host
	first *byte
}

func (r *recorder) Open(dst, sealed, aad []byte) ([]byte, error) {
	r.first = unsafe.SliceData(dst)
	return r.host.Open(dst, sealed, aad)
}

// Secrets are loaded into protected memory and nowhere else, and gone after Free.
func TestLoadedMemory(t *testing.T) {
	r := &recorder{host: newHost(t, 1)}
	store := open(t, filepath.Join(t.TempDir(), "store"), r)
	must(t, store.Save(records("secret")))
	l, err := store.Load()
	must(t, err)
	offset := uintptr(unsafe.Pointer(unsafe.SliceData(l.Records[0].Value))) - uintptr(unsafe.Pointer(r.first))
	if offset != 4+5 {
		t.Errorf("the value is %d bytes from the protected memory's start, want 9", offset)
	}
	l.Free()
	l.Free()
	if l.Records != nil {
		t.Error("records are left after Free")
	}
}

func TestMemoryLimit(t *testing.T) {
	m, err := seal.NewMemory(100)
	must(t, err)
	if len(m.Bytes()) != 100 {
		t.Errorf("got %d bytes, want 100", len(m.Bytes()))
	}
	m.Free()
	if m.Bytes() != nil {
		t.Error("bytes are left after Free")
	}
	if _, err := seal.NewMemory(1 << 60); !errors.Is(err, seal.ErrMemory) || !errors.Is(err, unix.ENOMEM) {
		t.Errorf("too much: got %v, want ErrMemory", err)
	}
}

func TestKeyRefusesOtherSecrets(t *testing.T) {
	for _, n := range []int{0, 31, 33} {
		if _, err := seal.NewKey(make([]byte, n)); !errors.Is(err, seal.ErrUnavailable) {
			t.Errorf("%d bytes: got %v, want ErrUnavailable", n, err)
		}
	}
	if _, err := newHost(t, 1).Open(nil, make([]byte, 43), nil); !errors.Is(err, seal.ErrDamaged) {
		t.Errorf("Open of 43 bytes: got %v, want ErrDamaged", err)
	}
}

func TestMemoryIsLockedAndNotDumped(t *testing.T) {
	m, err := seal.NewMemory(5000)
	must(t, err)
	defer m.Free()
	_, rest, found := strings.Cut("\n"+string(read(t, "/proc/self/smaps")), "\n"+strings.TrimPrefix(fmt.Sprintf("%p", m.Bytes()), "0x")+"-")
	_, rest, flagged := strings.Cut(rest, "VmFlags:")
	flags, _, _ := strings.Cut(rest, "\n")
	for _, want := range []string{" lo ", " dd "} { // locked, do not dump
		if !found || !flagged || !strings.Contains(flags+" ", want) {
			t.Errorf("the mapping's flags are %q, want %q among them", flags, want)
		}
	}
}
