package cache_test

import (
	"fmt"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/cache/seal"
)

// machine is a host on which caches with one store come and go. What the sealer of the
// kernel or a TPM does, its own does too.
type machine struct {
	t      *testing.T
	up     *upstream
	dir    string
	sealer *sealer
	boot   int
	booted time.Time     // when the boot clock was zero
	skew   time.Duration // of the time of day
	last   *rig          // whose process lives
	file   *seal.Store
	every  time.Duration
	wears  bool
	blank  bool         // processes do not restore
	notes  []cache.Note // what the next process is told to note
	noted  []cache.Note // what the last one was given back
	accept cache.Accept
	// restored is what the last start found, refused how it failed.
	restored cache.Restored
	refused  error
}

// onMachine runs a test with time under control.
func onMachine(t *testing.T, test func(*machine)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		m := &machine{t: t, up: &upstream{}, dir: dir, boot: 1, booted: time.Now().Add(-time.Hour), accept: acceptAll}
		m.sealer = newSealer(t, 1)
		defer m.crash()
		test(m)
	})
}

// acceptAll is a configuration that has not changed.
func acceptAll(a cache.Authority) (string, cache.Limits, bool) { return "orders", lasting(), true }

// lasting are limits of what is stored.
func lasting() cache.Limits {
	l := limits()
	l.Store, l.Grace = true, grace
	return l
}

// stored and stored2 make requests be for what is stored.
func stored(r *cache.EncryptRequest)  { r.Limits = lasting() }
func stored2(r *cache.DecryptRequest) { r.Limits = lasting() }

func (m *machine) path() string { return filepath.Join(m.dir, "store") }

func (m *machine) Now() time.Duration { return time.Since(m.booted) }

// start begins a process.
func (m *machine) start(change ...func(*cache.Config)) *rig {
	m.t.Helper()
	file, err := seal.OpenStore(m.path(), m.sealer)
	if err != nil {
		m.t.Fatalf("OpenStore: %v", err)
	}
	m.file = file
	m.last = newRig(m.t, append([]func(*cache.Config){func(c *cache.Config) {
		c.Now, c.Confirm = m.Now, m.up.Confirm
		c.Store = &cache.StoreConfig{
			File: file, Wall: func() time.Time { return time.Now().Add(m.skew) }, Boot: fmt.Sprint("boot-", m.boot),
			Every: m.every, Wears: m.wears,
			Marshal: func(origin any) ([]byte, error) {
				n, _ := origin.(int)
				return []byte(strconv.Itoa(n)), nil
			},
			Unmarshal: func(b []byte) (any, error) { return strconv.Atoi(string(b)) },
			Notes:     func() []cache.Note { return m.notes },
		}
	}}, change...)...)
	m.last.up = m.up
	if m.blank {
		return m.last
	}
	m.restored, m.refused = m.last.Restore(func(notes []cache.Note) cache.Accept {
		m.noted = notes
		return m.accept
	})
	return m.last
}

// crash ends the process as kill -9 does: nothing reaches the disk any more.
func (m *machine) crash() {
	if m.last != nil {
		m.file.Close()
		m.last.Close()
		m.last = nil
	}
}

// stop ends it in order.
func (m *machine) stop() {
	m.last.Close()
	m.file.Close()
	m.last = nil
}

// reboot has the boot clock begin anew.
func (m *machine) reboot() {
	m.boot++
	m.booted = time.Now().Add(-10 * time.Second)
}

// saved has what changed saved, as Run would.
func (m *machine) saved() {
	m.t.Helper()
	stop := m.last.run()
	time.Sleep(max(m.every, 10*time.Second) + time.Second)
	stop()
	synctest.Wait()
	if s := m.last.StoreStats(); s.Err != nil || s.Saves == 0 {
		m.t.Fatalf("not saved: %+v", s)
	}
}

// sealer has its counter in memory.
type sealer struct {
	*seal.Key

	mu      sync.Mutex // guards what follows
	counter uint64
	broken  error
	stage   stage
	// slow is how long it takes to count.
	slow time.Duration
}

// stage is where in a save a sealer fails.
type stage int

const (
	unwritten stage = iota // nothing is on disk
	uncounted              // the file is written, and does not count yet
	counted                // it does, and nobody is told
)

// breaks makes the sealer fail, or work again.
func (s *sealer) breaks(err error, at stage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken, s.stage = err, at
}

func (s *sealer) Seal(dst, plaintext, aad []byte) ([]byte, error) {
	s.mu.Lock()
	broken := s.broken
	if s.stage != unwritten {
		broken = nil
	}
	s.mu.Unlock()
	if broken != nil {
		return nil, broken
	}
	return s.Key.Seal(dst, plaintext, aad)
}

// takes has counting take its time.
func (s *sealer) takes(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slow = d
}

func (s *sealer) advances() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counter
}

func newSealer(t *testing.T, secret byte) *sealer {
	t.Helper()
	key, err := seal.NewKey(append([]byte{secret}, make([]byte, seal.SecretSize-1)...))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(key.Free)
	return &sealer{Key: key}
}

func (s *sealer) Counter() (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counter, nil
}

func (s *sealer) Advance() (uint64, error) {
	s.mu.Lock()
	slow := s.slow
	s.mu.Unlock()
	time.Sleep(slow)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken == nil || s.stage == counted {
		s.counter++
	}
	return s.counter, s.broken
}

func (s *sealer) String() string { return "a sealer of this test" }

// directions runs a test for encryption, decryption and spares; use asks for the one
// data key and returns which it was.
func directions(t *testing.T, test func(m *machine, a cache.Authority, use func() (cache.Freshness, int, error))) {
	t.Helper()
	for _, kind := range []string{"encrypt", "decrypt", "spare"} {
		t.Run(kind, func(t *testing.T) {
			onMachine(t, func(m *machine) {
				a, use := wraps, func() (cache.Freshness, int, error) { return m.last.encrypt(stored) }
				switch kind {
				case "decrypt":
					a, use = unwraps, func() (cache.Freshness, int, error) { return m.last.decrypt(1, stored2) }
				case "spare":
					// Each use goes on until another data key than before serves.
					some := lasting()
					some.MaxMessages, some.Spares = 100, 1
					m.accept = func(cache.Authority) (string, cache.Limits, bool) { return "orders", some, true }
					before := 0
					use = func() (f cache.Freshness, n int, err error) {
						for n = before; n == before && err == nil; {
							f, n, err = m.last.encrypt(func(r *cache.EncryptRequest) { r.Limits = some })
						}
						before = n
						return f, n, err
					}
				}
				test(m, a, use)
			})
		})
	}
}
