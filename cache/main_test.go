package cache_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/kms-agent/kms-agent/cache"
)

func TestMain(m *testing.M) {
	if os.Getenv(memlockChild) != "" {
		os.Exit(newWithoutMemlock())
	}
	goleak.VerifyTestMain(m)
}

// What upstream may say.
var (
	errNo    = errors.New("disabled")
	errDown  = errors.New("connection refused")
	errOther = errors.New("not a ciphertext of this key")
)

func classify(err error) cache.Verdict {
	switch {
	case errors.Is(err, errNo):
		return cache.No
	case errors.Is(err, errOther):
		return cache.Other
	default:
		return cache.Unreachable
	}
}

// The authorities of these tests.
var (
	wraps   = cache.Authority{Backend: "b", WrappingKey: "kek", Version: "1", Direction: cache.Encrypt}
	unwraps = cache.Authority{Backend: "b", WrappingKey: "kek", Version: "1", Direction: cache.Decrypt}
)

func limits() cache.Limits {
	return cache.Limits{
		MaxAge: 5 * time.Minute, MaxLifetime: 24 * time.Hour, MaxIdle: 6 * time.Hour, MaxMessages: 1 << 20, MaxBytes: 1 << 30,
	}
}

// upstream answers what a test tells it to, and counts.
type upstream struct {
	mu       sync.Mutex // guards what follows
	fill     error
	confirm  error
	once     error // what the next confirmation hears
	delay    time.Duration
	fills    int
	confirms int
	asked    []cache.Authority // by confirm
	samples  []any
}

func (u *upstream) say(fill, confirm error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.fill, u.confirm = fill, confirm
}

func (u *upstream) takes(d time.Duration) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.delay = d
}

func (u *upstream) counts() (fills, confirms int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.fills, u.confirms
}

// answer takes its time and its answer from when it was asked.
func (u *upstream) answer(ctx context.Context, count *int, say *error) (int, error) {
	u.mu.Lock()
	*count++
	n, err, delay := *count, *say, u.delay
	u.mu.Unlock()
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return n, ctx.Err()
		}
	}
	return n, err
}

func (u *upstream) Fill(ctx context.Context) (cache.Material, error) {
	n, err := u.answer(ctx, &u.fills, &u.fill)
	if err != nil {
		return cache.Material{}, fmt.Errorf("fill: %w", err)
	}
	return cache.Material{DataKey: dataKey(n), Origin: n}, nil
}

func (u *upstream) Confirm(ctx context.Context, a cache.Authority, sample any) error {
	u.mu.Lock()
	u.asked, u.samples = append(u.asked, a), append(u.samples, sample)
	once := u.once
	u.once = nil
	u.mu.Unlock()
	if once != nil {
		return once
	}
	if _, err := u.answer(ctx, &u.confirms, &u.confirm); err != nil {
		return fmt.Errorf("confirm: %w", err)
	}
	return nil
}

// dataKey is the data key of the nth fill.
func dataKey(n int) []byte {
	key := make([]byte, cache.DataKeySize)
	for i := range key {
		key[i] = byte(n>>(8*(i%4))) ^ 0xa5
	}
	return key
}

// rig is a cache over a fake upstream, in a bubble of testing/synctest.
type rig struct {
	*cache.Cache
	t     *testing.T
	up    *upstream
	start time.Time
}

func (r *rig) Now() time.Duration { return time.Hour + time.Since(r.start) }

// bubble runs a test on a cache with time under control.
func bubble(t *testing.T, test func(*rig), change ...func(*cache.Config)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, change...)
		defer r.Close()
		test(r)
	})
}

func newRig(t *testing.T, change ...func(*cache.Config)) *rig {
	t.Helper()
	r := &rig{t: t, up: &upstream{}, start: time.Now()}
	cfg := cache.Config{
		Now: r.Now, MaxEntries: 100, Classify: classify, Confirm: r.up.Confirm, Rand: func() float64 { return 0 },
	}
	for _, f := range change {
		f(&cfg)
	}
	c, err := cache.New(cfg)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	r.Cache = c
	return r
}

// run has Run running until the function that it returns is called.
func (r *rig) run() (stop func()) {
	ctx, cancel := context.WithCancel(r.t.Context())
	done := make(chan error)
	go func() { done <- r.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("Run = %v, want nil", err)
		}
	}
}

func (r *rig) encryption(change ...func(*cache.EncryptRequest)) cache.EncryptRequest {
	req := cache.EncryptRequest{
		Caller: "alice", Slot: cache.Slot{Key: "orders", Authority: wraps, Partition: "alice"},
		Limits: limits(), Bytes: 100, Fill: r.up.Fill,
	}
	for _, f := range change {
		f(&req)
	}
	return req
}

func (r *rig) decryption(id int, change ...func(*cache.DecryptRequest)) cache.DecryptRequest {
	req := cache.DecryptRequest{
		Caller: "alice", Key: "orders", ID: decryptID(id), Authority: unwraps, Limits: limits(), Fill: r.up.Fill,
	}
	for _, f := range change {
		f(&req)
	}
	return req
}

func decryptID(id int) cache.DecryptID {
	return cache.DecryptID{byte(id), byte(id >> 8), byte(id >> 16), 1}
}

// encrypt uses a data key and gives it back.
func (r *rig) encrypt(change ...func(*cache.EncryptRequest)) (cache.Freshness, int, error) {
	u, err := r.Encrypt(r.t.Context(), r.encryption(change...))
	return r.finish(u, err)
}

func (r *rig) decrypt(id int, change ...func(*cache.DecryptRequest)) (cache.Freshness, int, error) {
	u, err := r.Decrypt(r.t.Context(), r.decryption(id, change...))
	return r.finish(u, err)
}

// finish checks that the data key is the one of its origin.
func (r *rig) finish(u *cache.Use, err error) (cache.Freshness, int, error) {
	if err != nil {
		return cache.Freshness{}, 0, err
	}
	defer u.Release()
	n, _ := u.Origin().(int)
	if got, want := string(u.DataKey()), string(dataKey(n)); got != want {
		r.t.Errorf("data key of fill %d = %x, want %x", n, got, want)
	}
	return u.Freshness(), n, nil
}

// served fails the test unless the operation was, and returns its freshness.
func served(t *testing.T, f cache.Freshness, _ int, err error) cache.Freshness {
	t.Helper()
	if err != nil {
		t.Fatalf("refused: %v", err)
	}
	return f
}

func refused(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error = %v, want %v", err, want)
	}
}

func (r *rig) wantCalls(fills, confirms int) {
	r.t.Helper()
	synctest.Wait()
	if f, c := r.up.counts(); f != fills || c != confirms {
		r.t.Errorf("calls upstream = %d fills, %d confirmations; want %d, %d", f, c, fills, confirms)
	}
}

func stale(d time.Duration) *time.Duration { return &d }
