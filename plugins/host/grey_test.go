package host

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pluginv1 "github.com/kms-agent/kms-agent/api/plugin/v1"
	"github.com/kms-agent/kms-agent/plugins"
)

// upstream is a plugin whose upstream goes wrong, and the connection to it. Its
// time is the test's.
type upstream struct {
	began time.Time
	// answers does what a call at that time after the beginning does; check what
	// Check does, as a call by default.
	answers, check func(ctx context.Context, at time.Duration) error

	mu     sync.Mutex
	calls  []time.Duration // mu guards calls and checks: when they came
	checks []time.Duration
}

func (u *upstream) Invoke(ctx context.Context, method string, _, reply any, _ ...grpc.CallOption) error {
	at := time.Since(u.began)
	bounded, cancel := context.WithCancel(ctx)
	if deadline, ok := ctx.Deadline(); ok {
		bounded, cancel = context.WithDeadline(ctx, deadline.Add(-plugins.AnswerMargin(time.Until(deadline))))
	}
	defer cancel()
	var err error
	switch method {
	case grpc_health_v1.Health_Check_FullMethodName:
		proto.Merge(reply.(proto.Message), &grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_SERVING})
	case pluginv1.Backend_Check_FullMethodName:
		u.note(&u.checks, at)
		answer := u.answers
		if u.check != nil {
			answer = u.check
		}
		err = answer(bounded, at)
	case pluginv1.Backend_Describe_FullMethodName:
		u.note(&u.calls, at)
		proto.Merge(reply.(proto.Message), &pluginv1.DescribeResponse{
			CurrentVersion: "1", Versions: []*pluginv1.KeyVersion{{Version: "1", State: pluginv1.KeyVersion_STATE_ENABLED}},
		})
		err = u.answers(bounded, at)
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return unavailable(0)
	}
	return err
}

func (u *upstream) note(times *[]time.Duration, at time.Duration) {
	u.mu.Lock()
	defer u.mu.Unlock()
	*times = append(*times, at)
}

// between counts the times in an interval.
func between(times []time.Duration, from, to time.Duration) (n int) {
	for _, at := range times {
		if at >= from && at < to {
			n++
		}
	}
	return n
}

func (u *upstream) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, status.Error(codes.Unimplemented, "no streams")
}

// unavailable is what a plugin says of an upstream that is away, or asks for
// patience.
func unavailable(retryAfter time.Duration) error {
	s, err := status.New(codes.Unavailable, "as told").WithDetails(
		&errdetails.ErrorInfo{Domain: "kms-agent.plugin", Reason: plugins.Unavailable.String()},
		&errdetails.RetryInfo{RetryDelay: durationpb.New(retryAfter)})
	if err != nil {
		return err
	}
	return s.Err()
}

// takes waits for as long as an upstream takes, or for the context.
func takes(ctx context.Context, d time.Duration) error {
	if !sleep(ctx, d) {
		return ctx.Err()
	}
	return nil
}

// called is one call that a caller made.
type called struct {
	at, took time.Duration
	err      error
}

type calls []called

// served is the share of those in an interval that were answered.
func (c calls) served(from, to time.Duration) float64 {
	all, good := 0, 0
	for _, one := range c {
		if one.at < from || one.at >= to {
			continue
		}
		if all++; one.err == nil {
			good++
		}
	}
	return float64(good) / float64(max(all, 1))
}

// longest is the longest wait of those in an interval.
func (c calls) longest(from, to time.Duration) (most time.Duration) {
	for _, one := range c {
		if one.at >= from && one.at < to {
			most = max(most, one.took)
		}
	}
	return most
}

// rig is a supervisor over an upstream, in simulated time.
type rig struct {
	*Supervisor
	up   *upstream
	logs *observer.ObservedLogs
}

// simulate runs a test in simulated time.
func simulate(t *testing.T, cfg Config, up *upstream, test func(*testing.T, *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.InfoLevel)
		cfg.Name, cfg.Self, cfg.RuntimeDir, cfg.Logger = "test", true, "/run/test", zap.New(core)
		s, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		up.began = time.Now()
		p := &process{remote: plugins.NewRemote(up), outcomes: newOutcomes(), runner: &runner{ended: make(chan struct{})}}
		s.install(p)
		ctx, cancel := context.WithCancel(context.Background())
		over := make(chan struct{})
		go func() {
			defer close(over)
			if _, err := s.watch(ctx, p); err != nil {
				t.Errorf("the process is given up: %v", err)
			}
		}()
		test(t, &rig{s, up, logs})
		cancel()
		<-over
	})
}

