package hsm

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sync/singleflight"
)

const (
	// maxBlock is how many wraps are reserved at a time at most, blocks how many blocks a
	// limit has at least. A block is what a crash loses, and what the other processes of
	// this host do not get.
	maxBlock = 1 << 16
	blocks   = 1 << 12
	// counterPatience is how long another process may hold the counts.
	counterPatience = 2 * time.Second
)

// Counter counts the wraps of each version on this host, those for callers, canaries and
// tests of the key alike, for suites whose keys wear out: GCM with random initialization
// vectors (SP 800-38D, section 8.3). It counts across restarts and over the processes that
// use a directory, in blocks that a process reserves. So the last wraps of a version may
// be refused while another process has some left: a block for each of them, 1/4096 of the
// limit. It is safe for concurrent use.
type Counter struct {
	path  string
	share uint64 // hosts among which a limit is divided
	// worn is told once in a life of the process when half of a limit is used up.
	worn func(v *Version, used, limit uint64)

	reserving singleflight.Group // by version: one goes to the file, with no lock held here

	mu   sync.Mutex
	left map[ID]*reserved // mu guards left and what it has
}

// reserved is what this process may still use of what it has reserved.
type reserved struct {
	left  uint64
	total uint64 // reserved on this host, by the last look at the file
	told  bool   // that half is used up
}

// counters is the file's content.
type counters struct {
	Format int               `json:"format"`
	Wraps  map[string]uint64 `json:"wraps"` // reserved on this host
}

// OpenCounter opens the counts in a directory of this plugin's; where there are none they
// begin at 0. share is how many hosts use the keys, 1 at least. worn, which may be nil, is
// told when half of what a version may do on this host is done. The Counter is good for
// use also with an error, which is that of Problem.
func OpenCounter(dir string, share uint64, worn func(v *Version, used, limit uint64)) (*Counter, error) {
	c := &Counter{path: filepath.Join(dir, "wraps.json"), share: max(share, 1), worn: worn, left: map[ID]*reserved{}}
	if c.worn == nil {
		c.worn = func(*Version, uint64, uint64) {}
	}
	return c, c.Problem()
}

// Problem tells why the counts cannot be read now, with the cure; nil where they can.
// Until then Take reserves nothing.
func (c *Counter) Problem() error {
	_, err := c.read()
	return err
}

func (c *Counter) read() (counters, error) {
	file := counters{Format: 1, Wraps: map[string]uint64{}}
	b, err := os.ReadFile(c.path)
	if errors.Is(err, fs.ErrNotExist) {
		return file, nil
	}
	if err != nil {
		return file, fmt.Errorf("the counts of wraps: %w", err)
	}
	fields, err := object(b)
	if err == nil {
		file.Format = 0
		// The format first: the rest may be of another kind there.
		if err = json.Unmarshal(fields["format"], &file.Format); err == nil && file.Format > 1 {
			return file, fmt.Errorf("the counts of wraps in %s have format %d, this release reads format 1: use the release that wrote them, or a later one", c.path, file.Format)
		}
	}
	if err == nil && file.Format != 1 {
		err = errors.New("they have no format")
	}
	if err == nil {
		file.Wraps, err = parseWraps(fields["wraps"])
	}
	if err != nil {
		return file, fmt.Errorf("the counts of wraps in %s are damaged, so it is not known how much keys were used: "+
			"rotate the keys of this backend, then remove the file: %w", c.path, err)
	}
	return file, nil
}

// parseWraps reads counts as they are written here. Nothing else is one: a count that is
// not understood would be one of 0.
func parseWraps(b []byte) (map[string]uint64, error) {
	fields, err := object(b)
	if err != nil {
		return nil, err
	}
	wraps := make(map[string]uint64, len(fields))
	for id, value := range fields {
		if b, err := hex.DecodeString(id); err != nil || len(b) != idSize || hex.EncodeToString(b) != id {
			return nil, fmt.Errorf("a count of %.100q, which is no ID", id)
		}
		var n *uint64
		if err := json.Unmarshal(value, &n); err != nil || n == nil {
			return nil, fmt.Errorf("the count of %s is %.100s", id, value)
		}
		wraps[id] = *n
	}
	return wraps, nil
}

// object reads a JSON object in which no name comes twice.
func object(b []byte) (map[string]json.RawMessage, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	fields := map[string]json.RawMessage{}
	if begin, err := d.Token(); err != nil || begin != json.Delim('{') {
		return nil, errors.New("there is no JSON object")
	}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, err
		}
		key, _ := name.(string) // it always is
		if _, twice := fields[key]; twice {
			return nil, fmt.Errorf("%.100q is there twice", key)
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, err
		}
		fields[key] = value
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is more after it")
	}
	return fields, nil
}

