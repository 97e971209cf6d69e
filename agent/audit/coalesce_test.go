package audit_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/audit"
)

func denialBy(caller, key string) *audit.Record {
	r := sample("denied")
	r.Caller.SPIFFEID, r.Key = "spiffe://example.org/"+caller, key
	r.Outcome, r.Reason, r.Rule = audit.Denied, "ACCESS_DENIED", ""
	return r
}

func recordsOf(t *testing.T, content []byte) []audit.Record {
	t.Helper()
	var all []audit.Record
	lines := bufio.NewScanner(bytes.NewReader(content))
	lines.Buffer(nil, 2<<20)
	for lines.Scan() {
		var r audit.Record
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			t.Fatalf("%v: %s", err, lines.Bytes())
		}
		all = append(all, r)
	}
	return all
}

// denials counts what the records of denials stand for, by key.
func denials(records []audit.Record) (lines int, stand map[string]uint64) {
	stand = map[string]uint64{}
	for _, r := range records {
		if r.Outcome == audit.Denied {
			lines++
			stand[r.Key] += max(r.Count, 1)
		}
	}
	return lines, stand
}

// Equal denials are one record and a count; none is lost, none told twice, and
// what is allowed is written each time.
func TestCoalescedDenials(t *testing.T) {
	r := newRig(t)
	r.cfg.CoalesceDenials = time.Hour
	l := r.open()
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			for range 50 {
				for _, record := range []*audit.Record{denialBy("a", "orders"), denialBy("a", "archive"), sample("allowed")} {
					if err := l.Write(context.Background(), record); err != nil {
						t.Errorf("Write: %v", err)
					}
				}
			}
		})
	}
	callers.Wait()
	if s := l.Status(); s.Coalesced < 700 {
		t.Errorf("%d coalesced, want nearly 800", s.Coalesced)
	}
	r.close(l)
	records := recordsOf(t, r.content())
	lines, stand := denials(records)
	if stand["orders"] != 400 || stand["archive"] != 400 || lines > 20 {
		t.Errorf("%d records of denials stand for %v, want 400 each in a few", lines, stand)
	}
	if allowed := len(records) - lines - 1; allowed != 400 {
		t.Errorf("%d records of what was allowed, want 400", allowed)
	}
	last := records[len(records)-1]
	if last.Count == 0 || last.Since.IsZero() || last.Time.Before(last.Since) || last.RequestID == "" || last.Caller.PID != 4711 {
		t.Errorf("summary %+v; want a count, its time, the last request and process", last)
	}
	r.wantOK(uint64(len(records)))
}

// A summary comes within the window, and the next equal denial after a quiet
// window is written at once.
func TestSummaryWithinItsTime(t *testing.T) {
	r := newRig(t)
	r.cfg.CoalesceDenials = 100 * time.Millisecond
	m := &memory{}
	r.cfg.Sink = m
	l := r.open()
	for range 3 {
		if err := l.Write(context.Background(), denialBy("a", "orders")); err != nil {
			t.Fatal(err)
		}
	}
	await := func(what string, good func(lines int, stand uint64) bool) {
		t.Helper()
		var lines int
		var stand map[string]uint64
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			if lines, stand = denials(recordsOf(t, m.bytes())); good(lines, stand["orders"]) {
				return
			}
		}
		t.Fatalf("%s: %d records of denials stand for %d", what, lines, stand["orders"])
	}
	await("summary", func(lines int, stand uint64) bool { return lines == 2 && stand == 3 })
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		before := l.Status().Coalesced
		if err := l.Write(context.Background(), denialBy("a", "orders")); err != nil {
			t.Fatal(err)
		}
		if l.Status().Coalesced == before {
			break // written at once: the window was quiet
		}
		if time.Now().After(deadline) {
			t.Fatal("a denial is counted for ever")
		}
		time.Sleep(250 * time.Millisecond)
	}
	r.close(l)
}

