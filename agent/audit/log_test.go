package audit_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kms-agent/kms-agent/agent/audit"
)

func TestALogVerifiesAndGoesOn(t *testing.T) {
	r := newRig(t)
	l := r.open()
	if notes := strings.Join(l.Notes(), "\n"); !strings.Contains(notes, "begins") || !strings.Contains(notes, "audit-initial.key") {
		t.Errorf("notes of a new chain %q do not tell where its key is", notes)
	}
	record := sample("a")
	if err := l.Write(t.Context(), record); err != nil {
		t.Fatal(err)
	}
	if record.Sequence != 2 || record.Time.IsZero() {
		t.Errorf("after Write: sequence %d, time %v; want 2 and a time", record.Sequence, record.Time)
	}
	chainID := l.Status().Chain
	r.close(l)
	l = r.open()
	if notes := strings.Join(l.Notes(), "\n"); !strings.Contains(notes, "still is in") {
		t.Errorf("notes %q do not ask to move the initial key", notes)
	}
	r.write(l, 2)
	if s := l.Status(); s.Sequence != 4 || s.Refused != 0 || s.Failing || s.Path != r.cfg.Path {
		t.Errorf("status: got %+v", s)
	}
	r.close(l)
	report := r.wantOK(4)
	if report.Chain != chainID || report.First != 1 || report.Last != 4 || !report.TailUnproven {
		t.Errorf("report: got %+v", report)
	}
	if report.FirstTime.IsZero() || report.LastTime.Before(report.FirstTime) {
		t.Errorf("time range %v to %v", report.FirstTime, report.LastTime)
	}
	if r.verify(audit.VerifyOptions{AtLeast: 4}).TailUnproven {
		t.Error("the tail is unproven although the log is known to have ended there")
	}
}

