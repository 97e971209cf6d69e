package seal_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/cache/seal"
)

// wantLoad checks what a fresh process finds: the records, or the error.
func wantLoad(t *testing.T, what, path string, s seal.Sealer, want []seal.Record, wantErr error) {
	t.Helper()
	store, err := seal.OpenStore(path, s)
	must(t, err)
	defer store.Close()
	l, err := store.Load()
	if !errors.Is(err, wantErr) {
		t.Errorf("%s: Load: got %v, want %v", what, err, wantErr)
	}
	if err != nil {
		if !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %q does not name the file", what, err)
		}
		return
	}
	defer l.Free()
	if diff := cmp.Diff(want, l.Records); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func TestStoreKeepsRecords(t *testing.T) {
	path, h := filepath.Join(t.TempDir(), "store"), newHost(t, 1)
	wantLoad(t, "before the first Save", path, h, nil, seal.ErrNotExist)
	store := open(t, path, h)
	for _, list := range [][]seal.Record{records("a", "", "c", "d", "e", "a"), nil, records(strings.Repeat("x", seal.MaxValue))} {
		must(t, store.Save(list))
		l, err := store.Load()
		must(t, err)
		if len(l.Records) != len(list) {
			t.Errorf("got %d records, want %d", len(l.Records), len(list))
		}
		for i := range l.Records {
			if l.Records[i].Type != list[i].Type || !bytes.Equal(l.Records[i].Value, list[i].Value) {
				t.Errorf("record %d differs", i)
			}
		}
		l.Free()
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode: got %v, %v, want 0600", info.Mode(), err)
	}
}

// The content is never readable in the file, and no two files are alike.
func TestStoreIsSealed(t *testing.T) {
	path, h := filepath.Join(t.TempDir(), "store"), newHost(t, 1)
	store := open(t, path, h)
	must(t, store.Save(records("a secret data key")))
	first := read(t, path)
	if bytes.Contains(first, []byte("secret data")) {
		t.Error("the file holds a record in clear")
	}
	h.counter = 0
	must(t, open(t, path+"2", h).Save(records("a secret data key")))
	if bytes.Equal(first, read(t, path+"2")) {
		t.Error("two files of the same content and counter are alike")
	}
}

func TestCounterMovesOncePerSave(t *testing.T) {
	h := newHost(t, 1)
	store := open(t, filepath.Join(t.TempDir(), "store"), h)
	for i := range uint64(5) {
		must(t, store.Save(nil))
		if want := i + 2; h.counter != want {
			t.Errorf("after Save %d: counter %d, want %d", i+1, h.counter, want)
		}
	}
}

func TestRollbackIsRefused(t *testing.T) {
	path, h := filepath.Join(t.TempDir(), "store"), newHost(t, 1)
	store := open(t, path, h)
	must(t, store.Save(records("old")))
	old := read(t, path)
	must(t, store.Save(records("new")))
	current := read(t, path)
	store.Close()
	write(t, path, old)
	wantLoad(t, "older copy", path, h, nil, seal.ErrRolledBack)
	older := open(t, path, h)
	if _, err := older.Load(); err == nil || !strings.Contains(err.Error(), "written as state 2, but host has counted to 3: an older copy") {
		t.Errorf("older copy: got %v, want it to say so", err)
	}
	older.Close()
	write(t, path, current)
	wantLoad(t, "newest", path, h, records("new"), nil)
	h.counter -= 2
	wantLoad(t, "counter put back", path, h, nil, seal.ErrRolledBack)
}

// A crash between the file and the counter loses nothing. What it leaves can
// never replace what a later process put in force.
func TestCrashBeforeTheCounter(t *testing.T) {
	path, h := filepath.Join(t.TempDir(), "store"), newHost(t, 1)
	store := open(t, path, h)
	must(t, store.Save(records("first")))
	first := read(t, path)
	h.broken = seal.ErrUnavailable
	if err := store.Save(records("never in force")); !errors.Is(err, seal.ErrUnavailable) {
		t.Fatalf("Save without counter: got %v", err)
	}
	store.Close()
	pending := read(t, path)
	wantLoad(t, "after the crash", path, h, records("never in force"), nil)

	write(t, path, first)
	wantLoad(t, "the state before", path, h, records("first"), nil)
	h.broken = nil
	store = open(t, path, h)
	must(t, store.Save(records("spent")))
	store.Close()
	write(t, path, pending)
	wantLoad(t, "the fork", path, h, nil, seal.ErrRolledBack)
}