// load is that of many callers for a time: each makes a call, waits and makes the
// next. No call may take longer than its caller has.
func (r *rig) load(t *testing.T, callers int, every, patience, lasts time.Duration) calls {
	t.Helper()
	var mu sync.Mutex
	var all calls
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			time.Sleep(every * time.Duration(i) / time.Duration(callers))
			for time.Since(r.up.began) < lasts {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				at := time.Now()
				_, err := r.Describe(ctx, "test:key")
				one := called{at.Sub(r.up.began), time.Since(at), err}
				cancel()
				mu.Lock()
				all = append(all, one)
				mu.Unlock()
				if one.took > patience {
					t.Errorf("a caller with %s got its answer after %s", patience, one.took)
				}
				time.Sleep(every)
			}
		})
	}
	wg.Wait()
	return all
}

// wantTurns wants that many openings told, and the same number of closings.
func (r *rig) wantTurns(t *testing.T, least, most int) {
	t.Helper()
	opened := r.logs.FilterMessageSnippet("breaker opened").Len()
	closed := r.logs.FilterMessageSnippet("breaker closed").Len()
	if opened < least || opened > most || closed < opened-1 || closed > opened {
		t.Errorf("opened %d and closed %d times by the log, want %d to %d", opened, closed, least, most)
	}
	if got := r.Status().Breaker.Opened; got != uint64(opened) {
		t.Errorf("opened %d times by the status, %d by the log", got, opened)
	}
}

const minute = time.Minute

// downBetween fails calls in an interval, and takes a moment for others.
func downBetween(from, to time.Duration) func(context.Context, time.Duration) error {
	return func(ctx context.Context, at time.Duration) error {
		if at >= from && at < to {
			return unavailable(0)
		}
		return takes(ctx, 5*time.Millisecond)
	}
}

func TestDeadUpstream(t *testing.T) {
	up := &upstream{answers: downBetween(minute, 6*minute)}
	simulate(t, Config{CallTimeout: 2 * time.Second}, up, func(t *testing.T, r *rig) {
		all := r.load(t, 20, 200*time.Millisecond, time.Second, 8*minute)
		if got := all.served(0, minute-time.Second); got != 1 {
			t.Errorf("served before: %v", got)
		}
		if n := between(up.calls, minute, 6*minute); n > 2*20 {
			t.Errorf("%d calls of a dead upstream in five minutes", n)
		}
		if got := all.longest(minute+2*time.Second, 6*minute); got != 0 {
			t.Errorf("a call during the outage took %s, want none to wait", got)
		}
		if n := between(up.checks, minute, 6*minute); n < 25 || n > 60 {
			t.Errorf("it was asked %d times in five minutes how it is", n)
		}
		back := 6*minute + DefaultBreakerMaxWait + 2*time.Second
		if got := all.served(back, 8*minute); got != 1 {
			t.Errorf("served when it is back: %v", got)
		}
		r.wantTurns(t, 1, 1)
		status := r.Status().Breaker
		closed := r.logs.FilterMessageSnippet("breaker closed").All()
		if status.Circuit != Closed || status.Refused == 0 || len(closed) != 1 || closed[0].ContextMap()["refused"] != status.Refused {
			t.Errorf("status %+v, log %+v; want how many calls were refused", status, closed)
		}
		lost := 0
		for _, one := range all {
			if plugins.ClassOf(one.err) == plugins.Unavailable && !errors.Is(one.err, plugins.ErrBreakerOpen) {
				lost++
			}
		}
		if lost < DefaultBreakerFailures/2 { // the others are repeats, which count as what the first try heard
			t.Errorf("%d calls heard from upstream that it is away", lost)
		}
		for _, one := range all {
			var e *plugins.Error
			if errors.Is(one.err, plugins.ErrBreakerOpen) && (!errors.As(one.err, &e) || e.RetryAfter <= 0 || e.RetryAfter > 2*DefaultBreakerMaxWait) {
				t.Fatalf("a refusal without the time of the next try: %v", one.err)
			}
		}
	})
}

