package soak

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

const (
	// short is how long the load lasts unless SOAK says otherwise.
	short = 10 * time.Second
	// warm is how long a load must last before its quarters can be compared:
	// before, the cache still fills and the collector has hardly run.
	warm = 2 * time.Minute
)

// TestSoak holds the agent under mixed load. Nothing fails that should not,
// nothing opens to something else, and the agent holds no more at the end than
// it did when it was warm.
func TestSoak(t *testing.T) {
	length := short
	if text := os.Getenv("SOAK"); text != "" {
		var err error
		if length, err = time.ParseDuration(text); err != nil {
			t.Fatalf("SOAK is a duration, such as 10m: %v", err)
		}
	}
	r := newRig(t)
	conn, err := dial(r.path("kms.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	l := &load{rig: r, client: kmsagentv1.NewKMSClient(conn), done: map[string]*atomic.Int64{}, failed: make(chan error, 1)}
	before := r.rested()
	// Calls have no deadline of the load's end: they would fail with it.
	ctx, cancel := context.WithCancel(t.Context())
	defer time.AfterFunc(length, cancel).Stop()
	defer cancel()
	taken := make(chan []sample, 1)
	go func() { taken <- r.watch(ctx, max(length/100, 200*time.Millisecond)) }()
	if err := l.run(ctx); err != nil {
		t.Errorf("under load: %v", err)
	}
	cancel()
	samples := <-taken
	for _, name := range slices.Sorted(maps.Keys(l.done)) {
		if t.Logf("%-14s %8d", name, l.done[name].Load()); l.done[name].Load() == 0 {
			t.Errorf("%s did nothing", name)
		}
	}
	// The last of many killed processes may be replaced in a minute only.
	if err := r.administer(t.Context(), func(ctx context.Context, c adminv1.AdminClient) error {
		_, err := c.RestartPlugin(ctx, &adminv1.RestartPluginRequest{Backend: "local"})
		return err
	}); err != nil {
		t.Error(err)
	}
	report(t, before, samples, r.rested(), length)
	_ = conn.Close()
	r.stop()
	verify := exec.CommandContext(t.Context(), r.binary, "audit", "verify", "--initial-key", r.path("initial.key"), r.path("audit.log"))
	if out, err := verify.CombinedOutput(); err != nil {
		t.Errorf("the audit log: %v\n%s", err, out)
	}
}

// watch takes samples until ctx ends.
func (r *rig) watch(ctx context.Context, every time.Duration) []sample {
	var all []sample
	for ctx.Err() == nil {
		if s, err := r.sample(ctx); err == nil {
			all = append(all, s)
		}
		select {
		case <-ctx.Done():
		case <-time.After(every):
		}
	}
	return all
}

// rested is what the agent holds once nothing is under way.
func (r *rig) rested() sample {
	r.t.Helper()
	var last sample
	for range 100 {
		s, err := r.sample(context.Background())
		if err == nil && s.goroutines == last.goroutines && s.descriptors == last.descriptors && s.plugin > 0 {
			return s
		}
		last = s
		time.Sleep(100 * time.Millisecond)
	}
	r.t.Errorf("the agent does not come to rest: %+v", last)
	return last
}

// report prints what was held and fails where it grows: the last quarter of the
// time against the second one, where the load was long enough to say so, and the
// rest after against the rest before.
func report(t *testing.T, before sample, samples []sample, after sample, length time.Duration) {
	t.Helper()
	quarter := len(samples) / 4
	if quarter == 0 {
		t.Fatalf("%d samples are too few", len(samples))
	}
	second, last := samples[quarter:2*quarter], samples[len(samples)-quarter:]
	t.Logf("%v, %d samples", length, len(samples))
	t.Logf("%-16s %10s %10s %10s %10s", "", "before", "2nd quarter", "last", "after")
	for _, row := range []struct {
		name    string
		of      func(sample) float64
		typical func([]float64) float64
		slack   float64 // more than this, and more than a fifth, is growth
	}{
		{"goroutines", func(s sample) float64 { return s.goroutines }, median, 20},
		{"descriptors", func(s sample) float64 { return s.descriptors }, median, 10},
		{"threads", func(s sample) float64 { return s.threads }, median, 6},
		// Just after a collection: what is alive.
		{"heap MB", func(s sample) float64 { return s.heap }, slices.Min[[]float64], 10},
		{"resident MB", func(s sample) float64 { return s.resident }, median, 25},
		{"plugin MB", func(s sample) float64 { return s.plugin }, median, 15},
	} {
		middle, end := row.typical(values(second, row.of)), row.typical(values(last, row.of))
		t.Logf("%-16s %10.1f %10.1f %10.1f %10.1f", row.name, row.of(before), middle, end, row.of(after))
		if length >= warm && end > middle*1.2 && end > middle+row.slack {
			t.Errorf("%s grow under load: %.1f, then %.1f", row.name, middle, end)
		}
	}
	if after.goroutines > before.goroutines+4 || after.descriptors > before.descriptors+2 {
		t.Errorf("left behind: %s", fmt.Sprintf("goroutines %.0f to %.0f, descriptors %.0f to %.0f",
			before.goroutines, after.goroutines, before.descriptors, after.descriptors))
	}
}

func values(samples []sample, of func(sample) float64) []float64 {
	all := make([]float64, len(samples))
	for i, s := range samples {
		all[i] = of(s)
	}
	return all
}

func median(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}
