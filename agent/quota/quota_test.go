package quota_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/quota"
)

func TestRateAndBurst(t *testing.T) {
	r := newRig(t, quota.Limits{Rate: 10, Burst: 5})
	if got := r.takeAll("a", 0, 100); got != 5 {
		t.Errorf("%d requests at once, want the burst of 5", got)
	}
	e := wantExceeded(t, r.take("a", 0), quota.Rate)
	if e.RetryAfter != 100*time.Millisecond || e.Rule != "r" {
		t.Errorf("refusal %+v, want a retry after 100ms", e)
	}
	if got := r.takeAll("b", 0, 100); got != 5 {
		t.Errorf("%d requests of another caller, want 5", got)
	}
	r.host.pass(e.RetryAfter - time.Microsecond)
	if err := r.take("a", 0); err == nil {
		t.Error("admitted before its time")
	}
	r.host.pass(time.Microsecond)
	if err := r.take("a", 0); err != nil {
		t.Errorf("the refusal's own delay was too short: %v", err)
	}
}

func TestConcurrency(t *testing.T) {
	r := newRig(t, quota.Limits{Concurrency: 2})
	var held [3]quota.Held
	for i := range 2 {
		if err := r.hold(&held[i], "a", 0); err != nil {
			t.Fatal(err)
		}
	}
	wantExceeded(t, r.hold(&held[2], "a", 0), quota.Concurrency)
	if err := r.take("b", 0); err != nil {
		t.Errorf("another caller: %v", err)
	}
	held[2].Release() // holds nothing
	held[0].Release()
	held[0].Release() // again
	if err := r.hold(&held[0], "a", 0); err != nil {
		t.Errorf("after a release: %v", err)
	}
	wantExceeded(t, r.hold(&held[2], "a", 0), quota.Concurrency)
}

func TestDay(t *testing.T) {
	r := newRig(t, quota.Limits{PerDay: 100})
	if got := r.takeAll("a", 0, 200); got != 100 {
		t.Errorf("%d requests, want 100", got)
	}
	e := wantExceeded(t, r.take("a", 0), quota.PerDay)
	if e.RetryAfter != 12*time.Hour {
		t.Errorf("retry after %v, want the 12 hours until midnight UTC", e.RetryAfter)
	}
	r.host.pass(e.RetryAfter)
	if got := r.takeAll("a", 0, 200); got != 100 {
		t.Errorf("%d requests on the next day, want 100", got)
	}
}

func TestBytes(t *testing.T) {
	r := newRig(t, quota.Limits{BytesPerDay: 1000})
	if e := wantExceeded(t, r.take("a", 1001), quota.BytesPerDay); e.RetryAfter != 0 {
		t.Errorf("retry after %v for what never fits, want none", e.RetryAfter)
	}
	var h quota.Held
	if err := r.hold(&h, "a", 300); err != nil {
		t.Fatal(err)
	}
	defer h.Release()
	for range 7 {
		if err := h.Add(t.Context(), r.host.now(), 100); err != nil {
			t.Fatal(err)
		}
	}
	wantExceeded(t, h.Add(t.Context(), r.host.now(), 1), quota.BytesPerDay)
	if err := r.take("a", 0); err != nil {
		t.Errorf("a request without bytes: %v", err)
	}
	wantExceeded(t, r.take("a", 1), quota.BytesPerDay)
}

// Where one rule refuses, the others count nothing.
func TestAllRulesOrNone(t *testing.T) {
	h := newHost()
	r := open(t, h, t.TempDir(), map[string]quota.Limits{
		"rate": {Rate: 1, Burst: 3}, "day": {PerDay: 5}, "slots": {Concurrency: 1}, "none": {},
	})
	var held quota.Held
	if err := r.hold(&held, "a", 0); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		wantExceeded(t, r.take("a", 0), quota.Concurrency)
	}
	held.Release()
	if got := r.takeAll("a", 0, 10); got != 2 {
		t.Errorf("%d more requests, want the 2 left of the burst", got)
	}
	h.pass(time.Minute)
	if got := r.takeAll("a", 0, 10); got != 2 {
		t.Errorf("%d more requests, want the 2 left of the day", got)
	}
	if e := wantExceeded(t, r.take("a", 0), quota.PerDay); e.Rule != "day" {
		t.Errorf("refused by %q, want the rule to wait for longest", e.Rule)
	}
	all, err := r.Status()
	if err != nil || len(all) != 4 || all[3].Rule != "slots" || all[3].Refused[quota.Concurrency] != 10 || all[0].Callers != 1 {
		t.Errorf("status %+v, %v", all, err)
	}
}

