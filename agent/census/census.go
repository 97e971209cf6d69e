// Package census counts which wraps the messages of the past days carry.
package census

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/renameio/v2"
)

const (
	fileName   = "census.json"
	fileFormat = 1
	// Days is how many days are remembered, with the present one.
	Days = 400
	// maxRows bounds what is remembered: days, times keys, times sets of wraps. The
	// oldest days give way.
	maxRows = 100_000
	maxFile = 64 << 20
	// saveEvery is what a crash loses.
	saveEvery = time.Minute
)

// Purpose says what was made.
type Purpose string

// The purposes, in the words of the message format.
const (
	Message  Purpose = "message"
	Exported Purpose = "exported"
	Wrapped  Purpose = "wrap"
)

// Kind is what is counted together: what was made for a key, under the same wraps.
// Wraps are written BACKEND@VERSION, in the order of the configuration, with a space
// between.
type Kind struct {
	Key     string  `json:"key"`
	Purpose Purpose `json:"purpose"`
	Wraps   string  `json:"wraps"`
}

// Row is how many of a kind were made on one day, in UTC: "2006-01-02".
type Row struct {
	Kind

	Day   string `json:"day"`
	Count uint64 `json:"count"`
}

// document is the file.
type document struct {
	Format int   `json:"format"`
	Rows   []Row `json:"rows"`
}

// Census counts. It is safe for concurrent use.
type Census struct {
	path string
	now  func() time.Time

	mu    sync.RWMutex // guards days and saveErr
	days  map[string]map[Kind]*atomic.Uint64
	dirty atomic.Bool
	fault error
}

// Open reads the counts of a state directory. Counts that cannot be read are an error:
// they are no reason not to serve, and are begun anew where the file is removed.
func Open(stateDir string, now func() time.Time) (*Census, error) {
	c := &Census{path: filepath.Join(stateDir, fileName), now: now, days: map[string]map[Kind]*atomic.Uint64{}}
	return c, c.read()
}

func (c *Census) read() error {
	f, err := os.Open(c.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("the census of messages: %w", err)
	}
	defer func() { _ = f.Close() }()
	content, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return fmt.Errorf("the census of messages: %w", err)
	}
	rows, err := parse(content)
	if err != nil {
		return fmt.Errorf("the census of messages in %s: %w; remove the file, and the counts begin anew", c.path, err)
	}
	for _, r := range rows {
		c.counter(r.Day, r.Kind).Add(r.Count)
	}
	return nil
}

func parse(content []byte) ([]Row, error) {
	var d document
	switch err := json.Unmarshal(content, &d); {
	case len(content) > maxFile, err != nil, d.Format < 1:
		return nil, errors.New("it is damaged")
	case d.Format > fileFormat:
		return nil, fmt.Errorf("it has format %d and this program reads %d: use the version that wrote it", d.Format, fileFormat)
	case len(d.Rows) > maxRows:
		return nil, errors.New("it is damaged")
	}
	for _, r := range d.Rows {
		if _, err := time.Parse(time.DateOnly, r.Day); err != nil || r.Key == "" {
			return nil, errors.New("it is damaged")
		}
	}
	return d.Rows, nil
}

// Add counts one more of a kind today.
func (c *Census) Add(k Kind) {
	if c == nil {
		return
	}
	day := c.today()
	c.mu.RLock()
	n := c.days[day][k]
	c.mu.RUnlock()
	if n == nil {
		n = c.counter(day, k)
	}
	n.Add(1)
	c.dirty.Store(true)
}

func (c *Census) today() string { return c.now().UTC().Format(time.DateOnly) }

// counter returns the counter of a kind on a day, made where there is none.
func (c *Census) counter(day string, k Kind) *atomic.Uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.days[day] == nil {
		c.days[day] = map[Kind]*atomic.Uint64{}
		c.forgetLocked()
	}
	if c.days[day][k] == nil {
		c.days[day][k] = new(atomic.Uint64)
	}
	return c.days[day][k]
}

// forgetLocked drops the oldest days of more than are remembered.
func (c *Census) forgetLocked() {
	days := c.daysLocked()
	rows := 0
	for i, day := range slices.Backward(days) {
		rows += len(c.days[day])
		if len(days)-i > Days || rows > maxRows {
			delete(c.days, day)
		}
	}
}

func (c *Census) daysLocked() []string {
	var days []string
	for day := range c.days {
		days = append(days, day)
	}
	slices.Sort(days)
	return days
}

// Rows returns the counts of the past days, today among them: by day, key, purpose.
func (c *Census) Rows(days int) []Row {
	if c == nil {
		return nil
	}
	since := c.now().UTC().AddDate(0, 0, 1-max(1, days)).Format(time.DateOnly)
	c.mu.RLock()
	defer c.mu.RUnlock()
	var rows []Row
	for day, kinds := range c.days {
		if day < since {
			continue
		}
		for k, n := range kinds {
			rows = append(rows, Row{Kind: k, Day: day, Count: n.Load()})
		}
	}
	slices.SortFunc(rows, func(a, b Row) int {
		return cmp.Or(strings.Compare(a.Day, b.Day), strings.Compare(a.Key, b.Key),
			strings.Compare(string(a.Purpose), string(b.Purpose)), strings.Compare(a.Wraps, b.Wraps))
	})
	return rows
}

// Fault returns why the counts could not be saved last; nil when they could.
func (c *Census) Fault() error {
	if c == nil {
		return nil
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.fault
}

// Run saves the counts now and then until ctx ends.
func (c *Census) Run(ctx context.Context) error {
	tick := time.NewTicker(saveEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			_ = c.Save() // Fault tells
		}
	}
}

// Save stores what was counted since the last time.
func (c *Census) Save() error {
	if c == nil || !c.dirty.Swap(false) {
		return nil
	}
	content, err := json.Marshal(document{Format: fileFormat, Rows: c.Rows(Days)})
	if err == nil {
		err = renameio.WriteFile(c.path, content, 0o600)
	}
	if err != nil {
		c.dirty.Store(true)
		err = fmt.Errorf("the census of messages cannot be stored: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault = err
	return err
}
