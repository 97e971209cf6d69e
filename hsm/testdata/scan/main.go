// Command scan wraps and unwraps data keys in a token and then looks for what is left
// of them, and of the PIN, in its own memory. It prints a JSON object of counts.
//
//	scan MODULE PIN-FILE DIRECTORY MASKED-PIN
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/hsm"
)

// Report is how often what was looked for stands in memory.
type Report struct {
	// Control counts a key that is kept on purpose, Keys the data keys, Random what the
	// token gave, PIN the PIN.
	Control, Keys, Random, PIN int
	Regions                    int
	Bytes                      int64
}

const (
	workers, rounds = 16, 6
	keySize         = 32
	// mask hides what is looked for from the search for it.
	mask = 0x5c
	// piece is how many bytes in a row count as a copy.
	piece = 12
)

// masked returns data key n with every byte masked; only this form is kept.
func masked(n int) []byte {
	x := uint64(n)*0x9e3779b97f4a7c15 + 0x7654321
	key := make([]byte, keySize)
	for i := range key {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		key[i] = byte(x >> 32)
	}
	return key
}

// unmask writes what is masked to out.
func unmask(out, hidden []byte) {
	for i := range hidden {
		out[i] = hidden[i] ^ mask
	}
}

func main() {
	report, err := run(os.Args[1:])
	if err != nil {
		log.Fatal(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(report); err != nil {
		log.Fatal(err)
	}
}

func run(args []string) (r Report, err error) {
	if len(args) != 4 {
		return r, errors.New("usage: scan MODULE PIN-FILE DIRECTORY MASKED-PIN")
	}
	pin, err := hex.DecodeString(args[3])
	if err != nil {
		return r, err
	}
	token, err := hsm.Open(hsm.Config{
		Module: args[0], Token: hsm.URI{Token: "kms"}, Sessions: workers / 2, Patience: 10 * time.Second,
		Login: &hsm.Ledger{Path: args[2] + "/logins", PIN: hsm.PINSource{File: args[1]}},
	})
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, token.Close()) }()
	for _, suite := range []hsm.Suite{hsm.GCM, hsm.CBCHMAC} {
		if err := work(token, suite); err != nil {
			return r, err
		}
	}
	random, err := draw(token)
	if err != nil {
		return r, err
	}
	control := make([]byte, keySize)
	unmask(control, masked(-1))
	for range 3 {
		runtime.GC()
		time.Sleep(10 * time.Millisecond) // the sweeper runs
	}
	s, err := newScanner()
	if err != nil {
		return r, err
	}
	if r.Control, err = s.count(masked(-1)); err != nil {
		return r, err
	}
	for n := range workers * rounds {
		found, err := s.count(masked(n))
		if err != nil {
			return r, err
		}
		r.Keys += found
	}
	for _, hidden := range random {
		found, err := s.count(hidden)
		if err != nil {
			return r, err
		}
		r.Random += found
	}
	r.PIN, err = s.count(pin)
	r.Regions, r.Bytes = s.regions, s.bytes
	runtime.KeepAlive(control)
	return r, err
}

// work wraps and unwraps every data key, with a deadline and without.
func work(token *hsm.Token, suite hsm.Suite) error {
	k, err := token.CreateKey(context.Background(), suite.String(), suite)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	errs := make([]error, workers)
	for w := range workers {
		wg.Go(func() {
			own := context.Background()
			if w%2 == 0 {
				own = ctx
			}
			// Not on a stack, which leaves copies behind when it grows.
			memory, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			if err != nil {
				errs[w] = err
				return
			}
			material, opened := memory[:keySize:keySize], memory[keySize:keySize]
			for i := range rounds {
				unmask(material, masked(w*rounds+i))
				wrapped, err := token.Wrap(own, k.Versions[0], nil, material, []byte("bound"))
				clear(material)
				if err == nil {
					opened, err = token.Unwrap(own, k.Versions[0], opened[:0], wrapped, []byte("bound"))
				}
				clear(memory)
				errs[w] = errors.Join(errs[w], err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// draw returns random of the token, masked, with a deadline and without.
func draw(token *hsm.Token) (hidden [][]byte, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	memory, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	for i := range rounds {
		own := context.Background()
		if i%2 == 0 {
			own = ctx
		}
		if err := token.Random(own, memory[:keySize]); err != nil {
			return nil, err
		}
		hidden = append(hidden, make([]byte, keySize))
		unmask(hidden[i], memory[:keySize])
		clear(memory)
	}
	return hidden, nil
}

// scanner reads the memory of this process into a buffer of its own, which it leaves
// out.
type scanner struct {
	mem     *os.File
	buffer  []byte
	low     uint64
	regions int
	bytes   int64
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

// count tells how often the beginning or the end of what is masked stands anywhere in
// readable and writable memory.
func (s *scanner) count(hidden []byte) (int, error) {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return 0, err
	}
	s.regions, s.bytes = 0, 0
	found := 0
	lines := bufio.NewScanner(bytes.NewReader(maps))
	for lines.Scan() {
		var low, high uint64
		var mode string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &low, &high, &mode); err != nil {
			return 0, fmt.Errorf("line %q: %w", lines.Text(), err)
		}
		if strings.HasPrefix(mode, "rw") && !strings.HasSuffix(lines.Text(), "[vvar]") {
			s.regions++
			found += s.region(low, high, hidden)
		}
	}
	clear(s.buffer)
	return found, lines.Err()
}

func (s *scanner) region(low, high uint64, hidden []byte) int {
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
		for _, part := range [][]byte{hidden[:piece], hidden[len(hidden)-piece:]} {
			found += countPieces(s.buffer[:n], part)
		}
		if err != nil && err != io.EOF || n == 0 {
			return found
		}
		if n == len(s.buffer) && at+want < high {
			n -= piece - 1 // a copy may lie across the border
		}
		at += uint64(n)
	}
	return found
}

// countPieces looks for a masked piece at any alignment.
func countPieces(b, part []byte) int {
	found := 0
	for rest := b; len(rest) >= piece; {
		i := bytes.IndexByte(rest[:len(rest)-piece+1], part[0]^mask)
		if i < 0 {
			break
		}
		j := 1
		for j < piece && rest[i+j]^mask == part[j] {
			j++
		}
		if j == piece {
			found++
		}
		rest = rest[i+1:]
	}
	return found
}