// It answers, but in five seconds: as bad as not at all, whatever its callers'
// patience and the timeout.
func TestSlowUpstream(t *testing.T) {
	for _, c := range []struct{ timeout, patience time.Duration }{
		{2 * time.Second, time.Minute}, {2 * time.Second, time.Second}, {10 * time.Second, time.Minute}, {10 * time.Second, 3 * time.Second},
	} {
		up := &upstream{answers: func(ctx context.Context, at time.Duration) error {
			if at >= minute && at < 6*minute {
				return takes(ctx, 5*time.Second)
			}
			return takes(ctx, 5*time.Millisecond)
		}}
		simulate(t, Config{CallTimeout: c.timeout, MaxConcurrent: 8}, up, func(t *testing.T, r *rig) {
			all := r.load(t, 20, 200*time.Millisecond, c.patience, 8*minute)
			if n := between(up.calls, minute, 6*minute); n > 120 {
				t.Errorf("%+v: %d calls of a slow upstream in five minutes", c, n)
			}
			if got := all.longest(2*minute, 6*minute); got != 0 {
				t.Errorf("%+v: a call took %s while it was known to be slow", c, got)
			}
			if got := all.served(6*minute+DefaultBreakerMaxWait+10*time.Second, 8*minute); got != 1 {
				t.Errorf("%+v: served when it is quick again: %v", c, got)
			}
			r.wantTurns(t, 1, 1)
		})
	}
}

// A third of the calls is lost: repeats serve most, the breaker stays closed, and
// the load does not grow by more than the budget.
func TestLossyUpstream(t *testing.T) {
	const lasts = 5 * minute
	for _, every := range []time.Duration{4 * time.Second, time.Second, 200 * time.Millisecond} { // 5, 20 and 100 calls a second
		chance := rand.New(rand.NewPCG(1, uint64(every)))
		var mu sync.Mutex
		up := &upstream{answers: func(ctx context.Context, _ time.Duration) error {
			mu.Lock()
			lost := chance.Float64() < 0.3
			mu.Unlock()
			if lost {
				return unavailable(0)
			}
			return takes(ctx, 5*time.Millisecond)
		}, check: downBetween(0, 0)}
		simulate(t, Config{CallTimeout: 2 * time.Second}, up, func(t *testing.T, r *rig) {
			all := r.load(t, 20, every, 2*time.Second, lasts)
			least := 0.85
			if every < time.Second {
				least = 0.72 // there are not enough repeats for all
			}
			if got := all.served(0, lasts); got < least {
				t.Errorf("every %s: served %v, want %v at least", every, got, least)
			}
			if most := len(all)*11/10 + int(lasts/time.Second)*retriesPerSecond + retryReserve + 1; len(up.calls) > most {
				t.Errorf("every %s: %d calls became %d, want %d at most", every, len(all), len(up.calls), most)
			}
			if status := r.Status(); status.Retries != uint64(len(up.calls))-(status.Calls-status.Breaker.Refused) {
				t.Errorf("every %s: status %+v and %d calls upstream", every, status, len(up.calls))
			}
			r.wantTurns(t, 0, 1)
		})
	}
}

// It serves ten calls a second, and asks those beyond to come back later: nobody
// comes before.
func TestThrottlingUpstream(t *testing.T) {
	for _, patience := range []time.Duration{800 * time.Millisecond, 3 * time.Second} {
		var mu sync.Mutex
		second, n, until := time.Duration(-1), 0, time.Duration(0)
		up := &upstream{check: downBetween(0, 0)}
		up.answers = func(_ context.Context, at time.Duration) error {
			mu.Lock()
			defer mu.Unlock()
			if at < until {
				t.Errorf("a call %s before it may come", until-at)
			}
			if now := at.Truncate(time.Second); now != second {
				second, n = now, 0
			}
			if n++; n <= 10 {
				return nil
			}
			until = at + patience
			return unavailable(patience)
		}
		simulate(t, Config{CallTimeout: 5 * time.Second}, up, func(t *testing.T, r *rig) {
			all := r.load(t, 20, time.Second, 4*time.Second, 5*minute)
			good := all.served(0, 5*minute) * float64(len(all)) / (5 * 60)
			if good < 2 {
				t.Errorf("asked for %s: %v calls a second served, of ten that it can", patience, good)
			}
		})
	}
}

