package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/kms-agent/kms-agent/plugins"
)

// waitIn makes a call wait in the queue; it says its name when it runs, and
// ends when it is told to.
func waitIn(t *testing.T, q *queue, caller string, ran chan<- string) (end func()) {
	t.Helper()
	over := make(chan struct{})
	go func() {
		if err := q.acquire(context.Background(), caller, 0); err != nil {
			ran <- "refused " + caller
			return
		}
		ran <- caller
		<-over
		q.release()
	}()
	synctest.Wait()
	return sync.OnceFunc(func() { close(over) })
}

func TestQueueServesCallersInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, ran := newQueue(1), make(chan string, 100)
		ends := []func(){waitIn(t, q, "greedy", ran)}
		for range 6 {
			ends = append(ends, waitIn(t, q, "greedy", ran))
		}
		ends = append(ends, waitIn(t, q, "modest", ran), waitIn(t, q, "other", ran), waitIn(t, q, "modest", ran))
		var got []string
		for _, end := range ends {
			end() // in any order: what has not run yet ends at once when it does
		}
		synctest.Wait()
		for range ends {
			got = append(got, <-ran)
		}
		want := []string{
			"greedy", "greedy", "modest", "other", "greedy", "modest", "greedy", "greedy", "greedy", "greedy",
		}
		if !slices.Equal(got, want) {
			t.Errorf("order: got %v, want %v", got, want)
		}
		if q.free != 1 || q.waiting != 0 || len(q.lines) != 0 || len(q.turn) != 0 {
			t.Errorf("left in the queue: %+v", q)
		}
	})
}

func TestQueueShedsTheLongestLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, ran := newQueue(1), make(chan string, 100)
		ends := make([]func(), 0, 40)
		for range 1 + waitersPerSlot {
			ends = append(ends, waitIn(t, q, "greedy", ran))
		}
		if got := <-ran; got != "greedy" {
			t.Fatalf("first: got %s", got)
		}
		ends = append(ends, waitIn(t, q, "greedy", ran))
		if got := <-ran; got != "refused greedy" {
			t.Errorf("the greedy caller beyond the bound: got %s, want it refused", got)
		}
		ends = append(ends, waitIn(t, q, "modest", ran))
		if got := <-ran; got != "refused greedy" || len(q.lines["modest"]) != 1 || q.waiting != waitersPerSlot {
			t.Errorf("a modest caller: got %s and %d waiting, want it to take a place of the greedy one", got, q.waiting)
		}
		for _, end := range ends {
			end()
		}
	})
}

func TestQueueRefusalsSayWhenToRetry(t *testing.T) {
	q := newQueue(1)
	q.room = 0
	q.turn = []string{"x"}
	q.lines["x"] = []*waiter{{}}
	q.free = 0
	var e *plugins.Error
	if err := q.acquire(t.Context(), "x", 0); !errors.As(err, &e) || e.Class != plugins.Unavailable || e.RetryAfter <= 0 || !errors.Is(err, plugins.ErrCrowded) {
		t.Errorf("got %v, want Unavailable with a time to retry", err)
	}
}

func TestQueueWaitersLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(1)
		if err := q.acquire(t.Context(), "first", 0); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := q.acquire(ctx, "second", 0)
		if plugins.ClassOf(err) != plugins.Unavailable || !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, plugins.ErrCrowded) {
			t.Errorf("got %v, want Unavailable because of the deadline", err)
		}
		if q.waiting != 0 || len(q.lines) != 0 || len(q.turn) != 0 {
			t.Errorf("left in the queue: %+v", q)
		}
		q.release()
		if q.free != 1 {
			t.Errorf("%d places are free, want 1", q.free)
		}
	})
}

// Whatever callers do, no place is lost and no more calls run than may.
func TestQueueLosesNothing(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		slots := rapid.IntRange(1, 3).Draw(rt, "slots")
		calls := rapid.SliceOfN(rapid.Custom(func(rt *rapid.T) [3]int {
			return [3]int{rapid.IntRange(0, 3).Draw(rt, "caller"), rapid.IntRange(0, 30).Draw(rt, "patience"), rapid.IntRange(0, 20).Draw(rt, "work")}
		}), 1, 80).Draw(rt, "calls")
		synctest.Test(t, func(t *testing.T) {
			q, running := newQueue(slots), make(chan struct{}, slots)
			var wg sync.WaitGroup
			for _, c := range calls {
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(c[1])*time.Millisecond)
					defer cancel()
					if q.acquire(ctx, fmt.Sprint(c[0]), 0) != nil {
						return
					}
					defer q.release()
					select {
					case running <- struct{}{}:
					default:
						t.Errorf("more than %d calls run", slots)
						return
					}
					time.Sleep(time.Duration(c[2]) * time.Millisecond)
					<-running
				})
			}
			wg.Wait()
			if q.free != slots || q.waiting != 0 || len(q.lines) != 0 || len(q.turn) != 0 {
				t.Errorf("left in the queue: %+v", q)
			}
		})
	})
}

// TestOverdue: a call that never had its turn in its time says so, which is no
// answer of the backend; neither looks like the end of the caller's context.
func TestOverdue(t *testing.T) {
	s := &Supervisor{cfg: Config{Name: "b", CallTimeout: time.Second}}
	waiting := &plugins.Error{Class: plugins.Unavailable, Err: fmt.Errorf("%w: %w", plugins.ErrCrowded, context.DeadlineExceeded)}
	for _, err := range []error{waiting, context.DeadlineExceeded} {
		got := s.overdue(err)
		if plugins.ClassOf(got) != plugins.Unavailable || errors.Is(got, context.DeadlineExceeded) {
			t.Errorf("got %v, want Unavailable and no end of a context", got)
		}
		if errors.Is(got, plugins.ErrCrowded) != errors.Is(err, plugins.ErrCrowded) {
			t.Errorf("got %v of %v", got, err)
		}
	}
}
