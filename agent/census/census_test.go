package census_test

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kms-agent/kms-agent/agent/census"
)

// day is a wall clock under the test's control.
type day struct {
	mu  sync.Mutex
	now time.Time
}

func (d *day) Now() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.now
}

func (d *day) pass(days int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.now = d.now.AddDate(0, 0, days)
}

func start() *day { return &day{now: time.Date(2026, 3, 1, 23, 0, 0, 0, time.UTC)} }

func open(t *testing.T, dir string, d *day) *census.Census {
	t.Helper()
	c, err := census.Open(dir, d.Now)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

var (
	both = census.Kind{Key: "orders", Purpose: census.Message, Wraps: "a@1 b@3"}
	one  = census.Kind{Key: "orders", Purpose: census.Message, Wraps: "a@1"}
)

// What was counted is there after a restart, by day, for as long as it is asked for.
func TestCounts(t *testing.T) {
	dir, d := t.TempDir(), start()
	c := open(t, dir, d)
	c.Add(both)
	c.Add(both)
	c.Add(one)
	d.pass(1)
	c.Add(one)
	if err := c.Save(); err != nil {
		t.Fatal(err)
	}
	c = open(t, dir, d)
	c.Add(one)
	want := []census.Row{
		{Kind: one, Day: "2026-03-01", Count: 1}, {Kind: both, Day: "2026-03-01", Count: 2}, {Kind: one, Day: "2026-03-02", Count: 2},
	}
	if diff := cmp.Diff(want, c.Rows(7)); diff != "" {
		t.Errorf("two days (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(want[2:], c.Rows(1)); diff != "" {
		t.Errorf("today (-want +got):\n%s", diff)
	}
	info, err := os.Stat(filepath.Join(dir, "census.json"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v, %v", info, err)
	}
}

func TestOldDaysGo(t *testing.T) {
	d := start()
	c := open(t, t.TempDir(), d)
	for range census.Days + 10 {
		c.Add(one)
		d.pass(1)
	}
	if n := len(c.Rows(10 * census.Days)); n != census.Days {
		t.Errorf("%d days are remembered, want %d", n, census.Days)
	}
}

// A file that is not one of ours is told, with the cure, and nothing is guessed.
func TestDamagedFiles(t *testing.T) {
	for name, content := range map[string]string{
		"nothing": "", "no JSON": "x", "no format": "{}", "a newer format": `{"format":2}`,
		"a bad day": `{"format":1,"rows":[{"day":"yesterday","key":"orders","count":1}]}`,
		"no key":    `{"format":1,"rows":[{"day":"2026-03-01","count":1}]}`,
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "census.json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := census.Open(dir, start().Now); err == nil || !strings.Contains(err.Error(), "remove the file") {
			t.Errorf("%s: %v, want the cure", name, err)
		}
	}
}

// A disk that takes nothing is told, and what was counted is stored later.
func TestUnwritable(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	c := open(t, dir, start())
	c.Add(one)
	if err := c.Save(); err == nil || c.Fault() == nil {
		t.Fatalf("saved to nowhere: %v, %v", err, c.Fault())
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := c.Save(); err != nil || c.Fault() != nil {
		t.Errorf("Save: %v, %v", err, c.Fault())
	}
	if n := len(open(t, dir, start()).Rows(1)); n != 1 {
		t.Errorf("%d rows, want 1", n)
	}
}

func TestConcurrent(t *testing.T) {
	d := start()
	c := open(t, t.TempDir(), d)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 500 {
				c.Add(both)
			}
		})
	}
	wg.Go(func() {
		for range 20 {
			if err := c.Save(); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	if rows := c.Rows(1); len(rows) != 1 || rows[0].Count != 4000 {
		t.Errorf("rows %+v, want 4000", rows)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"format":1,"rows":[{"day":"2026-03-01","key":"orders","purpose":"message","wraps":"a@1","count":3}]}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "census.json"), content, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := census.Open(dir, start().Now)
		if err != nil {
			return
		}
		before := c.Rows(census.Days)
		c.Add(one)
		if err := c.Save(); err != nil {
			t.Fatal(err)
		}
		if after := open(t, dir, start()).Rows(census.Days); len(after) < len(before) {
			t.Errorf("%d rows became %d", len(before), len(after))
		}
	})
}