// It comes and goes: the breaker goes with it, and its waits do not grow so long
// that the good times are missed.
func TestFlappingUpstream(t *testing.T) {
	up := &upstream{answers: func(ctx context.Context, at time.Duration) error {
		if at/(20*time.Second)%2 == 1 {
			return unavailable(0)
		}
		return takes(ctx, 5*time.Millisecond)
	}}
	simulate(t, Config{CallTimeout: 2 * time.Second}, up, func(t *testing.T, r *rig) {
		all := r.load(t, 20, 200*time.Millisecond, time.Second, 10*minute)
		if got := all.served(0, 10*minute); got < 0.25 {
			t.Errorf("served %v of the calls, and it is well half of the time", got)
		}
		bad := 0
		for at := 20 * time.Second; at < 10*minute; at += 40 * time.Second {
			bad += between(up.calls, at, at+20*time.Second)
		}
		if most := 15 * (DefaultBreakerFailures + 20); bad > most {
			t.Errorf("%d calls in 15 bad times, want %d at most", bad, most)
		}
		r.wantTurns(t, 8, 15)
	})
}

// Check says that all is well, and every call fails.
func TestLyingCheck(t *testing.T) {
	up := &upstream{answers: downBetween(minute, 6*minute), check: downBetween(0, 0)}
	simulate(t, Config{CallTimeout: 2 * time.Second}, up, func(t *testing.T, r *rig) {
		r.load(t, 20, 200*time.Millisecond, time.Second, 8*minute)
		if n := between(up.calls, minute, 6*minute); n > 20+DefaultBreakerFailures+25 {
			t.Errorf("%d calls were spent in five minutes", n)
		}
		r.wantTurns(t, 1, 1)
	})
}

// A call that comes while another one tries whether the backend is back is not refused
// for that: it waits for a moment.
func TestCallsBesideATrial(t *testing.T) {
	up := &upstream{answers: func(ctx context.Context, at time.Duration) error {
		if at < minute {
			return unavailable(0)
		}
		return takes(ctx, 20*time.Millisecond)
	}}
	simulate(t, Config{CallTimeout: 2 * time.Second}, up, func(t *testing.T, r *rig) {
		r.load(t, 5, 200*time.Millisecond, time.Second, minute)
		for deadline := time.Now().Add(minute); r.Status().Breaker.Circuit != HalfOpen; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the backend is back, and is not asked")
			}
		}
		var wg sync.WaitGroup
		for i := range trials {
			wg.Go(func() {
				began := time.Now()
				if _, err := r.Describe(t.Context(), "test:key"); err != nil {
					t.Errorf("call %d: %v", i, err)
				}
				if took := time.Since(began); took > retryMax {
					t.Errorf("call %d took %s", i, took)
				}
			})
		}
		wg.Wait()
	})
}

// What waits for its turn learns at once that there will be none.
func TestWaitingCallsFailWhenTheBreakerOpens(t *testing.T) {
	up := &upstream{answers: func(ctx context.Context, _ time.Duration) error {
		if err := takes(ctx, 1500*time.Millisecond); err != nil {
			return err
		}
		return unavailable(0)
	}}
	cfg := Config{CallTimeout: 10 * time.Second, MaxConcurrent: DefaultBreakerFailures}
	simulate(t, cfg, up, func(t *testing.T, r *rig) {
		var wg sync.WaitGroup
		var refused atomic.Int64
		for i := range 50 {
			wg.Go(func() {
				began := time.Now()
				_, err := r.Describe(t.Context(), "test:key")
				if plugins.ClassOf(err) != plugins.Unavailable {
					t.Errorf("call %d: %v", i, err)
				}
				if errors.Is(err, plugins.ErrBreakerOpen) && time.Since(began) == 1500*time.Millisecond {
					refused.Add(1)
				}
			})
		}
		wg.Wait()
		// Those that the first failures made room for were under way already.
		if most := 2*DefaultBreakerFailures - 1; len(up.calls) > most || refused.Load() < int64(50-most) {
			t.Errorf("%d calls were made, want %d at most, and %d failed with the first, want the others", len(up.calls), most, refused.Load())
		}
		if got := r.Status().Breaker.Refused; got < uint64(refused.Load()) {
			t.Errorf("%d refused by the status, and %d were", got, refused.Load())
		}
	})
}
