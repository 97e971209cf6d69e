package hsm

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/google/renameio/v2"
)

// counterBlock is how many wraps are reserved at a time: what a crash loses.
const counterBlock = 1 << 16

// Counter counts the wraps of each version on this host, those for callers, canaries and
// tests of the key alike, for suites whose keys wear out: GCM with random initialization
// vectors (SP 800-38D, section 8.3). It counts across restarts and over the processes that use a directory. It is safe for
// concurrent use.
type Counter struct {
	path  string
	share uint64 // hosts among which a limit is divided
	// worn is told once in a life of the process when half of a limit is used up.
	worn func(v *Version, used, limit uint64)

	mu   sync.Mutex
	left map[ID]*reserved // mu guards left
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

// OpenCounter reads the counts in a directory of this plugin's. share is how many
// hosts use the keys, 1 at least. worn, which may be nil, is told when half of what a
// version may do on this host is done.
func OpenCounter(dir string, share uint64, worn func(v *Version, used, limit uint64)) (*Counter, error) {
	c := &Counter{path: filepath.Join(dir, "wraps.json"), share: max(share, 1), worn: worn, left: map[ID]*reserved{}}
	if c.worn == nil {
		c.worn = func(*Version, uint64, uint64) {}
	}
	_, err := c.read()
	return c, err
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
	file = counters{}
	if err := json.Unmarshal(b, &file); err != nil || file.Format != 1 {
		return file, fmt.Errorf("the counts of wraps in %s are not readable (%w); without them it is not known how much keys were used: "+
			"rotate the keys of this backend and remove the file", c.path, errors.Join(err, formatFault(file.Format)))
	}
	if file.Wraps == nil {
		file.Wraps = map[string]uint64{}
	}
	return file, nil
}

func formatFault(format int) error {
	if format == 1 {
		return nil
	}
	return fmt.Errorf("format %d, this release reads 1", format)
}

// Take counts one wrap, or returns an error of kind KeyUnusable where the version
// has made all that it may on this host.
func (c *Counter) Take(v *Version) error {
	limit := v.Suite.maxWraps() / c.share
	if v.Suite.maxWraps() == 0 {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.left[v.ID]
	if r == nil {
		r = &reserved{}
		c.left[v.ID] = r
	}
	if r.left == 0 {
		if err := c.reserve(hex.EncodeToString(v.ID[:]), r, limit); err != nil {
			return errorf(Unavailable, err, "the counts of wraps cannot be kept")
		}
	}
	if r.left == 0 {
		return errorf(KeyUnusable, nil, "version %d of key %s has made all its %d wraps on this host: rotate the key with 'kms-agent hsm rotate %s'", v.Number, v.Key, limit, v.Key)
	}
	r.left--
	if used := r.total - r.left; !r.told && used >= limit/2 {
		r.told = true
		c.worn(v, used, limit)
	}
	return nil
}

// reserve reserves a block of what is left of the limit, if anything is.
func (c *Counter) reserve(id string, r *reserved, limit uint64) error {
	var block, total uint64
	err := c.change(func(wraps map[string]uint64) {
		block = min(counterBlock, limit-min(wraps[id], limit))
		total = wraps[id] + block
		wraps[id] = total
	})
	if err == nil {
		r.left, r.total = block, total
	}
	return err
}

// change changes the file, alone among the processes that use it.
func (c *Counter) change(how func(wraps map[string]uint64)) error {
	unlock, err := lockFile(c.path + ".lock")
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
	c.mu.Lock()
	defer c.mu.Unlock()
	file, err := c.read()
	if err != nil {
		return 0, 0, err
	}
	used = file.Wraps[hex.EncodeToString(v.ID[:])]
	if r := c.left[v.ID]; r != nil {
		used -= min(r.left, used)
	}
	return used, v.Suite.maxWraps() / c.share, nil
}

// Close gives back what was reserved and not used.
func (c *Counter) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	unused := false
	for _, r := range c.left {
		unused = unused || r.left > 0
	}
	if !unused {
		return nil
	}
	err := c.change(func(wraps map[string]uint64) {
		for v, r := range c.left {
			id := hex.EncodeToString(v[:])
			wraps[id] -= min(r.left, wraps[id])
		}
	})
	clear(c.left)
	return err
}
