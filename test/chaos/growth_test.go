package chaos

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
)

// sample is what the agent holds at one moment; memory in MB.
type sample struct {
	goroutines, descriptors, threads, heap, resident float64
	plugins                                          float64 // the memory of the largest
}

// largest is how much memory the largest of the plugins has, in MB.
func largest(s *adminv1.StatusResponse) float64 {
	most := 0
	for _, b := range s.GetBackends() {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", b.GetPid()))
		if err != nil {
			continue // it has just ended
		}
		if fields := strings.Fields(string(text)); len(fields) > 1 {
			pages, _ := strconv.Atoi(fields[1]) // the kernel writes numbers
			most = max(most, pages*os.Getpagesize())
		}
	}
	return float64(most) / (1 << 20)
}

func (c *cluster) sample() (sample, error) {
	s, err := c.status()
	if err != nil {
		return sample{}, err
	}
	c.mu.Lock()
	url := c.metrics
	c.mu.Unlock()
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, url, nil)
	if err != nil {
		return sample{}, err
	}
	answer, err := (&http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return sample{}, err
	}
	defer func() { _ = answer.Body.Close() }()
	v := map[string]float64{}
	lines := bufio.NewScanner(answer.Body)
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), " ")
		if n, err := strconv.ParseFloat(value, 64); ok && err == nil {
			v[name] = n
		}
	}
	const mb = 1 << 20
	return sample{
		v["go_goroutines"], v["process_open_fds"], v["go_threads"],
		v["go_memstats_next_gc_bytes"] / 2 / mb, // twice what the last collection left
		v["process_resident_memory_bytes"] / mb, largest(s),
	}, lines.Err()
}

// rested is what the agent holds once nothing is under way.
func (c *cluster) rested() sample {
	c.t.Helper()
	var last sample
	for range 150 {
		s, err := c.sample()
		if err == nil && s.goroutines == last.goroutines && s.descriptors == last.descriptors && s.goroutines > 0 {
			return s
		}
		last = s
		time.Sleep(100 * time.Millisecond)
	}
	c.t.Errorf("the agent does not come to rest: %+v", last)
	return last
}

// watch takes samples until ctx ends, and tells how far it is.
func (c *cluster) watch(ctx context.Context, rec *recorder, length time.Duration) []sample {
	var all []sample
	tick := time.NewTicker(max(length/100, 500*time.Millisecond))
	defer tick.Stop()
	told := time.Now()
	for {
		select {
		case <-ctx.Done():
			return all
		case <-tick.C:
		}
		if s, err := c.sample(); err == nil {
			all = append(all, s)
		}
		if time.Since(told) > max(length/20, 5*time.Second) {
			told = time.Now()
			c.t.Logf("%s of %s: %d calls", rec.now().Round(time.Second), length, rec.calls())
		}
	}
}

// warmFor is how long a load must last before its quarters can be compared.
const warmFor = 2 * time.Minute

// growth fails where the agent holds more at the end than it did before, or in the last
// quarter than in the second. Some agents have ended meanwhile: it is about each.
func growth(t *testing.T, before sample, samples []sample, after sample, length time.Duration) {
	t.Helper()
	quarter := len(samples) / 4
	if quarter == 0 {
		t.Fatalf("%d samples are too few", len(samples))
	}
	second, last := samples[quarter:2*quarter], samples[len(samples)-quarter:]
	for _, row := range []struct {
		name         string
		of           func(sample) float64
		slack, rests float64 // what is no growth: under load, and at rest
	}{
		{"goroutines", func(s sample) float64 { return s.goroutines }, 30, 12},
		{"descriptors", func(s sample) float64 { return s.descriptors }, 12, 6},
		{"threads", func(s sample) float64 { return s.threads }, 8, 8},
		{"heap MB", func(s sample) float64 { return s.heap }, 15, 30},
		{"resident MB", func(s sample) float64 { return s.resident }, 40, 80},
		{"plugin MB", func(s sample) float64 { return s.plugins }, 15, 25},
	} {
		middle, end := median(second, row.of), median(last, row.of)
		t.Logf("%-14s before %6.1f, second quarter %6.1f, last %6.1f, after %6.1f", row.name, row.of(before), middle, end, row.of(after))
		if length >= warmFor && end > middle*1.2 && end > middle+row.slack {
			t.Errorf("rule growth: %s grow under load, from %.1f to %.1f", row.name, middle, end)
		}
		if row.of(after) > row.of(before)+row.rests {
			t.Errorf("rule growth: %s are left, %.1f before and %.1f after", row.name, row.of(before), row.of(after))
		}
	}
}

func median(samples []sample, of func(sample) float64) float64 {
	var values []float64
	for _, s := range samples {
		values = append(values, of(s))
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// leavesNothing ends the agent and looks for what is left.
func (c *cluster) leavesNothing() {
	c.t.Helper()
	if err := c.stop(); err != nil {
		c.t.Errorf("rule leftovers: %v\n%s", err, c.tail(20))
	}
	var left []string
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if left = c.processes(); len(left) == 0 || time.Now().After(deadline) {
			break
		}
	}
	for _, p := range left {
		c.t.Errorf("rule leftovers: a process is left: %s", p)
	}
	err := filepath.WalkDir(c.dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.Type() == fs.ModeSocket && !strings.HasPrefix(path, c.path("api")): // the issuer's
			c.t.Errorf("rule leftovers: a socket is left: %s", path)
		case d.IsDir() && filepath.Dir(path) == c.path("run"):
			c.t.Errorf("rule leftovers: a directory is left: %s", path)
		}
		return nil
	})
	if err != nil {
		c.t.Error(err)
	}
}

// processes are those of the agent's and the plugins' programs that run.
func (c *cluster) processes() []string {
	var found []string
	entries, _ := os.ReadDir("/proc") // there is always one
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		line, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if errors.Is(err, fs.ErrNotExist) || len(line) == 0 {
			continue
		}
		c.mu.Lock()
		ours := c.plugins[pid] && strings.Contains(string(line), "kms-agent")
		c.mu.Unlock()
		if ours || strings.Contains(string(line), c.dir) {
			found = append(found, fmt.Sprintf("%d %q", pid, strings.ReplaceAll(string(line), "\x00", " ")))
		}
	}
	return found
}
