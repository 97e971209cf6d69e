package audit_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/kms-agent/kms-agent/agent/audit"
)

func TestMain(m *testing.M) {
	if role := os.Getenv("AUDIT_TEST_CHILD"); role != "" {
		os.Exit(child(role))
	}
	goleak.VerifyTestMain(m)
}

// rig is a log in a directory of its own.
type rig struct {
	t   testing.TB
	cfg audit.Config
}

func newRig(t testing.TB) *rig {
	dir := t.TempDir()
	state := filepath.Join(dir, "state")
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	return &rig{t: t, cfg: audit.Config{Path: filepath.Join(dir, "audit.log"), StateDir: state}}
}

func (r *rig) open() *audit.Log {
	r.t.Helper()
	l, err := audit.Open(r.cfg)
	if err != nil {
		r.t.Fatalf("Open: %v", err)
	}
	r.t.Cleanup(func() { _ = l.Close() })
	return l
}

func (r *rig) close(l *audit.Log) {
	r.t.Helper()
	if err := l.Close(); err != nil {
		r.t.Fatalf("Close: %v", err)
	}
}

func (r *rig) write(l *audit.Log, n int) {
	r.t.Helper()
	for i := range n {
		if err := l.Write(context.Background(), sample(fmt.Sprintf("request-%d", i))); err != nil {
			r.t.Fatalf("Write: %v", err)
		}
	}
}

// log opens, writes n records and closes.
func (r *rig) log(n int) {
	r.t.Helper()
	l := r.open()
	r.write(l, n)
	r.close(l)
}

func (r *rig) initialKey() []byte {
	r.t.Helper()
	text, err := os.ReadFile(filepath.Join(r.cfg.StateDir, "audit-initial.key"))
	if err != nil {
		r.t.Fatal(err)
	}
	key, err := audit.ParseInitialKey(text)
	if err != nil {
		r.t.Fatal(err)
	}
	return key
}

func (r *rig) content() []byte {
	r.t.Helper()
	content, err := os.ReadFile(r.cfg.Path)
	if err != nil {
		r.t.Fatal(err)
	}
	return content
}

// verify verifies the files, or the log alone when none is named.
func (r *rig) verify(o audit.VerifyOptions, paths ...string) audit.Report {
	r.t.Helper()
	if len(paths) == 0 {
		paths = []string{r.cfg.Path}
	}
	var inputs []audit.Input
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			r.t.Fatal(err)
		}
		inputs = append(inputs, audit.Input{Name: filepath.Base(path), Reader: bytes.NewReader(content)})
	}
	report, err := audit.Verify(r.initialKey(), o, inputs...)
	if err != nil {
		r.t.Fatalf("Verify: %v", err)
	}
	return report
}

func (r *rig) wantOK(records uint64, paths ...string) audit.Report {
	r.t.Helper()
	report := r.verify(audit.VerifyOptions{}, paths...)
	if !report.OK() || report.Records != records {
		r.t.Fatalf("verify: got %d records, fault %v, gaps %v; want %d good records", report.Records, report.Fault, report.Gaps, records)
	}
	return report
}

func sample(id string) *audit.Record {
	return &audit.Record{
		Kind: audit.KindOperation, RequestID: id, Door: "native",
		Caller:    audit.Caller{SPIFFEID: "spiffe://example.org/ns/shop/sa/orders", Proof: "x509-svid", UID: 1000, GID: 1000, PID: 4711},
		Operation: "encrypt", Key: "orders", KeyVersion: "3",
		Context:   map[string]string{"tenant": "7", "table": "payments"},
		MessageID: "5f0e", Rule: "orders-service", Outcome: audit.Success,
		Freshness: audit.Freshness{Source: "cached", AgeMillis: 12345}, Backend: "local",
		DurationMicros: 87, BytesIn: 1024, BytesOut: 1500,
	}
}

// memory is a sink that keeps what it took, and takes what its limits let it.
type memory struct {
	mu      sync.Mutex
	content []byte
	writes  int
	syncs   int
	limit   func(n int) (int, error) // nil: takes everything
	sync    func() error
}

func (m *memory) Write(p []byte) (int, error) {
	m.mu.Lock()
	limit := m.limit
	m.mu.Unlock()
	n, err := len(p), error(nil)
	if limit != nil {
		n, err = limit(len(p))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.writes++
	m.content = append(m.content, p[:n]...)
	return n, err
}

func (m *memory) Sync() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.syncs++
	if m.sync != nil {
		return m.sync()
	}
	return nil
}

func (m *memory) Close() error   { return nil }
func (m *memory) String() string { return "memory" }

func (m *memory) set(limit func(int) (int, error)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.limit = limit
}

func (m *memory) bytes() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.Clone(m.content)
}

func (m *memory) counts() (writes, syncs int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.writes, m.syncs
}

var errDisk = errors.New("no space left on device")

// clock is a wall clock that stands.
func clock() time.Time { return time.Date(2026, 3, 4, 5, 6, 7, 890000000, time.UTC) }