// A request that two decisions admit, such as ReEncrypt, counts once under a rule
// of both.
func TestOneRequestCountsOnce(t *testing.T) {
	r := newRig(t, quota.Limits{PerDay: 1, Concurrency: 1, Rate: 1, Burst: 1})
	var h quota.Held
	for range 2 {
		if err := r.hold(&h, "a", 0); err != nil {
			t.Fatal(err)
		}
	}
	h.Release()
	wantExceeded(t, r.take("a", 0), quota.PerDay)
}

func TestManyAtOnce(t *testing.T) {
	const limit, workers = 3000, 8
	h := newHost()
	r := open(t, h, t.TempDir(), map[string]quota.Limits{
		"a": {PerDay: limit, Concurrency: 4}, "b": {BytesPerDay: limit * 10}, "c": {Rate: limit, Burst: limit},
	})
	var granted, under, most atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for granted.Load() < limit {
				var held quota.Held
				if err := r.hold(&held, "caller", 10); err != nil {
					var e *quota.Exceeded
					if !errors.As(err, &e) {
						t.Error(err)
						return
					}
					if e.Limit != quota.Concurrency {
						return
					}
					continue
				}
				granted.Add(1)
				now := under.Add(1)
				for seen := most.Load(); now > seen && !most.CompareAndSwap(seen, now); seen = most.Load() {
				}
				under.Add(-1)
				held.Release()
			}
		})
	}
	wg.Wait()
	if granted.Load() != limit || most.Load() > 4 {
		t.Errorf("%d requests, %d of them at once; want %d, and 4", granted.Load(), most.Load(), limit)
	}
	wantExceeded(t, r.take("caller", 10), quota.PerDay)
}

