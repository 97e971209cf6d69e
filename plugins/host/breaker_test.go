package host

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/plugins"
)

func away() error { return plugins.Errorf(plugins.Unavailable, "upstream is away") }

// made lets a call through that ends as it is told, and fails the test where the
// breaker does not.
func made(t *testing.T, b *breaker, v verdict, took time.Duration) *turn {
	t.Helper()
	ticket, err := b.admit(t.Context())
	if err != nil {
		t.Fatalf("a call is refused: %v", err)
	}
	began := time.Now()
	time.Sleep(took)
	if v == answered || v == undecided || v == aside {
		return b.settle(ticket, v, began, nil)
	}
	return b.settle(ticket, v, began, away())
}

func wantCircuit(t *testing.T, b *breaker, want Circuit) {
	t.Helper()
	if got := b.status().Circuit; got != want {
		t.Fatalf("the breaker is %s, want %s", got, want)
	}
}

func testBreaker(t *testing.T, run func(*testing.T, *breaker)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		run(t, newBreaker(Breaker{}.withDefaults(2*time.Second), "test"))
	})
}

// open makes the breaker open by failures in a row.
func open(t *testing.T, b *breaker) {
	t.Helper()
	for range DefaultBreakerFailures {
		made(t, b, failed, 0)
	}
	wantCircuit(t, b, Open)
}

func TestBreakerOpensOnFailuresInARow(t *testing.T) {
	testBreaker(t, func(t *testing.T, b *breaker) {
		for range 1000 {
			made(t, b, answered, time.Millisecond)
		}
		for i := range DefaultBreakerFailures {
			wantCircuit(t, b, Closed)
			opened := made(t, b, failed, 0)
			if last := i == DefaultBreakerFailures-1; (opened != nil) != last {
				t.Errorf("failure %d: turn %+v", i+1, opened)
			}
		}
		_, err := b.admit(t.Context())
		var e *plugins.Error
		if !errors.Is(err, plugins.ErrBreakerOpen) || !errors.As(err, &e) || e.Class != plugins.Unavailable {
			t.Fatalf("a call while it is open: %v", err)
		}
		if until := time.Until(b.status().Next); e.RetryAfter < until || e.RetryAfter > until+time.Second {
			t.Errorf("RetryAfter is %s, and it is tried in %s", e.RetryAfter, until)
		}
		if !strings.Contains(err.Error(), "5 calls in a row") || !strings.Contains(err.Error(), "upstream is away") {
			t.Errorf("the refusal %q does not say why", err)
		}
	})
}

// Only what speaks against the backend counts: neither a no, nor a caller that
// left, and one answer ends a run.
func TestBreakerCountsOnlyFailures(t *testing.T) {
	testBreaker(t, func(t *testing.T, b *breaker) {
		for range 100 {
			for range DefaultBreakerFailures - 1 {
				made(t, b, failed, 0)
				made(t, b, undecided, 0)
			}
			for range 20 {
				made(t, b, answered, 0)
			}
		}
		wantCircuit(t, b, Closed)
	})
}

// Chance makes runs: where calls are lost anyway, five in a row mean nothing.
func TestBreakerAllowsForRunsByChance(t *testing.T) {
	testBreaker(t, func(t *testing.T, b *breaker) {
		for range 7 {
			made(t, b, answered, 0)
			made(t, b, answered, 0)
			made(t, b, failed, 0)
		}
		for range lossyRun*DefaultBreakerFailures - 2 { // one more failed before
			made(t, b, failed, 0)
			wantCircuit(t, b, Closed)
		}
		made(t, b, failed, 0)
		wantCircuit(t, b, Open)
	})
}

