package hsm

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func openPIN(t *testing.T, f *os.File) PINSource {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	d, err := OpenPINDescriptor(ctx, f)
	if err != nil {
		t.Fatal(err)
	}
	return PINSource{Descriptor: d}
}

func pinOf(t *testing.T, s PINSource) string {
	t.Helper()
	got := ""
	if err := s.read(func(pin []byte) error { got = string(pin); return nil }); err != nil {
		t.Fatalf("%v: %v", s, err)
	}
	return got
}

// A file is read again for each login, wherever another process has read to, and a
// change is noticed.
func TestPINInAnOpenFile(t *testing.T) {
	path := t.TempDir() + "/pin"
	if err := writeFile(path, "1234\n"); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	s := openPIN(t, f)
	before := s.stamp()
	for range 2 {
		if got := pinOf(t, s); got != "1234" {
			t.Errorf("the PIN is %q", got)
		}
		_, _ = f.Seek(3, 0)
	}
	if err := writeFile(path, "567890"); err != nil {
		t.Fatal(err)
	}
	if got := pinOf(t, s); got != "567890" || s.stamp() == before {
		t.Errorf("after a change: %q, stamp %q", got, s.stamp())
	}
	if err := chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.Check(); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("open to all: %v", err)
	}
	if _, err := OpenPINDescriptor(t.Context(), f); err == nil {
		t.Error("a file that is open to all is taken")
	}
}

// The mode of a file in memory says nothing.
func TestPINInMemory(t *testing.T) {
	fd, err := unix.MemfdCreate("pin", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "hsm-pin")
	defer func() { _ = f.Close() }()
	if _, err := f.WriteString("1234"); err != nil {
		t.Fatal(err)
	}
	if got := pinOf(t, openPIN(t, f)); got != "1234" {
		t.Errorf("the PIN is %q", got)
	}
}

// A pipe is read to its end, once; the PIN is there for every login.
func TestPINInAPipe(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		_, _ = w.WriteString("12")
		_, _ = w.WriteString("34\n")
		_ = w.Close()
	}()
	s := openPIN(t, r)
	for range 2 {
		if got := pinOf(t, s); got != "1234" {
			t.Errorf("the PIN is %q", got)
		}
	}
	if err := r.Close(); err == nil {
		t.Error("the pipe was left open")
	}
}

func TestPINDescriptorThatIsNone(t *testing.T) {
	closed, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	waiting, open, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = open.Close() }()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = null.Close() }()
	for want, f := range map[string]*os.File{"nothing came": closed, "nobody has ended": waiting, "neither": null} {
		ctx, cancel := context.WithTimeout(t.Context(), 150*time.Millisecond)
		if _, err := OpenPINDescriptor(ctx, f); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
		cancel()
	}
}