// limit is how many wraps a version may make on this host; 0 means any number.
func (c *Counter) limit(v *Version) uint64 { return v.Suite.maxWraps() / c.share }

// Take counts one wrap. Where the version has made all that it may on this host it
// returns an error of kind KeyUnusable, where the counts cannot be kept one of kind
// Unavailable. It waits for the disk, once in a block, and then for other processes, no
// longer than seconds.
func (c *Counter) Take(v *Version) error {
	limit := c.limit(v)
	if v.Suite.maxWraps() == 0 {
		return nil
	}
	for {
		used, half, ok := c.takeReserved(v, limit)
		if half {
			c.worn(v, used, limit)
		}
		if ok {
			return nil
		}
		_, err, _ := c.reserving.Do(string(v.ID[:]), func() (any, error) { return nil, c.reserve(v, limit) })
		if err != nil {
			return err
		}
	}
}

// untake gives back what Take took for a wrap that was not made.
func (c *Counter) untake(v *Version) {
	if v.Suite.maxWraps() == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if r := c.left[v.ID]; r != nil && r.left < r.total {
		r.left++
	}
}

// takeReserved takes one wrap of those that are reserved. half says that it is the first
// one after which half of the limit is used.
func (c *Counter) takeReserved(v *Version, limit uint64) (used uint64, half, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.left[v.ID]
	if r == nil || r.left == 0 {
		return 0, false, false
	}
	r.left--
	used = r.total - r.left
	half = !r.told && used >= limit/2
	r.told = r.told || half
	return used, half, true
}

// reserve reserves a block of what is left of the limit, unless others have.
func (c *Counter) reserve(v *Version, limit uint64) error {
	c.mu.Lock()
	r := c.left[v.ID]
	if r == nil {
		r = &reserved{}
		c.left[v.ID] = r
	}
	has := r.left > 0 // somebody came between who took the last one and this
	c.mu.Unlock()
	if has {
		return nil
	}
	id := hex.EncodeToString(v.ID[:])
	var block, total uint64
	err := c.change(func(wraps map[string]uint64) {
		block = min(min(max(limit/blocks, 1), maxBlock), limit-min(wraps[id], limit))
		total = wraps[id] + block
		wraps[id] = total
	})
	if err != nil {
		e := errorf(Unavailable, err, "the counts of wraps cannot be kept")
		e.VersionOnly = true
		return e
	}
	if block == 0 {
		return c.wornOut(v, limit)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	r.left, r.total = r.left+block, total
	c.left[v.ID] = r // Close may have forgotten it
	return nil
}

func (c *Counter) wornOut(v *Version, limit uint64) error {
	return errorf(KeyUnusable, nil, "version %d of key %s has made all its %d wraps on this host: rotate the key with 'kms-agent hsm rotate %s'", v.Number, v.Key, limit, v.Key)
}

// change changes the file, alone among the processes that use it.
func (c *Counter) change(how func(wraps map[string]uint64)) error {
	unlock, err := lockFile(c.path+".lock", counterPatience)
	if err != nil {
		return err
	}
	defer unlock()
	file, err := c.read()
	if err != nil {
		return err
	}
	how(file.Wraps)
	b, err := json.Marshal(file)
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(c.path, b, 0o600); err != nil {
		return err
	}
	return syncDirectory(filepath.Dir(c.path))
}

// Used returns how many wraps of a version were made on this host, at most, and how
// many there may be; a limit of 0 is none.
func (c *Counter) Used(v *Version) (used, limit uint64, err error) {
	file, err := c.read()
	if err != nil {
		return 0, 0, err
	}
	used = file.Wraps[hex.EncodeToString(v.ID[:])]
	c.mu.Lock()
	defer c.mu.Unlock()
	if r := c.left[v.ID]; r != nil {
		used -= min(r.left, used)
	}
	return used, c.limit(v), nil
}

// mayTake tells whether Take would refuse a version for good.
func (c *Counter) mayTake(v *Version) error {
	if used, limit, err := c.Used(v); err == nil && limit != 0 && used >= limit {
		return c.wornOut(v, limit)
	}
	return nil
}

// Close gives back what was reserved and not used.
func (c *Counter) Close() error {
	c.mu.Lock()
	unused := map[string]uint64{}
	for id, r := range c.left {
		if r.left > 0 {
			unused[hex.EncodeToString(id[:])] = r.left
		}
		r.left = 0
	}
	clear(c.left)
	c.mu.Unlock()
	if len(unused) == 0 {
		return nil
	}
	return c.change(func(wraps map[string]uint64) {
		for id, n := range unused {
			wraps[id] -= min(n, wraps[id])
		}
	})
}
