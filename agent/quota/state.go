package quota

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	stateName   = "quota.state"
	stateFormat = 1
	// maxState bounds what is read of the file, in bytes.
	maxState = 256 << 20
)

// ErrState is wrapped by the error of counts that cannot be read.
var ErrState = errors.New("the counts of daily limits cannot be read")

// state is what is stored: counts of the day of HighWater.
type state struct {
	// HighWater is the latest time that the Keeper knew, in nanoseconds of Unix
	// time.
	HighWater int64
	Rules     map[string]map[callerKey]daily
}

func keyOf(caller string) callerKey { return sha256.Sum256([]byte(caller)) }

// of returns the counts of a rule, empty at first.
func (s *state) of(rule string) map[callerKey]daily {
	if s.Rules[rule] == nil {
		s.Rules[rule] = map[callerKey]daily{}
	}
	return s.Rules[rule]
}

// document is state as JSON. A caller is the SHA-256 of its SPIFFE ID, a count a
// pair of requests and bytes.
type document struct {
	Format    int                             `json:"format"`
	HighWater int64                           `json:"high_water"`
	Rules     map[string]map[string][2]uint64 `json:"rules"`
}

// marshal returns one line of JSON and one with its SHA-256, in hexadecimal.
func (s *state) marshal() ([]byte, error) {
	d := document{Format: stateFormat, HighWater: s.HighWater, Rules: map[string]map[string][2]uint64{}}
	for rule, counts := range s.Rules {
		if len(counts) == 0 {
			continue
		}
		d.Rules[rule] = make(map[string][2]uint64, len(counts))
		for key, n := range counts {
			d.Rules[rule][base64.RawURLEncoding.EncodeToString(key[:])] = [2]uint64{n.requests, n.bytes}
		}
	}
	text, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(text)
	text = append(text, '\n')
	return append(hex.AppendEncode(text, sum[:]), '\n'), nil
}

var errDamaged = errors.New("it is damaged")

func parseState(content []byte) (state, error) {
	text, sum, _ := bytes.Cut(content, []byte("\n"))
	var d document
	decodeErr := json.Unmarshal(text, &d)
	if decodeErr == nil && d.Format > stateFormat {
		return state{}, fmt.Errorf("it has format %d and this program reads %d: use the version that wrote it", d.Format, stateFormat)
	}
	want := sha256.Sum256(text)
	if hex.EncodeToString(want[:])+"\n" != string(sum) || decodeErr != nil || d.Format != stateFormat || d.HighWater < 0 {
		return state{}, errDamaged
	}
	s := state{HighWater: d.HighWater, Rules: map[string]map[callerKey]daily{}}
	for rule, counts := range d.Rules {
		for text, n := range counts {
			key, err := base64.RawURLEncoding.Strict().DecodeString(text)
			if err != nil || len(key) != len(callerKey{}) {
				return state{}, errDamaged
			}
			s.of(rule)[callerKey(key)] = daily{n[0], n[1]}
		}
	}
	return s, nil
}

// readState returns the zero state where there is no file.
func readState(path string) (state, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return state{}, nil
	}
	var content []byte
	if err == nil {
		content, err = io.ReadAll(io.LimitReader(f, maxState+1))
		_ = f.Close() // it was only read
	}
	if err != nil {
		return state{}, fmt.Errorf("%w: %w; let the agent's user read it", ErrState, err)
	}
	s, err := parseState(content)
	if err == nil && len(content) > maxState {
		err = errDamaged
	}
	if err != nil {
		return state{}, fmt.Errorf("%w: %s: %w; restore it from a backup of the state directory, or remove it, "+
			"which gives every caller the whole of today's limits again", ErrState, path, err)
	}
	return s, nil
}

// Check reports whether the counts in the state directory dir can be read, or
// there are none. The error is that of Open.
func Check(dir string) error {
	_, err := readState(filepath.Join(dir, stateName))
	return err
}

// write replaces the file: at any moment, and after any crash, it is the old one
// or the new one, and readable by its owner alone.
func (s *state) write(path string) error {
	content, err := s.marshal()
	if err == nil {
		err = replace(path, content)
	}
	if err != nil {
		return fmt.Errorf("%w: %w; check space and permissions of %s", ErrUnavailable, err, filepath.Dir(path))
	}
	return nil
}

func replace(path string, content []byte) error {
	// One name for all times: a process that is killed leaves one such file at most.
	unfinished := path + ".new"
	if err := os.Remove(unfinished); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(unfinished, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(unfinished, path); err != nil {
		return err
	}
	return syncDirectory(filepath.Dir(path))
}

func syncDirectory(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
