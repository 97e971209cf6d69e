package cache_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/cache"
)

// herd is one upstream and the caches of many agents, each with a backend of its own
// name. It counts the confirmations by second.
type herd struct {
	*cache.Cache
	t      *testing.T
	start  time.Time
	agents []cache.Authority

	mu    sync.Mutex
	down  bool
	calls map[int]int
}

func (h *herd) now() time.Duration { return time.Hour + time.Since(h.start) }

func (h *herd) confirm(context.Context, cache.Authority, any) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls[int(h.now()/time.Second)]++
	if h.down {
		return errDown
	}
	return nil
}

func (h *herd) setDown(down bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.down = down
}

// lives has every agent encrypt once in a while, for so long. It returns how many
// requests were refused, and how many calls came upstream in each minute.
func (h *herd) lives(long time.Duration) (refused int, minutes []int) {
	h.t.Helper()
	from := h.now()
	for h.now() < from+long {
		for i, a := range h.agents {
			u, err := h.Encrypt(h.t.Context(), cache.EncryptRequest{
				Caller: "c", Slot: cache.Slot{Key: fmt.Sprint("k", i), Authority: a},
				Limits: cache.Limits{MaxAge: 5 * time.Minute, Grace: 4 * time.Hour}, Bytes: 1,
				Fill: func(context.Context) (cache.Material, error) {
					return cache.Material{DataKey: dataKey(i)}, nil
				},
			})
			if err != nil {
				refused++
				continue
			}
			u.Release()
		}
		time.Sleep(15 * time.Second)
	}
	synctest.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	for m := range int(long / time.Minute) {
		n := 0
		for s := range 60 {
			n += h.calls[int(from/time.Second)+60*m+s]
		}
		minutes = append(minutes, n)
	}
	return refused, minutes
}

func mean(values []int) float64 {
	sum := 0
	for _, v := range values {
		sum += v
	}
	return float64(sum) / float64(len(values))
}

// TestNoHerd: 1,000 agents outlive an outage of an hour, and the upstream that comes
// back meets at most twice its usual load in its first minute, and in each that
// follows. What schedules the calls is what runs in the agents.
func TestNoHerd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const agents = 1000
		h := &herd{t: t, start: time.Now(), calls: map[int]int{}}
		chance := rand.New(rand.NewPCG(1, 2)) // a simulation that can be repeated
		for i := range agents {
			h.agents = append(h.agents, cache.Authority{Backend: fmt.Sprint("agent", i), WrappingKey: "kek", Version: "1", Direction: cache.Encrypt})
		}
		var err error
		h.Cache, err = cache.New(cache.Config{
			Now: h.now, MaxEntries: agents, Classify: classify, Confirm: h.confirm, Rand: chance.Float64,
		})
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		go func() { _ = h.Run(ctx) }()
		if _, _ = h.lives(time.Hour); len(h.Outages()) != 0 {
			t.Fatal("an outage without a cause")
		}
		refused, before := h.lives(30 * time.Minute)
		normal := mean(before)
		h.setDown(true)
		no, during := h.lives(time.Hour)
		refused += no
		h.setDown(false)
		no, after := h.lives(30 * time.Minute)
		refused += no
		t.Logf("calls in a minute: %.0f as a rule, %.0f in the outage; %v after it", normal, mean(during[10:]), after[:6])
		if refused > 0 {
			t.Errorf("%d requests were refused within grace", refused)
		}
		if normal < agents/6 {
			t.Errorf("%.0f calls in a minute are not what 1,000 agents make", normal)
		}
		for m, n := range after {
			if float64(n) > 2*normal {
				t.Errorf("minute %d after the outage: %d calls, %.1f times as many as a rule", m+1, n, float64(n)/normal)
			}
		}
		if n := len(h.Outages()); n != 0 {
			t.Errorf("%d agents have not found out yet", n)
		}
	})
}