// The same within one process, which goes on after a failed Save.
func TestForkWithinAProcess(t *testing.T) {
	path, h := filepath.Join(t.TempDir(), "store"), newHost(t, 1)
	store := open(t, path, h)
	must(t, store.Save(nil))
	h.broken = seal.ErrUnavailable
	if err := store.Save(records("fork")); err == nil {
		t.Fatal("Save without counter succeeded")
	}
	fork := read(t, path)
	h.broken = nil
	must(t, store.Save(records("spent")))
	store.Close()
	write(t, path, fork)
	wantLoad(t, "the fork", path, h, nil, seal.ErrRolledBack)
}

func TestSharedCounterIsNoticed(t *testing.T) {
	h := newHost(t, 1)
	h.others = 1
	if err := open(t, filepath.Join(t.TempDir(), "store"), h).Save(nil); !errors.Is(err, seal.ErrWrite) {
		t.Errorf("Save while another moves the counter: got %v, want ErrWrite", err)
	}
}

func TestForeignStoreIsRefused(t *testing.T) {
	path, h := filepath.Join(t.TempDir(), "store"), newHost(t, 1)
	must(t, open(t, path, h).Save(records("a")))
	copied := filepath.Join(t.TempDir(), "copy")
	write(t, copied, read(t, path))
	other := newHost(t, 2)
	other.counter = h.counter
	wantLoad(t, "copied to another host", copied, other, nil, seal.ErrForeign)
	wantLoad(t, "copied on this host", copied, h, records("a"), nil)
}

// Every cut and every changed byte is found, also with a mended checksum.
func TestDamagedStoreIsRefused(t *testing.T) {
	path, h := filepath.Join(t.TempDir(), "store"), newHost(t, 1)
	store := open(t, path, h)
	must(t, store.Save(records("a", "b")))
	store.Close()
	good := read(t, path)
	refused := []error{seal.ErrDamaged, seal.ErrTruncated, seal.ErrNotStore, seal.ErrNewer, seal.ErrForeign, seal.ErrRolledBack}
	try := func(what string, b []byte) {
		t.Helper()
		write(t, path, b)
		s, err := seal.OpenStore(path, h)
		must(t, err)
		defer s.Close()
		_, err = s.Load()
		for _, want := range refused {
			if errors.Is(err, want) {
				return
			}
		}
		t.Errorf("%s: got %v, want a refusal by name", what, err)
	}
	for i := range good {
		try("cut at "+strconv.Itoa(i), good[:i])
		for _, mend := range []bool{false, true} {
			b := bytes.Clone(good)
			b[i] ^= 0x40
			if mend {
				sum := sha256.Sum256(b[:len(b)-sha256.Size])
				copy(b[len(b)-sha256.Size:], sum[:])
				if i >= len(b)-sha256.Size {
					continue
				}
			}
			try("changed at "+strconv.Itoa(i), b)
		}
	}
	for _, c := range []struct {
		what string
		file []byte
		want error
	}{
		{"half written", good[:len(good)/2], seal.ErrTruncated},
		{"one more byte", append(bytes.Clone(good), 0), seal.ErrDamaged},
		{"zeros", make([]byte, len(good)), seal.ErrNotStore},
		{"empty", nil, seal.ErrNotStore},
		{"newer", append([]byte("KMSASTOR\x02"), good[9:]...), seal.ErrNewer},
		{"another program's", []byte("-----BEGIN CERTIFICATE-----"), seal.ErrNotStore},
	} {
		write(t, path, c.file)
		wantLoad(t, c.what, path, h, nil, c.want)
	}
}

func TestRecordsAreBounded(t *testing.T) {
	path, h := filepath.Join(t.TempDir(), "store"), newHost(t, 1)
	store := open(t, path, h)
	must(t, store.Save(records("kept")))
	big := seal.Record{Type: seal.DataKey, Value: make([]byte, seal.MaxValue)}
	many := make([]seal.Record, seal.MaxContent/seal.MaxValue)
	for i := range many {
		many[i] = big
	}
	for _, c := range []struct {
		what string
		list []seal.Record
		want error
	}{
		{"value", []seal.Record{{Type: seal.DataKey, Value: make([]byte, seal.MaxValue+1)}}, seal.ErrTooLarge},
		{"count", make([]seal.Record, seal.MaxRecords+1), seal.ErrTooLarge},
		{"content", many, seal.ErrTooLarge},
		{"type 0", make([]seal.Record, 1), seal.ErrWrite},
		{"type 6", []seal.Record{{Type: 6}}, seal.ErrWrite},
	} {
		if err := store.Save(c.list); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.what, err, c.want)
		}
	}
	store.Close()
	wantLoad(t, "after refused Saves", path, h, records("kept"), nil)
}

