// Command scan takes data keys through the cache, the message format and a sealed store
// in the directory that it is given, lets go of them, and then looks for what is left of them in its own memory. It
// prints a JSON object of counts.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
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

	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/cache/seal"
	"github.com/kms-agent/kms-agent/envelope"
)

// Report is what was found.
type Report struct {
	// Control counts the copies of a key that is kept on purpose, InUse those of
	// a data key in use outside of protected memory, Left those of all data keys
	// after eviction and release.
	Control, InUse, Left int
	Regions, Unreadable  int
	Bytes                int64
	Memory               string
}

const (
	keys = 16
	// mask hides the keys that are looked for from the search for them.
	mask = 0x5c
	// piece is how many bytes in a row count as a copy: half of a data key.
	piece = cache.DataKeySize / 2
)

// masked returns key n with every byte masked; only this form is kept.
func masked(n int) (key [cache.DataKeySize]byte) {
	x := uint64(n)*0x9e3779b97f4a7c15 + 0x1234567
	for i := range key {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		key[i] = byte(x >> 32)
	}
	return key
}

// fill gives key n in clear, made in place.
func fill(n int) cache.Fill {
	return func(context.Context) (cache.Material, error) {
		hidden := masked(n)
		material := make([]byte, cache.DataKeySize)
		for i := range material {
			material[i] = hidden[i] ^ mask
		}
		return cache.Material{DataKey: material}, nil
	}
}

func main() {
	report, err := run()
	if err != nil {
		log.Fatal(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(report); err != nil {
		log.Fatal(err)
	}
}

func run() (Report, error) {
	s, err := newScanner()
	if err != nil {
		return Report{}, err
	}
	control := make([]byte, cache.DataKeySize)
	hidden := masked(-1)
	for i := range control {
		control[i] = hidden[i] ^ mask
	}
	if err := inAnotherLife(); err != nil {
		return Report{}, err
	}
	c, end, err := newCache()
	if err != nil {
		return Report{}, err
	}
	defer end()
	fromStore := request(0)
	fromStore.Fill = func(context.Context) (cache.Material, error) { return cache.Material{}, errors.New("not in the store") }
	inUse, err := c.Decrypt(context.Background(), fromStore)
	if err != nil {
		return Report{}, err
	}
	if !same(inUse.DataKey(), 0) {
		return Report{}, fmt.Errorf("the data key in use is not the one that was made")
	}
	collect()
	var report Report
	report.Memory = c.Stats().Memory
	if report.InUse, err = s.count(0); err != nil {
		return report, err
	}
	inUse.Release()
	c.EvictAll()
	if err := c.Flush(context.Background()); err != nil {
		return report, err
	}
	collect()
	for n := range keys {
		found, err := s.count(n)
		if err != nil {
			return report, err
		}
		report.Left += found
	}
	if report.Control, err = s.count(-1); err != nil {
		return report, err
	}
	report.Regions, report.Unreadable, report.Bytes = s.regions, s.unreadable, s.bytes
	runtime.KeepAlive(control)
	return report, nil
}

// inAnotherLife uses the data keys, and leaves them in the store.
func inAnotherLife() error {
	c, end, err := newCache()
	if err != nil {
		return err
	}
	defer end()
	return work(c)
}

// newCache is a cache that has taken in what the store has.
func newCache() (c *cache.Cache, end func(), err error) {
	sealer, err := seal.OpenFile(filepath.Join(os.Args[1], "sealer"))
	if err != nil {
		return nil, nil, err
	}
	file, err := seal.OpenStore(filepath.Join(os.Args[1], "store"), sealer)
	if err != nil {
		return nil, nil, err
	}
	began := time.Now()
	c, err = cache.New(cache.Config{
		Now: func() time.Duration { return time.Since(began) }, MaxEntries: keys,
		Classify: func(error) cache.Verdict { return cache.Other },
		Confirm:  func(context.Context, cache.Authority, any) error { return nil },
		Store: &cache.StoreConfig{
			File: file, Wall: time.Now, Boot: "every process is a boot of its own " + began.String(),
			Marshal:   func(any) ([]byte, error) { return []byte("origin"), nil },
			Unmarshal: func([]byte) (any, error) { return nil, nil }, //nolint:nilnil // there is none
		},
	})
	if err != nil {
		return nil, nil, err
	}
	_, err = c.Restore(func([]cache.Note) cache.Accept {
		return func(cache.Authority) (string, cache.Limits, bool) { return "key", limits(), true }
	})
	return c, func() { c.Close(); file.Close(); sealer.Close() }, err
}

func limits() cache.Limits { return cache.Limits{MaxAge: time.Hour, Store: true} }

// same compares without a copy.
func same(key []byte, n int) bool {
	hidden := masked(n)
	for i := range key {
		if key[i]^mask != hidden[i] {
			return false
		}
	}
	return true
}

func request(n int) cache.DecryptRequest {
	return cache.DecryptRequest{
		Caller: "caller", Key: "key", ID: cache.DecryptID{byte(n), 1}, Fill: fill(n),
		Authority: cache.Authority{Backend: "b", WrappingKey: "k", Version: "1", Direction: cache.Decrypt},
		Limits:    limits(),
	}
}

// work uses every data key as the agent does.
func work(c *cache.Cache) error {
	edks := []envelope.EDK{{ProviderID: "test", ProviderInfo: []byte("key"), Ciphertext: []byte("wrapped")}}
	plaintext := []byte("some data")
	for round := range 3 {
		for n := range keys {
			use, err := c.Decrypt(context.Background(), request(n))
			if err != nil {
				return err
			}
			message, err := envelope.Seal(nil, use.DataKey(), edks, map[string]string{"round": fmt.Sprint(round)}, plaintext)
			if err != nil {
				return err
			}
			parsed, err := envelope.Parse(message)
			if err != nil {
				return err
			}
			opened, err := parsed.Open(nil, use.DataKey())
			if err != nil {
				return err
			}
			if !bytes.Equal(opened, plaintext) {
				return fmt.Errorf("key %d: another plaintext", n)
			}
			use.Release()
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

func (s *scanner) region(low, high uint64, hidden [cache.DataKeySize]byte) int {
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
func countPieces(b []byte, hidden [cache.DataKeySize]byte) int {
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
