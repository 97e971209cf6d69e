package kms_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/agent/audit"
	"github.com/kms-agent/kms-agent/agent/kms"
	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/agent/quota"
	mixed "github.com/kms-agent/kms-agent/agent/random"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/identity"
	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/local"
)

// rig is a service over a real keystore and a real audit log. Its backend does
// what it should until a test tells it otherwise.
type rig struct {
	*kms.Service
	t        testing.TB
	backend  *troubled
	keystore *local.Keystore
	audit    *audit.Log
	quota    *quota.Keeper
	random   *mixed.Pool
	auditLog string
	clock    *clock
	config   kms.Config

	mu     sync.Mutex // guards alarms
	alarms []string
}

func (r *rig) alarm(message string, _ error, _, _ string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.alarms = append(r.alarms, message)
}

func (r *rig) alarmed() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.alarms)
}

// clock is CLOCK_BOOTTIME under the test's control.
type clock struct {
	mu  sync.Mutex // guards now
	now time.Duration
}

func (c *clock) Now() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now += d
}

// troubled is the local backend, with faults that a test sets.
type troubled struct {
	*local.Backend

	mu       sync.Mutex // guards what follows
	err      error      // every call fails with it
	wrapped  func([]byte) []byte
	unwraped func([]byte) []byte
	before   func(call string) error // runs before each call, which fails with its error
	takes    time.Duration           // how long each call takes; it ends with its context
	refuses  func(ciphertext []byte) error
	wraps    int
	unwraps  int
	sees     bool // its policy sees contexts
}

// SeesContext implements plugins.ContextAware.
func (b *troubled) SeesContext() (sees, known bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.sees, true
}

// seesContexts gives a backend a policy that sees contexts.
func (b *troubled) seesContexts() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sees = true
}

// forever is longer than anybody waits.
const forever = time.Hour

func (b *troubled) slow(takes time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.takes = takes
}

func (b *troubled) refuse(unwrap func(ciphertext []byte) error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refuses = unwrap
}

func (b *troubled) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err = err
}

func (b *troubled) lie(wrapped, unwrapped func([]byte) []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.wrapped, b.unwraped = wrapped, unwrapped
}

func (b *troubled) intercept(before func(call string) error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.before = before
}

// meets runs what a test has set before a call.
func (b *troubled) meets(ctx context.Context, call string) error {
	b.mu.Lock()
	before, takes := b.before, b.takes
	b.mu.Unlock()
	if takes > 0 {
		select {
		case <-time.After(takes):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if before == nil {
		return nil
	}
	return before(call)
}

func (b *troubled) counts() (wraps, unwraps int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.wraps, b.unwraps
}

func (b *troubled) Wrap(ctx context.Context, key plugins.KeyRef, plaintext []byte, binding plugins.Binding) ([]byte, error) {
	if err := b.meets(ctx, "wrap"); err != nil {
		return nil, err
	}
	b.mu.Lock()
	err, alter := b.err, b.wrapped
	b.wraps++
	b.mu.Unlock()
	if err != nil {
		return nil, err
	}
	out, err := b.Backend.Wrap(ctx, key, plaintext, binding)
	if alter != nil {
		out = alter(out)
	}
	return out, err
}

func (b *troubled) Unwrap(ctx context.Context, key plugins.KeyRef, ciphertext []byte, binding plugins.Binding) ([]byte, error) {
	if err := b.meets(ctx, "unwrap"); err != nil {
		return nil, err
	}
	b.mu.Lock()
	err, alter := b.err, b.unwraped
	if b.refuses != nil && err == nil {
		err = b.refuses(ciphertext)
	}
	b.unwraps++
	b.mu.Unlock()
	if err != nil {
		return nil, err
	}
	out, err := b.Backend.Unwrap(ctx, key, ciphertext, binding)
	if alter != nil && err == nil {
		out = alter(out)
	}
	return out, err
}

func (b *troubled) Describe(ctx context.Context, uri string) (plugins.Description, error) {
	if err := b.meets(ctx, "describe"); err != nil {
		return plugins.Description{}, err
	}
	b.mu.Lock()
	err := b.err
	b.mu.Unlock()
	if err != nil {
		return plugins.Description{}, err
	}
	return b.Backend.Describe(ctx, uri)
}

// The callers of these tests.
const (
	orders   = "spiffe://example.org/ns/shop/sa/orders"
	stranger = "spiffe://example.org/ns/shop/sa/stranger"
)

func caller(t testing.TB, id string) kms.Call {
	t.Helper()
	return kms.Call{
		Door: "test", RequestID: "r-" + t.Name(),
		Caller: identity.Caller{
			ID: spiffeid.RequireFromString(id), Proof: identity.ProofX509SVID,
			Peer: identity.Peer{UID: 1000, GID: 1000, PID: 42},
		},
	}
}

func limits() cache.Limits {
	return cache.Limits{
		MaxAge: 5 * time.Minute, MaxLifetime: 24 * time.Hour, MaxIdle: 6 * time.Hour, MaxMessages: 1 << 32, MaxBytes: 1 << 50,
	}
}

// everything allows the orders workload all operations on its key.
func everything() policy.Rule {
	return policy.Rule{
		Name: "orders", Callers: []string{orders}, Keys: []string{"orders", "archive"},
		Operations: []string{
			"encrypt", "decrypt", "generate-data-key", "generate-data-key-without-plaintext", "decrypt-data-key",
			"wrap", "unwrap", "describe",
		},
	}
}

// random allows it the one operation that concerns no key.
func random() policy.Rule {
	return policy.Rule{Name: "random", Callers: []string{orders}, Operations: []string{"generate-random"}}
}

func compile(t testing.TB, rules ...policy.Rule) *policy.Policy {
	t.Helper()
	p, err := policy.Compile(policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Rules: rules})
	if err != nil {
		t.Fatalf("policy: %v", err)
	}
	return p
}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := newRigWithSink(t, nil)
	return r
}

