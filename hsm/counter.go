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

// Counter counts the wraps of each version on this host, for suites whose keys wear
// out: GCM with random initialization vectors (SP 800-38D, section 8.3). It counts
// across restarts. It is safe for concurrent use; one process uses a directory.
type Counter struct {
	path  string
	share uint64 // hosts among which a limit is divided

	mu    sync.Mutex
	used  map[string]uint64 // mu guards used and saved: by ID, in hexadecimal
	saved map[string]uint64 // reserved on disk
}

// counters is the file's content.
type counters struct {
	Format int               `json:"format"`
	Wraps  map[string]uint64 `json:"wraps"`
}

// OpenCounter reads the counts in a directory that is this process's own. share is
// how many hosts use the keys, 1 at least.
func OpenCounter(dir string, share uint64) (*Counter, error) {
	c := &Counter{path: filepath.Join(dir, "wraps.json"), share: max(share, 1), used: map[string]uint64{}, saved: map[string]uint64{}}
	b, err := os.ReadFile(c.path)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the counts of wraps: %w", err)
	}
	var file counters
	if err := json.Unmarshal(b, &file); err != nil || file.Format != 1 {
		return nil, fmt.Errorf("the counts of wraps in %s are not readable (%w); without them it is not known how much keys were used: "+
			"rotate the keys of this backend and remove the file", c.path, errors.Join(err, formatFault(file.Format)))
	}
	for id, n := range file.Wraps {
		c.used[id], c.saved[id] = n, n
	}
	return c, nil
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
	id := hex.EncodeToString(v.ID[:])
	n := c.used[id] + 1
	if n > limit {
		return errorf(KeyUnusable, nil, "version %d of key %s has made all its %d wraps on this host: rotate the key with 'kms-agent hsm rotate %s'", v.Number, v.Key, limit, v.Key)
	}
	if n > c.saved[id] {
		reserved := min(n+counterBlock-1, limit)
		if err := c.save(id, reserved); err != nil {
			return errorf(Unavailable, err, "the counts of wraps cannot be kept")
		}
		c.saved[id] = reserved
	}
	c.used[id] = n
	return nil
}

// Used returns how many wraps of a version were made on this host, at most, and how
// many there may be; a limit of 0 is none.
func (c *Counter) Used(v *Version) (used, limit uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.used[hex.EncodeToString(v.ID[:])], v.Suite.maxWraps() / c.share
}

func (c *Counter) save(id string, reserved uint64) error {
	file := counters{Format: 1, Wraps: map[string]uint64{id: reserved}}
	for other, n := range c.saved {
		if other != id {
			file.Wraps[other] = n
		}
	}
	b, err := json.Marshal(file)
	if err != nil {
		return err
	}
	return renameio.WriteFile(c.path, b, 0o600)
}

// Close keeps what was really used.
func (c *Counter) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, n := range c.used {
		if n < c.saved[id] {
			if err := c.save(id, n); err != nil {
				return err
			}
			c.saved[id] = n
		}
	}
	return nil
}