func TestBreakerOpensOnARate(t *testing.T) {
	testBreaker(t, func(t *testing.T, b *breaker) {
		made(t, b, answered, 0)
		time.Sleep(time.Hour)
		for i := range minRated {
			wantCircuit(t, b, Closed)
			v := failed
			if i%5 < 2 {
				v = answered
			}
			made(t, b, v, 100*time.Millisecond)
		}
		wantCircuit(t, b, Open)
	})
	testBreaker(t, func(t *testing.T, b *breaker) { // what is older than the window does not count
		for i := range 10 * minRated {
			v := failed
			if i%5 < 2 {
				v = answered
			}
			made(t, b, v, 300*time.Millisecond)
		}
		wantCircuit(t, b, Closed)
		if got := b.status().FailureRate; got < 0.5 || got > 0.7 {
			t.Errorf("the failure rate is %v, want about 0.6", got)
		}
		time.Sleep(time.Minute)
		if got := b.status().FailureRate; got != 0 {
			t.Errorf("the failure rate without calls is %v", got)
		}
	})
}

// A host that stalls makes all calls slow at once. A backend that is slow makes
// them so one after another.
func TestBreakerTellsSlowBackendsFromStalls(t *testing.T) {
	testBreaker(t, func(t *testing.T, b *breaker) {
		began := time.Now()
		ticket, _ := b.admit(t.Context())
		time.Sleep(time.Second)
		for range 30 {
			b.settle(ticket, slow, began, nil)
		}
		wantCircuit(t, b, Closed)
		for range DefaultBreakerFailures - 1 {
			wantCircuit(t, b, Closed)
			made(t, b, slow, time.Second)
		}
		wantCircuit(t, b, Open)
	})
}

// Calls come back one at a time, and none of those before the outage has a say.
func TestBreakerHalfOpen(t *testing.T) {
	testBreaker(t, func(t *testing.T, b *breaker) {
		old, _ := b.admit(t.Context())
		open(t, b)
		b.checked(away())
		wantCircuit(t, b, Open)
		b.checked(nil)
		wantCircuit(t, b, HalfOpen)
		for range trials {
			wantCircuit(t, b, HalfOpen)
			trial, err := b.admit(t.Context())
			if err != nil {
				t.Fatalf("a trial: %v", err)
			}
			if _, err := b.admit(t.Context()); !errors.Is(err, plugins.ErrBreakerOpen) {
				t.Fatalf("a call beside a trial: %v", err)
			}
			b.settle(old, failed, time.Now(), away())
			time.Sleep(time.Second)
			if closed := b.settle(trial, answered, time.Now(), nil); closed != nil && (closed.refused != trials || closed.wait < trials*time.Second) {
				t.Errorf("closed with %+v, want %d refused", closed, trials)
			}
		}
		wantCircuit(t, b, Closed)
		b.settle(old, failed, time.Now(), away())
		if b.run != 0 {
			t.Error("a call from before the outage counts after it")
		}
	})
}

// An outage of one key neither opens the breaker nor ends what the failures of others
// have begun; to a backend that was away it is an answer.
func TestBreakerAndAnIllKey(t *testing.T) {
	testBreaker(t, func(t *testing.T, b *breaker) {
		for range 10 * minRated {
			made(t, b, aside, time.Second)
		}
		if got := b.status(); got.Circuit != Closed || got.FailureRate != 0 {
			t.Errorf("after outages of one key: %+v", got)
		}
		for range DefaultBreakerFailures {
			wantCircuit(t, b, Closed)
			made(t, b, aside, 0)
			made(t, b, failed, 0)
		}
		wantCircuit(t, b, Open)
		b.checked(nil)
		for range trials {
			wantCircuit(t, b, HalfOpen)
			made(t, b, aside, 0)
		}
		wantCircuit(t, b, Closed)
	})
}

// Callers that leave do not keep others from a backend that works again.
func TestBreakerHalfOpenWithoutAWord(t *testing.T) {
	testBreaker(t, func(t *testing.T, b *breaker) {
		open(t, b)
		b.checked(nil)
		for range maxUndecided {
			wantCircuit(t, b, HalfOpen)
			made(t, b, undecided, 0)
		}
		wantCircuit(t, b, Closed)
	})
}

