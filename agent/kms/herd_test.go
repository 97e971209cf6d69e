package kms_test

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/plugins"
)

// counted is one upstream of many agents: it wraps by doing nothing, and counts calls by
// second.
type counted struct {
	start time.Time

	mu    sync.Mutex // guards what follows
	down  bool
	calls map[int]int
}

func (b *counted) call() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls[int(time.Since(b.start)/time.Second)]++
	if b.down {
		return unreachable()
	}
	return nil
}

func (b *counted) setDown(down bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.down = down
}

// between counts the calls in each minute of a time.
func (b *counted) between(from, to time.Duration) (minutes []int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for m := from; m+time.Minute <= to; m += time.Minute {
		n := 0
		for s := range 60 {
			n += b.calls[int(m/time.Second)+s]
		}
		minutes = append(minutes, n)
	}
	return minutes
}

func (b *counted) Open(context.Context, json.RawMessage) (plugins.Info, error) {
	return plugins.Info{}, nil
}

func (b *counted) Wrap(_ context.Context, _ plugins.KeyRef, plaintext []byte, _ plugins.Binding) ([]byte, error) {
	return append([]byte("wrapped "), plaintext...), b.call()
}

// Unwrap is counted where it is no part of a wrap: the host makes one call of the two.
func (b *counted) Unwrap(_ context.Context, _ plugins.KeyRef, ciphertext []byte, _ plugins.Binding) ([]byte, error) {
	return append([]byte(nil), ciphertext[len("wrapped "):]...), b.call()
}

func (b *counted) Describe(context.Context, string) (plugins.Description, error) {
	return plugins.Description{Current: "1", Versions: []plugins.KeyVersion{{Version: "1", State: plugins.Enabled}}}, b.call()
}

func (b *counted) Check(context.Context) (plugins.Health, error) { return plugins.Health{}, nil }
func (b *counted) Close() error                                  { return nil }

// herdOf is a service that stands for a fleet: each agent of it is a backend of its own
// name before the one upstream, with a few keys that have spares, and callers that encrypt
// and decrypt.
type herdOf struct {
	*rig
	up       *counted
	keys     []string
	messages map[string][]byte
}

func newHerd(t *testing.T, agents, keysEach int) *herdOf {
	t.Helper()
	h := &herdOf{rig: newRig(t), up: &counted{start: time.Now(), calls: map[int]int{}}, messages: map[string][]byte{}}
	h.Close()
	var err error
	h.Service, err = kms.New(kms.Options{
		Audit: h.audit, MaxEntries: 6 * agents * keysEach, ConfirmTimeout: 5 * time.Second,
		Now: func() time.Duration { return time.Hour + time.Since(h.up.start) },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	h.config.Backends, h.config.Keys = map[string]plugins.Backend{}, nil
	rule := everything()
	rule.Keys = nil
	for i := range agents {
		backend := fmt.Sprint("agent", i)
		h.config.Backends[backend] = h.up
		for j := range keysEach {
			name := fmt.Sprintf("key-%d-%d", i, j)
			h.keys, rule.Keys = append(h.keys, name), append(rule.Keys, name)
			k := kms.Key{
				Name: name, Wraps: []kms.Wrap{{Backend: backend, WrappingKey: fmt.Sprint("test:", j)}}, Limits: limits(),
				Partition: kms.PartitionKey, Grace: kms.Grace{Encrypt: 4 * time.Hour, Decrypt: 4 * time.Hour},
			}
			k.Limits.Spares = 1
			h.config.Keys = append(h.config.Keys, k)
		}
	}
	h.config.Policy = compile(t, rule)
	h.apply()
	return h
}

// lives has every key used once in a while, and returns how many requests were refused.
func (h *herdOf) lives(long time.Duration) (refused int) {
	const pause = 10 * time.Second
	c := caller(h.t, orders)
	for end := time.Now().Add(long); time.Now().Before(end); {
		for _, key := range h.keys {
			made, err := h.Encrypt(h.t.Context(), c, kms.EncryptRequest{Key: key, Plaintext: []byte("x")})
			if err != nil {
				refused++
				continue
			}
			if h.messages[key] == nil {
				h.messages[key] = made.Message
			}
			if _, err := h.Decrypt(h.t.Context(), c, kms.DecryptRequest{Message: h.messages[key]}); err != nil {
				refused++
			}
			time.Sleep(pause / time.Duration(len(h.keys)))
		}
	}
	synctest.Wait()
	return refused
}

// Agents with several keys, directions and spares outlive an outage of an hour, and all
// their calls together, those for the versions of wrapping keys among them, are at most
// twice as many as usual in each minute after it.
func TestNoHerdOfAnyCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHerd(t, 200, 2)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- h.Run(ctx) }()
		defer func() {
			stop()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}()
		for _, key := range h.keys { // nobody starts a fleet at once
			if _, err := h.Encrypt(t.Context(), caller(t, orders), kms.EncryptRequest{Key: key}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(5 * time.Minute / time.Duration(len(h.keys)))
		}
		refused := h.lives(30 * time.Minute)
		from := time.Since(h.up.start)
		refused += h.lives(20 * time.Minute)
		normal := 0
		for _, n := range h.up.between(from, from+20*time.Minute) {
			normal += n
		}
		normal /= 20
		h.up.setDown(true)
		refused += h.lives(time.Hour)
		h.up.setDown(false)
		from = time.Since(h.up.start)
		refused += h.lives(10 * time.Minute)
		after := h.up.between(from, from+10*time.Minute)
		t.Logf("calls in a minute: %d as a rule, %v after the outage", normal, after)
		if refused > 0 {
			t.Errorf("%d requests were refused within grace", refused)
		}
		for m, n := range after {
			if n > 2*normal {
				t.Errorf("minute %d after the outage: %d calls, %.1f times as many as a rule", m+1, n, float64(n)/float64(normal))
			}
		}
		if o := h.Outages(); len(o) != 0 {
			t.Errorf("%d agents have not found out yet", len(o))
		}
	})
}
