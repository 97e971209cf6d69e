package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	stateName   = "audit.state"
	stateFormat = 1
	// slotSize is the room of one copy of the state in its file.
	slotSize = 1024
)

// savedState is the chain state as it stands on disk.
type savedState struct {
	Format int `json:"format"`
	// Saved counts the saves: the copy with the higher number is newer.
	Saved uint64 `json:"saved"`
	Chain string `json:"chain"`
	// Sequence and Previous are of the last record known; Key is of the next.
	Sequence uint64 `json:"sequence"`
	Previous string `json:"previous"`
	Key      string `json:"key"`
	// Closed says that no record follows Sequence.
	Closed bool `json:"closed"`
}

func (s savedState) chain() (chain, error) {
	c := chain{next: s.Sequence + 1}
	key, err1 := hex.DecodeString(s.Key)
	previous, err2 := hex.DecodeString(s.Previous)
	if err1 != nil || err2 != nil || len(key) != len(c.key) || len(previous) != len(c.previous) {
		return c, errors.New("the key or the last MAC is not 32 bytes in hexadecimal")
	}
	copy(c.key[:], key)
	copy(c.previous[:], previous)
	return c, nil
}

// stateFile holds two copies of the state. They are overwritten in place, one
// after the other: a crash spoils one copy at most, a full disk neither, and no
// earlier key stays behind in a freed block of the file system.
type stateFile struct {
	f     *os.File
	path  string
	saved uint64
	id    string // of the chain
}

// HasState tells whether a state directory holds the state of a chain, or something
// in its place that only Open can judge.
func HasState(dir string) bool {
	info, err := os.Lstat(filepath.Join(dir, stateName))
	return err == nil && info.Size() > 0 || err != nil && !errors.Is(err, fs.ErrNotExist)
}

// openState opens and locks the state file in dir, and creates it empty.
func openState(dir string) (*stateFile, error) {
	path := filepath.Join(dir, stateName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open audit state: %w", err)
	}
	if err := lock(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &stateFile{f: f, path: path}, nil
}

// lock takes the lock that keeps a second agent out.
func lock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%w: another process holds %s; stop it, or give each agent its own log and state directory", ErrInUse, f.Name())
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return nil
}

// load returns the newer copy that is whole; found is false for a file that was
// never written to its end.
func (s *stateFile) load() (state savedState, found bool, err error) {
	content := make([]byte, 2*slotSize)
	n, err := s.f.ReadAt(content, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return state, false, fmt.Errorf("read audit state: %w", err)
	}
	if n < slotSize {
		return state, false, nil
	}
	for slot := range bytes.SplitSeq(content[:n], []byte("\n")) {
		copied, ok := parseSlot(slot)
		if ok && (!found || copied.Saved > state.Saved) {
			state, found = copied, true
		}
	}
	if !found {
		return state, false, fmt.Errorf("%w: %s holds no readable copy; restore it from the backup of the state directory, "+
			"or move it and the log away to begin a new chain", ErrState, s.path)
	}
	if state.Format != stateFormat {
		return state, false, fmt.Errorf("%w: %s has format %d, this program reads %d; use the version that wrote it",
			ErrState, s.path, state.Format, stateFormat)
	}
	s.saved, s.id = state.Saved, state.Chain
	return state, true, nil
}

// parseSlot parses one copy: JSON, a space, its SHA-256, then padding.
func parseSlot(slot []byte) (savedState, bool) {
	var state savedState
	text, sum, found := bytes.Cut(bytes.TrimRight(slot, " \x00"), []byte("} "))
	if !found {
		return state, false
	}
	text = append(bytes.Clone(text), '}')
	want := sha256.Sum256(text)
	if hex.EncodeToString(want[:]) != string(sum) {
		return state, false
	}
	return state, json.Unmarshal(text, &state) == nil
}

// save stores c durably, in both copies.
func (s *stateFile) save(c *chain, closed bool) error {
	text, err := json.Marshal(savedState{
		Format: stateFormat, Saved: s.saved + 1, Chain: s.id, Sequence: c.next - 1,
		Previous: hex.EncodeToString(c.previous[:]), Key: hex.EncodeToString(c.key[:]), Closed: closed,
	})
	if err != nil {
		return fmt.Errorf("encode audit state: %w", err)
	}
	sum := sha256.Sum256(text)
	slot := bytes.Repeat([]byte(" "), slotSize)
	n := copy(slot, text)
	clear(text) // it holds the key
	defer clear(slot)
	hex.Encode(slot[n+1:], sum[:])
	slot[slotSize-1] = '\n'
	for i := range int64(2) {
		if _, err := s.f.WriteAt(slot, i*slotSize); err != nil {
			return fmt.Errorf("store audit state: %w", err)
		}
		if err := datasync(s.f); err != nil {
			return fmt.Errorf("store audit state: %w", err)
		}
	}
	s.saved++
	return nil
}

func (s *stateFile) close() error { return s.f.Close() }

// datasync makes the content of f durable. It is safe while f is being closed.
func datasync(f *os.File) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var syncErr error
	if err := conn.Control(func(fd uintptr) { syncErr = unix.Fdatasync(int(fd)) }); err != nil {
		return err
	}
	return syncErr
}

// syncDir makes the names in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// readOrCreateKey reads the key file at path; where there is none it writes a
// new random key, durably, readable by its owner alone.
func readOrCreateKey(path string) (key []byte, created bool, err error) {
	text, err := os.ReadFile(path)
	if err == nil {
		key, err = ParseInitialKey(text)
		if err != nil {
			return nil, false, fmt.Errorf("%s: %w", path, err)
		}
		return key, false, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, false, err
	}
	key = NewInitialKey()
	// Written under another name first: a crash leaves no half key behind.
	unfinished := path + ".new"
	if err := os.Remove(unfinished); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, false, err
	}
	f, err := os.OpenFile(unfinished, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, false, err
	}
	_, err = f.WriteString(FormatInitialKey(key))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return nil, false, fmt.Errorf("write %s: %w", unfinished, err)
	}
	if err := os.Rename(unfinished, path); err != nil {
		return nil, false, err
	}
	return key, true, syncDir(filepath.Dir(path))
}