func TestUnsafePlaces(t *testing.T) {
	dir := t.TempDir()
	path, h := filepath.Join(dir, "store"), newHost(t, 1)
	store := open(t, path, h)
	must(t, store.Save(nil))
	if _, err := seal.OpenStore(path, h); !errors.Is(err, seal.ErrBusy) {
		t.Errorf("a second process: got %v, want ErrBusy", err)
	}
	store.Close()
	store.Close()
	if err := store.Save(nil); !errors.Is(err, seal.ErrWrite) {
		t.Errorf("Save after Close: got %v, want ErrWrite", err)
	}
	if _, err := store.Load(); !errors.Is(err, seal.ErrAccess) {
		t.Errorf("Load after Close: got %v, want ErrAccess", err)
	}
	must(t, os.Symlink(path, path+"-link"))
	wantLoad(t, "symbolic link", path+"-link", h, nil, seal.ErrAccess)
	must(t, unix.Mkfifo(path+"-fifo", 0o600))
	wantLoad(t, "fifo", path+"-fifo", h, nil, seal.ErrNotStore)
	must(t, os.Chmod(path, 0o640))
	wantLoad(t, "readable by the group", path, h, nil, seal.ErrInsecure)
	must(t, os.Chmod(dir, 0o777))
	if _, err := seal.OpenStore(path, h); !errors.Is(err, seal.ErrInsecure) {
		t.Errorf("directory of all: got %v, want ErrInsecure", err)
	}
	must(t, os.Chmod(dir, 0o777|fs.ModeSticky))
	open(t, path, h)
	if _, err := seal.OpenStore(filepath.Join(dir, "no", "store"), h); !errors.Is(err, seal.ErrNotExist) {
		t.Errorf("no directory: got %v, want ErrNotExist", err)
	}
	if _, err := seal.OpenStore("", h); !errors.Is(err, seal.ErrAccess) {
		t.Errorf("no path: got %v, want ErrAccess", err)
	}
}

// Killed at any moment, a process finds again at least what it was told to be
// in force, and never an error.
func TestKilledAtAnyMoment(t *testing.T) {
	dir := t.TempDir()
	for round := range 8 {
		cmd := childCommand(t, dir)
		out, err := cmd.StdoutPipe()
		must(t, err)
		cmd.Stderr = os.Stderr
		must(t, cmd.Start())
		said, lines := uint64(0), bufio.NewScanner(out)
		for i := 0; i <= round && lines.Scan(); i++ {
			said, err = strconv.ParseUint(lines.Text(), 10, 64)
			must(t, err)
		}
		must(t, cmd.Process.Kill())
		for lines.Scan() {
			said, err = strconv.ParseUint(lines.Text(), 10, 64)
			must(t, err)
		}
		_ = cmd.Wait()
		sealer, err := seal.OpenFile(filepath.Join(dir, "sealer"))
		must(t, err)
		store := open(t, filepath.Join(dir, "store"), sealer)
		l, err := store.Load()
		must(t, err)
		if n := binary.BigEndian.Uint64(l.Records[0].Value); said == 0 || n < said || n > said+1 {
			t.Errorf("round %d: loaded %d, the last in force was %d", round, n, said)
		}
		l.Free()
		store.Close()
		sealer.Close()
	}
}

var update = flag.Bool("update", false, "write a new frozen store; only for a new version of the format")

// A store of version 1 opens for ever.
func TestFrozenStore(t *testing.T) {
	dir := t.TempDir()
	state := make([]byte, 40) // a file sealer: the secret 00 01 .. 1f, counter 7
	for i := range 32 {
		state[i] = byte(i)
	}
	state[39] = 7
	write(t, filepath.Join(dir, "sealer"), state)
	sealer, err := seal.OpenFile(filepath.Join(dir, "sealer"))
	must(t, err)
	defer sealer.Close()
	want := records("a data key", "a confirmation", "uses", "a tombstone", "a clock")
	path := filepath.Join(dir, "store")
	if *update {
		store := open(t, path, sealer)
		must(t, store.Save(want))
		store.Close()
		write(t, "testdata/store-1", read(t, path))
	}
	write(t, path, read(t, "testdata/store-1"))
	must(t, sealerAt(sealer, 9))
	wantLoad(t, "frozen", path, sealer, want, nil)
}

// sealerAt counts to n.
func sealerAt(s seal.Sealer, n uint64) error {
	for {
		if c, err := s.Counter(); err != nil || c >= n {
			return err
		}
		if _, err := s.Advance(); err != nil {
			return err
		}
	}
}

// An Advance that fails although the counter has moved costs nothing.
func TestCounterMovedByAFailedAdvance(t *testing.T) {
	path, h := filepath.Join(t.TempDir(), "store"), newHost(t, 1)
	store := open(t, path, h)
	must(t, store.Save(records("first")))
	h.broken = seal.ErrUnavailable
	if err := store.Save(records("second")); err == nil {
		t.Fatal("Save without counter succeeded")
	}
	h.broken = nil
	h.counter++
	must(t, store.Save(records("third")))
	store.Close()
	wantLoad(t, "afterwards", path, h, records("third"), nil)
}
