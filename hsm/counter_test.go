package hsm_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/hsm"
)

// aVersion is a version whose wraps are counted, and no more.
func aVersion(id byte) *hsm.Version {
	return &hsm.Version{Key: "orders", Number: 1, Suite: hsm.GCM, ID: hsm.ID{id}}
}

func openCounter(t *testing.T, dir string, share uint64) *hsm.Counter {
	t.Helper()
	c, err := hsm.OpenCounter(dir, share, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A process that ends without giving back what it reserved costs a block at most, 1/4096
// of the limit: however many hosts share one.
func TestWhatACrashCosts(t *testing.T) {
	const crashes = 40
	for _, share := range []uint64{1, 1000, 10_000, 1_000_000} {
		dir, v := t.TempDir(), aVersion(1)
		for range crashes {
			if err := openCounter(t, dir, share).Take(v); err != nil {
				t.Fatalf("shared by %d: %v", share, err)
			}
		}
		used, limit, err := openCounter(t, dir, share).Used(v)
		if most := crashes * max(limit/4096, 1); err != nil || limit != (1<<32)/share || used > most {
			t.Errorf("shared by %d: %d of %d wraps are used, %v; want %d at most", share, used, limit, err, most)
		}
	}
}

// Processes that share a directory make all wraps that there are, and none more; what one
// gives back the others have. Half of them is told once by each that still makes some.
func TestProcessesShareALimit(t *testing.T) {
	const share = 1_000_000
	dir, v := t.TempDir(), aVersion(1)
	var told [2]int
	var takers sync.WaitGroup
	var made [2]uint64
	for i := range told {
		c, err := hsm.OpenCounter(dir, share, func(*hsm.Version, uint64, uint64) { told[i]++ })
		if err != nil {
			t.Fatal(err)
		}
		takers.Go(func() {
			for err = c.Take(v); err == nil || hsm.KindOf(err) == hsm.Unavailable; err = c.Take(v) {
				if err == nil { // else the other one was quicker all the time
					made[i]++
				}
			}
			if hsm.KindOf(err) != hsm.KeyUnusable || !strings.Contains(err.Error(), "kms-agent hsm rotate orders") {
				t.Errorf("one too many: %v", err)
			}
		})
	}
	takers.Wait()
	if n := made[0] + made[1]; n != (1<<32)/share || max(told[0], told[1]) != 1 {
		t.Errorf("%d wraps, half of them told %v times; want %d, and once", n, told, (1<<32)/share)
	}
	one := aVersion(2)
	c := openCounter(t, dir, 1000)
	if err := errors.Join(c.Take(one), c.Close()); err != nil {
		t.Fatal(err)
	}
	if used, _, err := openCounter(t, dir, 1000).Used(one); err != nil || used != 1 {
		t.Errorf("%d wraps are used, %v; want the one that was made", used, err)
	}
}

// While another process holds the counts nobody waits who has something reserved, and the
// others wait together, not one after the other.
func TestCountsHeldByAnother(t *testing.T) {
	dir, known := t.TempDir(), aVersion(1)
	c := openCounter(t, dir, 1)
	if err := c.Take(known); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "wraps.json.lock"), os.O_RDWR, 0)
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	var waiting sync.WaitGroup
	for i := range 9 {
		waiting.Go(func() {
			if err := c.Take(aVersion(byte(2 + i%3))); hsm.KindOf(err) != hsm.Unavailable {
				t.Errorf("Take: %v, want Unavailable", err)
			}
		})
	}
	for range 10 {
		if err := c.Take(known); err != nil {
			t.Errorf("Take of what is reserved: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if d := time.Since(began); d > time.Second {
		t.Errorf("who has something reserved waits: %v", d)
	}
	waiting.Wait()
	if d := time.Since(began); d > 4*time.Second {
		t.Errorf("all waited %v", d)
	}
	if err := errors.Join(lock.Close(), c.Take(aVersion(2))); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// Counts that cannot be read keep nobody from opening, nor from wrapping with suites that
// do not wear out. The error says what to do, and it is over once that is done.
func TestCountsThatCannotBeRead(t *testing.T) {
	for name, c := range map[string]struct{ content, says, not string }{
		"damaged":      {"{", "remove the file", "later one"},
		"of no format": {`{"wraps":{}}`, "remove the file", "later one"},
		"negative":     {`{"format":1,"wraps":{"00112233445566778899aabbccddeeff":-1}}`, "remove the file", "later one"},
		"null":         {`{"format":1,"wraps":{"00112233445566778899aabbccddeeff":null}}`, "remove the file", "later one"},
		"in capitals":  {`{"format":1,"wraps":{"00112233445566778899AABBCCDDEEFF":4294967296}}`, "remove the file", "later one"},
		"no ID":        {`{"format":1,"wraps":{"rubbish":7}}`, "remove the file", "later one"},
		"a short ID":   {`{"format":1,"wraps":{"00":7}}`, "remove the file", "later one"},
		"an ID twice":  {`{"format":1,"wraps":{"00112233445566778899aabbccddeeff":9,"00112233445566778899aabbccddeeff":1}}`, "remove the file", "later one"},
		"counts twice": {`{"format":1,"wraps":{"00112233445566778899aabbccddeeff":9},"wraps":{}}`, "remove the file", "later one"},
		"two objects":  {`{"format":1,"wraps":{}}{}`, "remove the file", "later one"},
		"no object":    {`{"format":1,"wraps":null}`, "remove the file", "later one"},
		"newer":        {`{"format":2,"wraps":[]}`, "have format 2", "remove"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "wraps.json")
			if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
				t.Fatal(err)
			}
			counter, err := hsm.OpenCounter(dir, 1, nil)
			if err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), c.not) || strings.Contains(err.Error(), "\n") {
				t.Errorf("OpenCounter: %v, want %q in one line", err, c.says)
			}
			if now := counter.Problem(); now == nil || now.Error() != err.Error() {
				t.Errorf("Problem: %v, want %v", now, err)
			}
			if err := counter.Take(aVersion(1)); hsm.KindOf(err) != hsm.Unavailable || !strings.Contains(err.Error(), c.says) {
				t.Errorf("Take: %v, want Unavailable with the cure", err)
			}
			if b, err := os.ReadFile(path); err != nil || string(b) != c.content {
				t.Errorf("the file is now %q, %v", b, err)
			}
			if err := errors.Join(counter.Close(), os.Remove(path), counter.Take(aVersion(1)), counter.Problem()); err != nil {
				t.Errorf("without the file: %v", err)
			}
		})
	}
	var c *hsm.Counter
	dir := t.TempDir()
	r := newRig(t, func(_ *rig, cfg *hsm.Config) { c = openCounter(t, dir, 1); cfg.Wraps = c })
	v, other, m := r.key("orders", hsm.GCM), r.key("letters", hsm.CBCHMAC), material(32)
	wrapped := r.wrap(v, m)
	if err := errors.Join(c.Close(), os.WriteFile(filepath.Join(dir, "wraps.json"), []byte("{"), 0o600)); err != nil {
		t.Fatal(err)
	}
	r.opens(v, wrapped, m)
	r.opens(other, r.wrap(other, m), m)
	if _, err := r.Wrap(bounded(t), v, nil, m, bound); kindOf(err) != hsm.Unavailable {
		t.Errorf("Wrap: %v, want that it cannot be counted", err)
	}
	if n := r.attached(); n != 1 {
		t.Errorf("attached %d times, want once", n)
	}
}