// A backend whose Check is well and whose calls fail costs a call now and then,
// and less and less often.
func TestBreakerWaitsLongerAndLonger(t *testing.T) {
	testBreaker(t, func(t *testing.T, b *breaker) {
		open(t, b)
		began, spent := time.Now(), 0
		for time.Since(began) < 10*time.Minute {
			<-b.probeDue()
			b.checked(nil)
			if again := made(t, b, failed, 0); again == nil || !again.again || again.wait > DefaultBreakerMaxWait {
				t.Fatalf("turn %+v, want that it is open again, for %s at most", again, DefaultBreakerMaxWait)
			}
			spent++
		}
		if spent < 50 || spent > 110 {
			t.Errorf("%d calls were spent in ten minutes", spent)
		}
	})
}

// Whoever asks for patience gets it.
func TestBreakerThrottled(t *testing.T) {
	testBreaker(t, func(t *testing.T, b *breaker) {
		began := time.Now()
		ticket, _ := b.admit(t.Context())
		b.settle(ticket, failed, began, &plugins.Error{Class: plugins.Unavailable, RetryAfter: 7 * time.Second})
		for time.Since(began) < 7*time.Second {
			_, err := b.admit(t.Context())
			var e *plugins.Error
			if !errors.Is(err, plugins.ErrThrottled) || !errors.As(err, &e) || e.RetryAfter < time.Until(began.Add(7*time.Second)) {
				t.Fatalf("%s after it asked for 7s: %v", time.Since(began), err)
			}
			time.Sleep(500 * time.Millisecond)
		}
		if _, err := b.admit(t.Context()); err != nil {
			t.Errorf("when the time is over: %v", err)
		}
	})
}

// What fails because the process dies says nothing of what is behind it.
func TestBreakerForgivesTheDead(t *testing.T) {
	testBreaker(t, func(t *testing.T, b *breaker) {
		open(t, b)
		b.lost()
		wantCircuit(t, b, Closed)
		open(t, b)
		time.Sleep(2 * excuse)
		b.lost()
		wantCircuit(t, b, Open)
		b.renewed(away())
		wantCircuit(t, b, Open)
		b.renewed(nil)
		wantCircuit(t, b, HalfOpen)
	})
}

// What each call pays for all of this.
func TestBreakerAndBudgetCostNoMemory(t *testing.T) {
	b, retries := newBreaker(Breaker{}.withDefaults(2*time.Second), "test"), newBudget()
	if got := testing.AllocsPerRun(1000, func() {
		retries.earn()
		ticket, err := b.admit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		b.settle(ticket, answered, time.Time{}, nil)
	}); got != 0 {
		t.Errorf("%v allocations for each call, want none", got)
	}
}

// A call whose repeat was refused ends with what the backend said, and says when the
// backend is tried again.
func TestRefusedRepeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBreaker(Breaker{}.withDefaults(2*time.Second), "test")
		open(t, b)
		_, refused := b.admit(t.Context())
		err := later(away(), refused)
		var e *plugins.Error
		if errors.Is(err, plugins.ErrBreakerOpen) || !strings.Contains(err.Error(), "upstream is away") ||
			!errors.As(err, &e) || e.RetryAfter < time.Until(b.status().Next) {
			t.Errorf("got %v, want what the backend said, and when it is tried", err)
		}
	})
}

func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget()
		spend := func() (n int) {
			for b.spend() {
				n++
			}
			return n
		}
		if got, want := spend(), retryReserve+retriesPerSecond; got != want {
			t.Errorf("at once %d repeats, want %d", got, want)
		}
		for range 1000 {
			b.earn()
		}
		if got, want := spend(), 1000/callsPerRetry; got != want {
			t.Errorf("%d repeats for 1000 calls, want %d", got, want)
		}
		time.Sleep(time.Hour)
		if got := spend(); got != retriesPerSecond {
			t.Errorf("%d repeats after an hour without calls, want %d", got, retriesPerSecond)
		}
		for range 100_000 {
			b.earn()
		}
		if got, want := spend(), retryReserve; got != want {
			t.Errorf("%d repeats are saved up, want %d", got, want)
		}
	})
}
