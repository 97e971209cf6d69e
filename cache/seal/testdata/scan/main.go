// Command scan takes data keys through a sealed store, lets go of them, and then
// looks for what is left of them, and of the sealer's secret, in its own memory.
// It prints a JSON object of counts. Its argument is an empty directory.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/cache/seal"
)

// Report is what was found: pieces of a key that is kept on purpose, of data
// keys and secret while they are loaded, and afterwards.
type Report struct {
	Control, InUse, Left int
	Regions, Unreadable  int
	Bytes                int64
}

const (
	keys = 16
	size = 32
	// mask hides the keys that are looked for from the search for them.
	mask = 0x5c
	// piece is how many bytes in a row count as a copy: half of a key.
	piece = size / 2
	// secret is the number of the sealer's secret, control that of a key that is
	// left in memory on purpose.
	secret, control = -2, -1
)

// masked returns key n with every byte masked; only this form is kept.
func masked(n int) (key [size]byte) {
	x := uint64(n)*0x9e3779b97f4a7c15 + 0x1234567
	for i := range key {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		key[i] = byte(x >> 32)
	}
	return key
}

// unmask writes key n in clear to b.
func unmask(b []byte, n int) {
	hidden := masked(n)
	for i := range b {
		b[i] = hidden[i] ^ mask
	}
}

func main() {
	report, err := run(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(report); err != nil {
		log.Fatal(err)
	}
}

func run(dir string) (report Report, err error) {
	s, err := newScanner()
	if err != nil {
		return report, err
	}
	kept := make([]byte, size)
	unmask(kept, control)
	sealer, err := newSealer(filepath.Join(dir, "sealer"))
	if err != nil {
		return report, err
	}
	store, err := seal.OpenStore(filepath.Join(dir, "store"), sealer)
	if err != nil {
		return report, err
	}
	if err := save(store); err != nil {
		return report, err
	}
	loaded, err := store.Load()
	if err != nil {
		return report, err
	}
	if err := check(loaded.Records); err != nil {
		return report, err
	}
	collect()
	if report.InUse, err = s.all(); err != nil {
		return report, err
	}
	loaded.Free()
	store.Close()
	sealer.Close()
	collect()
	if report.Left, err = s.all(); err != nil {
		return report, err
	}
	report.Control, err = s.count(control)
	report.Regions, report.Unreadable, report.Bytes = s.regions, s.unreadable, s.bytes
	runtime.KeepAlive(kept)
	return report, err
}

// all counts the pieces of all data keys and of the sealer's secret.
func (s *scanner) all() (found int, err error) {
	for _, n := range append([]int{secret}, numbers()...) {
		more, err := s.count(n)
		if err != nil {
			return 0, err
		}
		found += more
	}
	return found, nil
}

func numbers() (list []int) {
	for n := range keys {
		list = append(list, n)
	}
	return list
}

// newSealer opens a file sealer whose secret is known to the search.
func newSealer(path string) (*seal.File, error) {
	state := make([]byte, size+8)
	unmask(state[:size], secret)
	err := os.WriteFile(path, state, 0o600)
	clear(state)
	if err != nil {
		return nil, err
	}
	return seal.OpenFile(path)
}

// save stores the data keys from protected memory, as the agent does.
func save(store *seal.Store) error {
	memory, err := seal.NewMemory(keys * size)
	if err != nil {
		return err
	}
	defer memory.Free()
	var records []seal.Record
	for n := range keys {
		value := memory.Bytes()[n*size : (n+1)*size]
		unmask(value, n)
		records = append(records, seal.Record{Type: seal.DataKey, Value: value})
	}
	for range 3 {
		if err := store.Save(records); err != nil {
			return err
		}
	}
	return nil
}

// check compares without a copy.
func check(records []seal.Record) error {
	for n := range keys {
		hidden := masked(n)
		for i, b := range records[n].Value {
			if b^mask != hidden[i] {
				return fmt.Errorf("data key %d differs", n)
			}
		}
	}
	return nil
}

// collect has everything that is not reachable erased and freed.
func collect() {
	for range 3 {
		runtime.GC()
		time.Sleep(10 * time.Millisecond) // the sweeper and finalizers run
	}
}

// scanner reads the memory of this process into a buffer of its own, which it
// leaves out.
type scanner struct {
	mem        *os.File
	buffer     []byte
	low        uint64
	regions    int
	unreadable int
	bytes      int64
}

func newScanner() (*scanner, error) {
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		return nil, err
	}
	buffer, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	low := uint64(uintptr(unsafe.Pointer(&buffer[0]))) //nolint:gosec // the address alone, to leave it out
	return &scanner{mem: mem, buffer: buffer, low: low}, nil
}

// count tells how often a piece of key n stands anywhere in readable and
// writable memory. What the kernel does not let even this process read through
// /proc is memfd_secret memory.
func (s *scanner) count(n int) (int, error) {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return 0, err
	}
	s.regions, s.unreadable, s.bytes = 0, 0, 0
	found := 0
	lines := bufio.NewScanner(bytes.NewReader(maps))
	for lines.Scan() {
		var low, high uint64
		var mode string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &low, &high, &mode); err != nil {
			return 0, fmt.Errorf("line %q: %w", lines.Text(), err)
		}
		if !strings.HasPrefix(mode, "rw") || strings.HasSuffix(lines.Text(), "[vvar]") {
			continue
		}
		s.regions++
		hidden := masked(n)
		found += s.region(low, high, hidden)
	}
	clear(s.buffer)
	return found, lines.Err()
}

func (s *scanner) region(low, high uint64, hidden [size]byte) int {
	found := 0
	for at := low; at < high; {
		want := min(high-at, uint64(len(s.buffer)))
		if s.low < at+want && at < s.low+uint64(len(s.buffer)) { // the buffer itself
			if at >= s.low {
				at = s.low + uint64(len(s.buffer))
				continue
			}
			want = s.low - at
		}
		n, err := s.mem.ReadAt(s.buffer[:want], int64(at))
		s.bytes += int64(n)
		found += countPieces(s.buffer[:n], hidden)
		if err != nil && err != io.EOF || n == 0 {
			s.unreadable++
			return found
		}
		if n == len(s.buffer) && at+want < high {
			n -= piece - 1 // a copy may lie across the border
		}
		at += uint64(n)
	}
	return found
}

// countPieces looks for either half, at any alignment.
func countPieces(b []byte, hidden [size]byte) int {
	found := 0
	if len(b) < piece {
		return 0
	}
	for _, start := range []int{0, piece} {
		half := hidden[start : start+piece]
		for rest := b; len(rest) >= piece; {
			i := bytes.IndexByte(rest[:len(rest)-piece+1], half[0]^mask)
			if i < 0 {
				break
			}
			j := 1
			for j < piece && rest[i+j]^mask == half[j] {
				j++
			}
			if j == piece {
				found++
			}
			rest = rest[i+1:]
		}
	}
	return found
}