func TestFilesArePrivate(t *testing.T) {
	r := newRig(t)
	r.cfg.ContextValues = audit.ContextHMAC
	r.log(1)
	for _, name := range []string{"audit.log", "state/audit.state", "state/audit-initial.key", "state/audit-context.key"} {
		info, err := os.Stat(filepath.Join(filepath.Dir(r.cfg.Path), name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != 0o600 {
			t.Errorf("%s has mode %v, want 0600", name, info.Mode())
		}
	}
}

func TestWriteTakesNoCareOfTheLogsOwnFields(t *testing.T) {
	r := newRig(t)
	m := &memory{}
	r.cfg.Sink = m
	l := r.open()
	record := sample("a")
	record.Sequence, record.Log = 99, &audit.LogEvent{GapFrom: 1, GapTo: 50}
	if err := l.Write(t.Context(), record); err != nil {
		t.Fatal(err)
	}
	r.close(l)
	lines := strings.Split(strings.TrimSpace(string(m.bytes())), "\n")
	if strings.Contains(lines[1], "gap_from") || !strings.HasPrefix(lines[1], `{"sequence":2,`) {
		t.Errorf("line: %s", lines[1])
	}
}

func TestContextValues(t *testing.T) {
	write := func(values audit.ContextValues) []audit.Record {
		r := newRig(t)
		m := &memory{}
		r.cfg.Sink, r.cfg.ContextValues = m, values
		l := r.open()
		r.write(l, 1)
		other := sample("b")
		other.Context = map[string]string{"tenant": "7", "table": "7"}
		if err := l.Write(t.Context(), other); err != nil {
			t.Fatal(err)
		}
		r.close(l)
		if values != audit.ContextClear && strings.Contains(string(m.bytes()), "payments") {
			t.Errorf("%s: a value stands in clear in the log", values)
		}
		var records []audit.Record
		for line := range strings.Lines(string(m.bytes())) {
			var record audit.Record
			if err := json.Unmarshal([]byte(line), &record); err != nil {
				t.Fatal(err)
			}
			records = append(records, record)
		}
		return records[1:]
	}
	for _, values := range []audit.ContextValues{"", audit.ContextKeysOnly} {
		got := write(values)[0]
		if diff := cmp.Diff([]string{"table", "tenant"}, got.ContextKeys); diff != "" || got.Context != nil || got.ContextHMAC != nil {
			t.Errorf("%q: got %+v", values, got)
		}
	}
	got := write(audit.ContextClear)[0]
	if diff := cmp.Diff(map[string]string{"tenant": "7", "table": "payments"}, got.Context); diff != "" || got.ContextKeys != nil || got.ContextHMAC != nil {
		t.Errorf("clear: got %+v", got)
	}
	both := write(audit.ContextHMAC)
	first, second := both[0].ContextHMAC, both[1].ContextHMAC
	if len(first) != 2 || len(first["tenant"]) != 32 || both[0].Context != nil || both[0].ContextKeys != nil {
		t.Fatalf("hmac: got %+v", both[0])
	}
	if first["tenant"] != second["tenant"] || first["table"] == second["table"] || second["table"] == second["tenant"] {
		t.Errorf("HMACs do not tell equal values of one name from others: %v, %v", first, second)
	}
	if write(audit.ContextHMAC)[0].ContextHMAC["tenant"] == first["tenant"] {
		t.Error("two state directories have the same HMAC key")
	}
}

func TestConcurrentRecordsShareAWrite(t *testing.T) {
	for _, durable := range []bool{false, true} {
		r := newRig(t)
		release := make(chan struct{})
		m := &memory{}
		r.cfg.Sink, r.cfg.Durable = m, durable
		l := r.open()
		entered := make(chan struct{}, 1)
		m.set(func(n int) (int, error) {
			entered <- struct{}{}
			<-release
			return n, nil
		})
		writes, syncs := m.counts()
		var group sync.WaitGroup
		const records = 16
		group.Go(func() { r.write(l, 1) })
		<-entered // one is being written; the others have to wait
		m.set(nil)
		for range records - 1 {
			group.Go(func() { r.write(l, 1) })
		}
		waitFor(t, func() bool { return l.Status().Queued == records-1 })
		close(release)
		group.Wait()
		if after, _ := m.counts(); after-writes != 2 {
			t.Errorf("durable %v: %d records took %d writes, want 2", durable, records, after-writes)
		}
		_, after := m.counts()
		if durable && after-syncs < 2 || !durable && after-syncs > 1 {
			t.Errorf("durable %v: %d syncs for two groups", durable, after-syncs)
		}
		r.close(l)
		if s := l.Status(); s.Sequence != records+1 {
			t.Errorf("sequence %d, want %d", s.Sequence, records+1)
		}
	}
}

// waitFor waits until what another goroutine does is visible.
func waitFor(t *testing.T, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !condition(); {
		if time.Now().After(deadline) {
			t.Fatal("condition not met in 10 s")
		}
		time.Sleep(time.Millisecond)
	}
}

func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		m := &memory{}
		release := make(chan struct{})
		r.cfg.Sink, r.cfg.MaxQueue, r.cfg.WriteTimeout = m, 2, time.Minute
		l := r.open()
		m.set(func(n int) (int, error) { <-release; return n, nil })

		results := make(chan error, 3)
		for range 3 { // one is being written, two wait
			go func() { results <- l.Write(context.Background(), sample("a")) }()
			synctest.Wait()
		}
		if err := l.Write(context.Background(), sample("b")); !errors.Is(err, audit.ErrQueueFull) {
			t.Errorf("fourth record: got %v, want ErrQueueFull", err)
		}
		done, cancel := context.WithCancel(context.Background())
		cancel()
		if err := l.Write(done, sample("c")); !errors.Is(err, context.Canceled) {
			t.Errorf("context that has ended: got %v, want context.Canceled", err)
		}
		began := time.Now()
		for range 3 {
			if err := <-results; !errors.Is(err, audit.ErrTimeout) {
				t.Errorf("blocked sink: got %v, want ErrTimeout", err)
			}
		}
		if took := time.Since(began); took != time.Minute {
			t.Errorf("timeout after %v, want %v", took, time.Minute)
		}
		if s := l.Status(); s.Refused != 5 || !s.Failing {
			t.Errorf("status %+v, want 5 refused and failing", s)
		}
		close(release)
		synctest.Wait()
		if err := l.Write(context.Background(), sample("d")); err != nil {
			t.Errorf("after the sink moves again: %v", err)
		}
		r.close(l)
		if err := l.Write(context.Background(), sample("e")); !errors.Is(err, audit.ErrClosed) {
			t.Errorf("after Close: got %v, want ErrClosed", err)
		}
		if err := l.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
		// The one that was being written is there, those that waited are not.
		if got := strings.Count(string(m.bytes()), `"request_id":"a"`); got != 1 {
			t.Errorf("%d records that timed out were written, want 1", got)
		}
	})
}

