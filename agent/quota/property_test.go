package quota_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/kms-agent/kms-agent/agent/quota"
)

// In no stretch of time does a caller get more than the burst and what the rate
// gives in it.
func TestRateInEveryWindow(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		limits := quota.Limits{
			Rate:  float64(rapid.IntRange(1, 2000).Draw(rt, "rate")) / 10,
			Burst: rapid.IntRange(1, 20).Draw(rt, "burst"),
		}
		r := newRig(t, limits)
		var granted []time.Duration
		for range rapid.IntRange(1, 100).Draw(rt, "steps") {
			r.host.pass(time.Duration(rapid.Int64Range(0, int64(time.Second)).Draw(rt, "pause")))
			now := r.host.now()
			for range rapid.IntRange(1, 30).Draw(rt, "requests") {
				if r.take("a", 0) == nil {
					granted = append(granted, now)
				}
			}
		}
		for i := range granted {
			for j := i; j < len(granted); j++ {
				most := float64(limits.Burst) + limits.Rate*(granted[j]-granted[i]).Seconds() + 1e-6
				if float64(j-i+1) > most {
					rt.Fatalf("%d requests within %v, want %.3f at most", j-i+1, granted[j]-granted[i], most)
				}
			}
		}
	})
}

// Whatever becomes of process and clock, there are never more requests and bytes
// than days have begun, by the latest time that the clock ever showed.
func TestDailyLimitSurvivesEverything(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		limits := map[string]quota.Limits{"r": {
			PerDay:      rapid.Uint64Range(1, 300).Draw(rt, "per day"),
			BytesPerDay: rapid.Uint64Range(1, 3000).Draw(rt, "bytes per day"),
		}}
		dir, err := os.MkdirTemp(t.TempDir(), "")
		if err != nil {
			rt.Fatal(err)
		}
		h := newHost()
		latest := noon()
		first := latest.Unix() / 86400
		r := open(t, h, dir, limits)
		var requests, bytes uint64
		for range rapid.IntRange(1, 25).Draw(rt, "steps") {
			switch rapid.SampledFrom([]string{"take", "take", "take", "wait", "set", "crash", "restart"}).Draw(rt, "step") {
			case "take":
				size := rapid.Uint64Range(0, 30).Draw(rt, "size")
				n := uint64(r.takeAll("a", size, rapid.IntRange(1, 200).Draw(rt, "requests")))
				requests, bytes = requests+n, bytes+n*size
			case "wait":
				d := time.Duration(rapid.Int64Range(0, int64(30*time.Hour)).Draw(rt, "wait"))
				h.pass(d)
				latest = latest.Add(d)
			case "set":
				h.set(noon().Add(time.Duration(rapid.Int64Range(-int64(72*time.Hour), int64(72*time.Hour)).Draw(rt, "to"))))
			case "crash":
				r = r.crash(limits)
			case "restart":
				if err := r.Close(); err != nil {
					rt.Fatal(err)
				}
				r = open(t, h, r.dir, limits)
			}
			if wall := time.Unix(0, h.wall.Load()); wall.After(latest) {
				latest = wall
			}
			days := uint64(latest.Unix()/86400 - first + 1)
			if l := limits["r"]; requests > days*l.PerDay || bytes > days*l.BytesPerDay {
				rt.Fatalf("%d requests and %d bytes in %d days, limits %+v", requests, bytes, days, l)
			}
		}
	})
}

// However a host's clocks are set, a day that is over never comes back, and what is
// left of one does not grow.
func TestDaysNeverComeBack(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		h := newHost()
		day := quota.Days(h.now, func() time.Time { return time.Unix(0, h.wall.Load()) })
		last, left := day()
		for range rapid.IntRange(1, 60).Draw(rt, "steps") {
			h.set(noon().Add(time.Duration(rapid.Int64Range(-int64(50*time.Hour), int64(50*time.Hour)).Draw(rt, "set"))))
			pass := time.Duration(rapid.SampledFrom([]int64{1, 1e6, 9e8, 2e9, 4e12, 2e13}).Draw(rt, "pass"))
			h.pass(pass)
			next, rest := day()
			if next < last || next == last && rest > left+2*time.Second {
				rt.Fatalf("day %d with %v left, then, after %v, day %d with %v left", last, left, pass, next, rest)
			}
			last, left = next, rest
		}
	})
}

// What a file says is what it says again, and nothing else is taken for one.
func FuzzState(f *testing.F) {
	r := newRig(f, quota.Limits{PerDay: 100, BytesPerDay: 1000})
	for _, caller := range []string{"a", "b"} {
		if err := r.take(caller, 5); err != nil {
			f.Fatal(err)
		}
	}
	if err := r.Close(); err != nil {
		f.Fatal(err)
	}
	content, err := os.ReadFile(filepath.Join(r.dir, "quota.state"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(content)
	f.Add([]byte("{}\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		once, err := quota.Remarshal(content)
		if err != nil {
			return
		}
		twice, err := quota.Remarshal(once)
		if err != nil || !bytes.Equal(once, twice) {
			t.Errorf("%q became %q, %v", once, twice, err)
		}
	})
}
