package renew

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Record is what a state file knows of one file: one line of JSON.
type Record struct {
	// Path is absolute, and any bytes.
	Path    string  `json:"path"`
	Outcome Outcome `json:"outcome"` // Renewed or Failed

	// Of what was renewed: what the new message is under, the message IDs as the
	// audit log has them, and what the new file is.
	Key      string     `json:"key,omitempty"`
	Wrapping []Wrapping `json:"wrapping_keys,omitempty"`
	From     string     `json:"from,omitempty"`
	To       string     `json:"to,omitempty"`
	Size     int64      `json:"size,omitempty"`
	Mtime    int64      `json:"mtime_ns,omitempty"`
	Inode    uint64     `json:"inode,omitempty"`

	// Of what failed.
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
}

// encoded is a Record on disk. JSON has no bytes that are not UTF-8.
type encoded struct {
	Record
	Bytes []byte `json:"path_base64,omitempty"`
}

// heads is the first line of a state file.
type heads struct {
	Format   string    `json:"format"`
	Settings *Settings `json:"settings"`
}

const (
	stateFormat = "kms-agent reencrypt state 1"
	// maxStateLine bounds a line: the longest path, with every byte escaped.
	maxStateLine = 1 << 20
)

// What is wrong with a state file.
var (
	ErrState         = errors.New("not a state file that can be read")
	ErrStateBusy     = errors.New("the state file is in use by another run")
	ErrStateSettings = errors.New("the state file belongs to a run with other settings")
	ErrStateOwner    = errors.New("the state file belongs to somebody else, who could make this run leave files out")
)

func (r Record) marshal() ([]byte, error) {
	e := encoded{Record: r}
	if !utf8.ValidString(r.Path) {
		e.Path, e.Bytes = "", []byte(r.Path)
	}
	line, err := json.Marshal(e)
	return append(line, '\n'), err
}

func parseRecord(line []byte) (Record, error) {
	var e encoded
	if err := strictly(line, &e); err != nil {
		return Record{}, err
	}
	r := e.Record
	if len(e.Bytes) > 0 {
		if r.Path != "" || utf8.Valid(e.Bytes) {
			return Record{}, errors.New("the path is there in two ways, or in the wrong one")
		}
		r.Path = string(e.Bytes)
	}
	if len(r.Wrapping) == 0 {
		r.Wrapping = nil
	}
	switch {
	case !filepath.IsAbs(r.Path):
		return Record{}, errors.New("the path is not absolute")
	case r.Outcome != Renewed && r.Outcome != Failed:
		return Record{}, fmt.Errorf("outcome %q", r.Outcome)
	case r.Outcome == Renewed && (r.Key == "" || len(r.Wrapping) == 0):
		return Record{}, errors.New("it does not say what the new message is under")
	}
	return r, nil
}

// strictly decodes one JSON value that has no unknown fields, and nothing behind.
func strictly(line []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows")
	}
	return nil
}

// parseState reads a state file. whole is how many bytes of it are complete
// lines: a run that was killed may leave a piece of one behind them. Of a path's
// records the last one counts.
func parseState(r io.Reader, settings *Settings) (records map[string]Record, whole int64, err error) {
	records = map[string]Record{}
	lines := bufio.NewReaderSize(r, 64<<10)
	for number := 1; ; number++ {
		line, err := readLine(lines)
		if errors.Is(err, io.EOF) {
			return records, whole, nil
		}
		if err == nil && number == 1 {
			err = checkHead(line, settings)
		} else if err == nil {
			var record Record
			if record, err = parseRecord(line); err == nil {
				records[record.Path] = record
			}
		}
		if errors.Is(err, ErrStateSettings) {
			return nil, 0, err
		}
		if err != nil {
			return nil, 0, fmt.Errorf("%w: line %d: %w", ErrState, number, err)
		}
		whole += int64(len(line))
	}
}