// Denials of a thousand callers and more are written one by one beyond the
// bound, and all are there.
func TestFloodOfDifferentDenials(t *testing.T) {
	r := newRig(t)
	r.cfg.CoalesceDenials = time.Hour
	l := r.open()
	for round := range 2 {
		for i := range 1500 {
			if err := l.Write(context.Background(), denialBy(fmt.Sprint(i), "orders")); err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
		}
	}
	if n := l.Status().Coalesced; n != 1024 {
		t.Errorf("%d coalesced, want those of 1024 callers", n)
	}
	r.close(l)
	if _, stand := denials(recordsOf(t, r.content())); stand["orders"] != 3000 {
		t.Errorf("the records stand for %d denials, want 3000", stand["orders"])
	}
}

// While records cannot be written no denial is counted: it is refused, as
// everything is. What was counted before is told when it can be.
func TestDenialsWhileTheSinkIsOut(t *testing.T) {
	r := newRig(t)
	r.cfg.CoalesceDenials = 50 * time.Millisecond
	m := &memory{}
	r.cfg.Sink = m
	l := r.open()
	for range 2 {
		if err := l.Write(context.Background(), denialBy("a", "orders")); err != nil {
			t.Fatal(err)
		}
	}
	m.set(func(int) (int, error) { return 0, errDisk })
	for deadline := time.Now().Add(10 * time.Second); !l.Status().Failing; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the summary was not tried")
		}
	}
	if err := l.Write(context.Background(), denialBy("a", "orders")); !errors.Is(err, audit.ErrSink) {
		t.Errorf("denial while the sink is out: %v, want ErrSink", err)
	}
	m.set(nil)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, stand := denials(recordsOf(t, m.bytes())); stand["orders"] == 2 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("what was counted is not told when the sink is back")
		}
	}
	r.close(l)
}

func TestAnswerOnFailure(t *testing.T) {
	r := newRig(t)
	r.cfg.OnFailure = audit.AnswerOnFailure
	m := &memory{}
	r.cfg.Sink = m
	l := r.open()
	m.set(func(int) (int, error) { return 0, errDisk })
	for i := range 5 {
		if err := l.Write(context.Background(), sample("lost")); err != nil {
			t.Errorf("write %d: %v, want an answer", i, err)
		}
	}
	long := sample("long")
	long.Detail = strings.Repeat("x", audit.MaxRecordSize)
	if err := l.Write(context.Background(), long); !errors.Is(err, audit.ErrTooLong) {
		t.Errorf("what a caller alone brings about: %v, want ErrTooLong", err)
	}
	if s := l.Status(); s.Unrecorded != 5 || !s.Failing || s.Refused != 1 {
		t.Errorf("status %+v; want 5 unrecorded, failing, 1 refused", s)
	}
	m.set(nil)
	r.write(l, 2)
	r.close(l)
	var told uint64
	for _, record := range recordsOf(t, m.bytes()) {
		if record.Operation == audit.EventUnrecorded {
			told += record.Count
		}
	}
	if told != 5 {
		t.Errorf("the log tells of %d operations without a record, want 5", told)
	}
}

// A sink that hangs does not hold up those who are answered without a record.
func TestAnswerOnFailureWithAStuckSink(t *testing.T) {
	r := newRig(t)
	r.cfg.OnFailure, r.cfg.WriteTimeout = audit.AnswerOnFailure, 300*time.Millisecond
	m := &memory{}
	r.cfg.Sink = m
	l := r.open()
	release := make(chan struct{})
	m.set(func(n int) (int, error) { <-release; return n, nil })
	began := time.Now()
	for range 100 {
		if err := l.Write(context.Background(), sample("stuck")); err != nil {
			t.Fatal(err)
		}
	}
	if d := time.Since(began); d > 3*time.Second {
		t.Errorf("100 answers took %v; only the first waits", d)
	}
	close(release)
	r.close(l)
}