func TestCloseReportsABlockedSink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		m := &memory{}
		release := make(chan struct{})
		r.cfg.Sink = m
		l := r.open()
		m.set(func(n int) (int, error) { <-release; return n, nil })
		go func() { _ = l.Write(context.Background(), sample("a")) }()
		synctest.Wait()
		if err := l.Close(); !errors.Is(err, audit.ErrTimeout) {
			t.Errorf("Close: got %v, want ErrTimeout", err)
		}
		close(release)
		synctest.Wait()
		if err := l.Close(); err != nil {
			t.Errorf("Close once the sink moves: %v", err)
		}
	})
}

func TestARecordHasABound(t *testing.T) {
	r := newRig(t)
	l := r.open()
	record := sample("a")
	record.Detail = strings.Repeat("x", audit.MaxRecordSize)
	if err := l.Write(t.Context(), record); !errors.Is(err, audit.ErrTooLong) {
		t.Errorf("got %v, want ErrTooLong", err)
	}
	record.Detail = strings.Repeat("x", audit.MaxRecordSize-2000)
	if err := l.Write(t.Context(), record); err != nil {
		t.Errorf("a long record: %v", err)
	}
	r.close(l)
	r.wantOK(2)
}

func TestDurableRefusesWhenTheSyncFails(t *testing.T) {
	r := newRig(t)
	m := &memory{}
	r.cfg.Sink, r.cfg.Durable = m, true
	l := r.open()
	m.mu.Lock()
	m.sync = func() error { return errDisk }
	m.mu.Unlock()
	if err := l.Write(t.Context(), sample("a")); !errors.Is(err, errDisk) || !errors.Is(err, audit.ErrSink) {
		t.Errorf("got %v, want the sync's error", err)
	}
	m.mu.Lock()
	m.sync = nil
	m.mu.Unlock()
	r.write(l, 1)
	r.close(l)
	// The refused record is in the log: it had been written.
	if n := strings.Count(string(m.bytes()), "\n"); n != 3 {
		t.Errorf("%d records, want 3", n)
	}
}

func TestTwoAgentsCannotShare(t *testing.T) {
	r := newRig(t)
	l := r.open()
	if _, err := audit.Open(r.cfg); !errors.Is(err, audit.ErrInUse) {
		t.Errorf("same state: got %v, want ErrInUse", err)
	}
	other := newRig(t)
	other.cfg.Path = r.cfg.Path
	if _, err := audit.Open(other.cfg); !errors.Is(err, audit.ErrInUse) {
		t.Errorf("same log: got %v, want ErrInUse", err)
	}
	if err := audit.AcceptGap(r.cfg, "no"); !errors.Is(err, audit.ErrInUse) {
		t.Errorf("AcceptGap: got %v, want ErrInUse", err)
	}
	r.write(l, 1)
	r.close(l)
	r.wantOK(2)
}

func TestBadConfigurations(t *testing.T) {
	for name, change := range map[string]func(*audit.Config){
		"no path":           func(c *audit.Config) { c.Path = "" },
		"no state":          func(c *audit.Config) { c.StateDir = "" },
		"state is missing":  func(c *audit.Config) { c.StateDir += "/none" },
		"log is a device":   func(c *audit.Config) { c.Path = "/dev/null" },
		"log's directory":   func(c *audit.Config) { c.Path = "/nonexistent/audit.log" },
		"context values":    func(c *audit.Config) { c.ContextValues = "some" },
		"queue":             func(c *audit.Config) { c.MaxQueue = 1 << 20 },
		"timeout":           func(c *audit.Config) { c.WriteTimeout = -1 },
		"key's directory":   func(c *audit.Config) { c.InitialKeyPath = "/nonexistent/key" },
		"key file is wrong": func(c *audit.Config) { c.InitialKeyPath = "/dev/null" },
	} {
		r := newRig(t)
		change(&r.cfg)
		if l, err := audit.Open(r.cfg); err == nil {
			t.Errorf("%s: Open accepted it", name)
			r.close(l)
		}
	}
}