func TestRestartKeepsTheDay(t *testing.T) {
	limits := map[string]quota.Limits{"r": {PerDay: 1000, BytesPerDay: 1 << 40}}
	h := newHost()
	r := open(t, h, t.TempDir(), limits)
	r.takeAll("a", 7, 123)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.take("a", 0); !errors.Is(err, quota.ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
	again := open(t, h, r.dir, limits)
	if got := again.takeAll("a", 7, 2000); got != 877 {
		t.Errorf("%d requests after an orderly restart, want exactly the 877 left", got)
	}
}

// Setting the clock back never gives a new day, neither in the process nor to the
// next one; and days go on passing all the same.
func TestClockGoesBack(t *testing.T) {
	limits := map[string]quota.Limits{"r": {PerDay: 10}}
	h := newHost()
	r := open(t, h, t.TempDir(), limits)
	r.takeAll("a", 0, 20)
	h.set(noon().AddDate(0, 0, -3))
	wantExceeded(t, r.take("a", 0), quota.PerDay)
	crashed := r.crash(limits)
	e := wantExceeded(t, crashed.take("a", 0), quota.PerDay)
	if e.RetryAfter <= 0 || e.RetryAfter > 12*time.Hour {
		t.Errorf("retry after %v, want the rest of the day as it was known", e.RetryAfter)
	}
	h.pass(e.RetryAfter)
	if got := crashed.takeAll("a", 0, 20); got != 10 {
		t.Errorf("%d requests on the next day of a clock that is behind, want 10", got)
	}
	h.set(noon().AddDate(0, 0, -3))
	wantExceeded(t, crashed.crash(limits).take("a", 0), quota.PerDay)
}

func TestReloadKeepsCounters(t *testing.T) {
	r := newRig(t, quota.Limits{PerDay: 10, Rate: 1, Burst: 20})
	r.takeAll("a", 0, 6)
	r.rules = r.Configure(map[string]quota.Limits{"r": {PerDay: 8, Rate: 100, Burst: 20}, "new": {PerDay: 100}})
	if got := r.takeAll("a", 0, 20); got != 2 {
		t.Errorf("%d requests after the limit became 8, want 2", got)
	}
	r.Configure(map[string]quota.Limits{})
	r.rules = r.Configure(map[string]quota.Limits{"r": {PerDay: 8}})
	wantExceeded(t, r.take("a", 0), quota.PerDay)
	r.rules = r.Configure(map[string]quota.Limits{"r": {}})
	if got := r.takeAll("a", 0, 20); got != 20 {
		t.Errorf("%d requests without limits, want all 20", got)
	}
}

// What began under a configuration is counted by it, however often that has been
// replaced; a rule that nobody uses any more is forgotten in the end.
func TestRuleThatIsGone(t *testing.T) {
	r := newRig(t, quota.Limits{PerDay: 3})
	if got := r.takeAll("a", 0, 1); got != 1 {
		t.Fatal("not even one")
	}
	for range 3 {
		r.Configure(nil)
		r.host.pass(time.Minute)
	}
	if got := r.takeAll("a", 0, 9); got != 2 {
		t.Errorf("%d more requests that began before the rule was gone, want 2", got)
	}
	r.host.pass(24 * time.Hour)
	r.Configure(nil)
	if r.rules = r.Configure(map[string]quota.Limits{"r": {PerDay: 3}}); r.takeAll("a", 0, 9) != 3 {
		t.Error("the next day does not begin afresh")
	}
}

// A flood of callers meets a bound, and is forgotten when there is nothing to
// remember of it.
func TestFloodOfCallers(t *testing.T) {
	r := newRig(t, quota.Limits{Rate: 1, Burst: 1})
	for i := range quota.MaxCallers {
		if err := r.take(fmt.Sprint(i), 0); err != nil {
			t.Fatal(err)
		}
	}
	e := wantExceeded(t, r.take("one more", 0), quota.Callers)
	if e.RetryAfter != time.Second {
		t.Errorf("retry after %v", e.RetryAfter)
	}
	wantExceeded(t, r.take("0", 0), quota.Rate)
	r.host.pass(e.RetryAfter)
	if err := r.take("one more", 0); err != nil {
		t.Errorf("after the others became idle: %v", err)
	}
	if all, _ := r.Status(); all[0].Callers != 1 {
		t.Errorf("%d callers are counted, want 1", all[0].Callers)
	}
}

// What is counted by the day is not forgotten to make room.
func TestFloodDoesNotForgetTheDay(t *testing.T) {
	limits := map[string]quota.Limits{"r": {PerDay: 1}}
	h, dir := newHost(), t.TempDir()
	r := open(t, h, dir, limits)
	var wg sync.WaitGroup
	const workers = 500 // who wait for the disk together
	for worker := range workers {
		wg.Go(func() {
			for i := worker; i < quota.MaxCallers; i += workers {
				if err := r.take(fmt.Sprint(i), 0); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	for range 2 {
		if e := wantExceeded(t, r.take("one more", 0), quota.Callers); e.RetryAfter != 12*time.Hour {
			t.Errorf("retry after %v, want the end of the day", e.RetryAfter)
		}
		wantExceeded(t, r.take("17", 0), quota.PerDay)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r = open(t, h, dir, limits)
	}
	info, err := os.Stat(filepath.Join(dir, "quota.state"))
	if err != nil || info.Size() > 100*quota.MaxCallers || info.Mode() != 0o600 {
		t.Errorf("state file %v %d bytes, %v", info.Mode(), info.Size(), err)
	}
	h.pass(12 * time.Hour)
	if err := r.take("one more", 0); err != nil {
		t.Errorf("on the next day: %v", err)
	}
}

// A caller that leaves while a block is being stored is not counted.
func TestCallerLeaves(t *testing.T) {
	r := newRig(t, quota.Limits{PerDay: 1})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var h quota.Held
	for range 50 {
		err := h.Take(ctx, r.host.now(), []*quota.Rule{r.rules["r"]}, "a", 0)
		if err == nil {
			h.Release()
			return // the disk was as fast as the caller
		}
		if !errors.Is(err, quota.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	if got := r.takeAll("a", 0, 5); got != 1 {
		t.Errorf("%d requests, want 1", got)
	}
}

func TestNothingStoredWithoutDays(t *testing.T) {
	r := newRig(t, quota.Limits{Rate: 1, Burst: 1, Concurrency: 1})
	r.takeAll("a", 5, 3)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(r.dir); err != nil || len(left) > 0 {
		t.Errorf("files %v, %v", left, err)
	}
}

// TestCloseBeforeTheEnd: a request that is under way when the Keeper closes can
// go no further, and can end.
func TestCloseBeforeTheEnd(t *testing.T) {
	r := open(t, newHost(), t.TempDir(), map[string]quota.Limits{"a": {BytesPerDay: 1000}, "b": {Concurrency: 1}})
	var h quota.Held
	if err := r.hold(&h, "alice", 1); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := h.Add(t.Context(), r.host.now(), 1); !errors.Is(err, quota.ErrUnavailable) {
			t.Errorf("error = %v, want ErrUnavailable", err)
		}
	}
	h.Release()
}