// readLine reads a line with its end; io.EOF where there is no whole one any more.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		piece, err := r.ReadSlice('\n')
		line = append(line, piece...)
		switch {
		case len(line) > maxStateLine:
			return nil, fmt.Errorf("it is longer than %d bytes", maxStateLine)
		case errors.Is(err, bufio.ErrBufferFull):
		default:
			return line, err
		}
	}
}

func checkHead(line []byte, settings *Settings) error {
	var head heads
	if err := strictly(line, &head); err != nil {
		return err
	}
	if head.Format != stateFormat || head.Settings == nil {
		return fmt.Errorf("format %q", head.Format)
	}
	if !reflect.DeepEqual(head.Settings.normal(), settings.normal()) {
		return ErrStateSettings
	}
	return nil
}

// normal writes settings that mean the same in one way.
func (s *Settings) normal() Settings {
	n := *s
	if len(n.NewContext) == 0 {
		n.NewContext = nil
	}
	return n
}

// State remembers in a file what a run has done, for the one after it. It is
// safe for concurrent use.
type State struct {
	path string
	past map[string]Record // immutable

	mu     sync.Mutex // guards what follows
	file   *os.File
	behind int // records since the last sync
	synced time.Time
}

// Records are handed to the kernel one by one, which survives the process, and
// to the disk in batches.
const (
	syncRecords  = 256
	syncInterval = time.Second
)

// OpenState opens a state file, or makes a new one of mode 0600, and keeps
// others from using it. It must be of a run with the same settings.
func OpenState(path string, settings Settings) (*State, error) {
	s, err := openState(path, settings)
	if err != nil {
		return nil, fmt.Errorf("state file %s: %w", path, withoutPath(err))
	}
	return s, nil
}

func openState(path string, settings Settings) (*State, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	s := &State{path: path, file: file, synced: time.Now()}
	if err := s.read(settings); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return s, nil
}

func (s *State) read(settings Settings) error {
	is, err := snapshotFile(s.file)
	switch {
	case err != nil:
		return err
	case is.kind() != unix.S_IFREG:
		return fmt.Errorf("%w: no regular file", ErrState)
	case is.uid != uint32(os.Geteuid()):
		return ErrStateOwner
	}
	if err := unix.Flock(int(s.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return ErrStateBusy
		}
		return err
	}
	var whole int64
	if s.past, whole, err = parseState(s.file, &settings); err != nil {
		return err
	}
	// Without its first line it is not known to be a state file.
	if is.size > 0 && whole == 0 {
		return fmt.Errorf("%w: it has no whole line", ErrState)
	}
	if whole < is.size {
		return s.file.Truncate(whole)
	}
	if whole > 0 {
		return nil
	}
	return s.begin(settings)
}

// begin writes the first line, durably and with the file's name.
func (s *State) begin(settings Settings) error {
	line, err := json.Marshal(heads{stateFormat, &settings})
	if err != nil {
		return err
	}
	if _, err := s.file.Write(append(line, '\n')); err != nil {
		return err
	}
	if err := s.file.Sync(); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(s.path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Done returns the record of a path that was renewed by a run before this one.
func (s *State) Done(path string) (Record, bool) {
	record, ok := s.past[path]
	return record, ok && record.Outcome == Renewed
}

// Append adds a record.
func (s *State) Append(record Record) error {
	line, err := record.marshal()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.file.Write(line); err != nil {
		return fmt.Errorf("state file %s: %w", s.path, withoutPath(err))
	}
	s.behind++
	if s.behind < syncRecords && time.Since(s.synced) < syncInterval {
		return nil
	}
	return s.syncLocked()
}

// Sync makes all records durable.
func (s *State) Sync() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.syncLocked()
}

func (s *State) syncLocked() error {
	s.behind, s.synced = 0, time.Now()
	if err := s.file.Sync(); err != nil {
		return fmt.Errorf("state file %s: %w", s.path, withoutPath(err))
	}
	return nil
}

// Close makes all records durable and lets others use the file.
func (s *State) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.Join(s.syncLocked(), s.file.Close())
}