func newRigWithSink(t testing.TB, sink audit.Sink) *rig {
	t.Helper()
	dir := t.TempDir()
	r := &rig{t: t, clock: &clock{now: time.Hour}, auditLog: filepath.Join(dir, "audit.log")}
	r.keystore = newKeystore(t, dir, "orders", "archive", "secret")
	r.backend = &troubled{Backend: openLocal(t, dir)}
	cfg := audit.Config{Path: r.auditLog, StateDir: dir, InitialKeyPath: filepath.Join(dir, "initial.key"), Sink: sink, ContextValues: audit.ContextClear}
	if sink != nil {
		cfg.Path = ""
	}
	log, err := audit.Open(cfg)
	if err != nil {
		t.Fatalf("audit: %v", err)
	}
	r.audit = log
	t.Cleanup(func() { _ = log.Close() })
	r.quota, err = quota.Open(dir, r.clock.Now, time.Now)
	if err != nil {
		t.Fatalf("quota: %v", err)
	}
	t.Cleanup(func() { _ = r.quota.Close() })
	r.random = mixed.New(nil)
	t.Cleanup(r.random.Close)
	r.Service, err = kms.New(kms.Options{Audit: log, Quota: r.quota, Random: r.random, MaxEntries: 64, Now: r.clock.Now, ConfirmTimeout: 5 * time.Second, Alarm: r.alarm})
	if err != nil {
		t.Fatalf("service: %v", err)
	}
	t.Cleanup(r.Close)
	r.config = kms.Config{
		Policy: compile(t, everything(), random()), Backends: map[string]plugins.Backend{"local": r.backend},
		DataKeyUse: time.Minute, MaxStream: 1 << 20,
	}
	for _, name := range []string{"orders", "archive", "secret"} {
		r.config.Keys = append(r.config.Keys, kms.Key{
			Name: name, Wraps: []kms.Wrap{{Backend: "local", WrappingKey: "local:" + name}}, Limits: limits(), Partition: kms.PartitionCaller,
		})
	}
	r.apply()
	return r
}

func (r *rig) apply() {
	r.t.Helper()
	if err := r.Apply(r.config); err != nil {
		r.t.Fatalf("apply: %v", err)
	}
}

// lets allows further callers what the orders workload may do.
func (r *rig) lets(ids ...string) {
	r.t.Helper()
	rule := everything()
	rule.Callers = append(rule.Callers, ids...)
	r.config.Policy = compile(r.t, rule)
	r.apply()
}

func newKeystore(t testing.TB, dir string, names ...string) *local.Keystore {
	t.Helper()
	if err := local.CreateKeyFile(filepath.Join(dir, "seal")); err != nil {
		t.Fatalf("seal: %v", err)
	}
	ks, err := local.Create(filepath.Join(dir, "keystore"), local.Seal{KeyFile: filepath.Join(dir, "seal")})
	if err != nil {
		t.Fatalf("keystore: %v", err)
	}
	t.Cleanup(ks.Close)
	for _, name := range names {
		if err := ks.CreateKey(name); err != nil {
			t.Fatalf("key: %v", err)
		}
	}
	return ks
}

func openLocal(t testing.TB, dir string) *local.Backend {
	t.Helper()
	b := local.New()
	settings, err := json.Marshal(map[string]any{
		"keystore": filepath.Join(dir, "keystore"), "seal": map[string]string{"key_file": filepath.Join(dir, "seal")},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Open(t.Context(), settings); err != nil {
		t.Fatalf("backend: %v", err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// records returns what the audit log holds of operations.
func (r *rig) records() []audit.Record {
	r.t.Helper()
	f, err := os.Open(r.auditLog)
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	var all []audit.Record
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var rec audit.Record
		if err := json.Unmarshal(lines.Bytes(), &rec); err != nil {
			r.t.Fatalf("audit line %q: %v", lines.Text(), err)
		}
		if rec.Kind != audit.KindEvent {
			all = append(all, rec)
		}
	}
	return all
}

func (r *rig) lastRecord() audit.Record {
	r.t.Helper()
	all := r.records()
	if len(all) == 0 {
		r.t.Fatal("no audit record")
	}
	return all[len(all)-1]
}

// wantReason fails unless err is of that reason.
func wantReason(t *testing.T, err error, want kms.Reason) {
	t.Helper()
	if got := kms.ReasonOf(err); got != want {
		t.Errorf("reason = %q, want %q (error: %v)", got, want, err)
	}
}

var errUnreachable = errors.New("connection refused")

func unreachable() error { return &plugins.Error{Class: plugins.Unavailable, Err: errUnreachable} }
