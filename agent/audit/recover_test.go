package audit_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/kms-agent/kms-agent/agent/audit"
)

func rename(t testing.TB, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func store(t testing.TB, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func remove(t testing.TB, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func load(t testing.TB, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func TestRotationWhileTheAgentRuns(t *testing.T) {
	r := newRig(t)
	first, second := r.cfg.Path+".1", r.cfg.Path+".2"
	l := r.open()
	r.write(l, 3)
	rename(t, r.cfg.Path, second)
	r.write(l, 3)
	rename(t, r.cfg.Path, first)
	store(t, r.cfg.Path, nil) // as "create" of logrotate does
	r.write(l, 3)
	r.close(l)
	report := r.wantOK(10, second, first, r.cfg.Path)
	for i, want := range []audit.FileReport{
		{Name: "audit.log.2", First: 1, Last: 4}, {Name: "audit.log.1", First: 5, Last: 7}, {Name: "audit.log", First: 8, Last: 10},
	} {
		if report.Files[i] != want {
			t.Errorf("file %d: got %+v, want %+v", i, report.Files[i], want)
		}
	}
	if report := r.verify(audit.VerifyOptions{From: 8}); !report.OK() || report.First != 8 {
		t.Errorf("the last file alone: %+v, fault %v", report, report.Fault)
	}
}

func TestRotationWhileTheAgentIsStopped(t *testing.T) {
	for _, name := range []string{".1", "-20260304", ".1.gz"} {
		r := newRig(t)
		r.log(2)
		old := r.content()
		rename(t, r.cfg.Path, r.cfg.Path+name)
		if strings.HasSuffix(name, ".gz") {
			store(t, r.cfg.Path+name, []byte("compressed"))
		}
		r.log(1)
		store(t, r.cfg.Path+".whole", old)
		// Started, two, continued, one.
		r.wantOK(5, r.cfg.Path+".whole", r.cfg.Path)
		if !strings.Contains(string(r.content()), audit.EventContinued) {
			t.Errorf("%s: the new file does not say that it goes on", name)
		}
	}
}

// crash copies log and state of an open log, as a crash would leave them, into a new rig.
func (r *rig) crash() *rig {
	r.t.Helper()
	after := newRig(r.t)
	store(r.t, after.cfg.Path, r.content())
	for _, name := range []string{"audit.state", "audit-initial.key"} {
		store(r.t, filepath.Join(after.cfg.StateDir, name), load(r.t, filepath.Join(r.cfg.StateDir, name)))
	}
	return after
}

func TestRotationThenCrash(t *testing.T) {
	r := newRig(t)
	r.cfg.SaveEvery = time.Hour
	l := r.open()
	r.write(l, 3)
	after := r.crash() // the state knows nothing of the three
	rename(t, after.cfg.Path, after.cfg.Path+".1")
	after.log(1)
	after.wantOK(6, after.cfg.Path+".1", after.cfg.Path)

	rename(t, r.cfg.Path, r.cfg.Path+".1")
	r.write(l, 2)
	after = r.crash() // ... now it does: it is stored when the log turns to a new file
	after.log(1)
	store(t, after.cfg.Path+".1", load(t, r.cfg.Path+".1"))
	after.wantOK(7, after.cfg.Path+".1", after.cfg.Path)
}

func TestCopyAndTruncate(t *testing.T) {
	r := newRig(t)
	l := r.open()
	r.write(l, 3)
	store(t, r.cfg.Path+".1", r.content())
	if err := os.Truncate(r.cfg.Path, 0); err != nil {
		t.Fatal(err)
	}
	r.write(l, 1)
	r.close(l)
	r.wantOK(6, r.cfg.Path+".1", r.cfg.Path)
	if !strings.Contains(string(r.content()), audit.EventTruncated) {
		t.Error("no record says that the log was cut")
	}
	if report := r.verify(audit.VerifyOptions{}); report.OK() {
		t.Error("the cut log verifies without the copy")
	}
}

func TestMissingRecordsStopTheStart(t *testing.T) {
	for name, damage := range map[string]func(r *rig){
		"log deleted":        func(r *rig) { remove(t, r.cfg.Path) },
		"log emptied":        func(r *rig) { store(t, r.cfg.Path, nil) },
		"last record cut":    func(r *rig) { store(t, r.cfg.Path, cutLines(r.content(), 1)) },
		"other log restored": func(r *rig) { o := newRig(t); o.log(9); store(t, r.cfg.Path, o.content()) },
	} {
		r := newRig(t)
		r.log(4)
		damage(r)
		_, err := audit.Open(r.cfg)
		if !errors.Is(err, audit.ErrGap) || !strings.Contains(err.Error(), "accept-gap") {
			t.Errorf("%s: got %v, want ErrGap that names the cure", name, err)
			continue
		}
		if err := audit.AcceptGap(r.cfg, "disk replaced"); err != nil {
			t.Errorf("%s: AcceptGap: %v", name, err)
		}
		r.log(1)
		if name == "last record cut" {
			report := r.verify(audit.VerifyOptions{})
			if report.Fault != nil || report.OK() || len(report.Gaps) != 1 || report.Gaps[0].Reason != "disk replaced" || report.Gaps[0].From != 5 {
				t.Errorf("%s: report %+v, want one gap from 6 that is not OK", name, report)
			}
			if report := r.verify(audit.VerifyOptions{AllowGaps: true}); !report.OK() {
				t.Errorf("%s: allowed gap: %v", name, report.Fault)
			}
		}
	}
}

func cutLines(content []byte, n int) []byte {
	lines := bytes.SplitAfter(content, []byte("\n"))
	return bytes.Join(lines[:len(lines)-1-n], nil)
}

func TestAGapReachesBeyondWhatACrashForgot(t *testing.T) {
	r := newRig(t)
	r.cfg.SaveEvery = time.Hour
	l := r.open()
	r.write(l, 20)
	written := r.content()
	after := r.crash()
	store(t, after.cfg.Path, nil)
	if _, err := audit.Open(after.cfg); !errors.Is(err, audit.ErrGap) {
		t.Fatalf("got %v, want ErrGap", err)
	}
	if err := audit.AcceptGap(after.cfg, "log lost"); err != nil {
		t.Fatal(err)
	}
	after.log(1)
	// The lost log turns up again: what it says does not contradict.
	store(t, after.cfg.Path+".found", written)
	report := after.verify(audit.VerifyOptions{AllowGaps: true}, after.cfg.Path+".found", after.cfg.Path)
	if !report.OK() || report.Records != 23 {
		t.Errorf("got %d records, %v; want 23 good ones", report.Records, report.Fault)
	}
}

func TestChangedTailStopsTheStart(t *testing.T) {
	r := newRig(t)
	r.cfg.SaveEvery = time.Hour
	l := r.open()
	r.write(l, 4)
	for name, change := range map[string]func([]byte) []byte{
		"edited":  func(c []byte) []byte { return bytes.Replace(c, []byte("request-2"), []byte("request-9"), 1) },
		"removed": func(c []byte) []byte { return deleteLine(c, 3) },
		"swapped": func(c []byte) []byte { return swapLines(c, 2, 3) },
	} {
		after := r.crash()
		store(t, after.cfg.Path, change(r.content()))
		if _, err := audit.Open(after.cfg); !errors.Is(err, audit.ErrTampered) || !strings.Contains(err.Error(), "accept-gap") {
			t.Errorf("%s: got %v, want ErrTampered that names the cure", name, err)
		}
	}
}

func TestLostStateStopsTheStart(t *testing.T) {
	r := newRig(t)
	r.log(2)
	state := filepath.Join(r.cfg.StateDir, "audit.state")
	whole := load(t, state)
	for name, damaged := range map[string][]byte{
		"empty":   nil,
		"rubbish": bytes.Repeat([]byte("rubbish\n"), 256),
		"zeros":   make([]byte, 2048),
		"later":   bytes.ReplaceAll(whole, []byte(`"format":1`), []byte(`"format":2`)),
	} {
		remove(t, state)
		store(t, state, damaged)
		if _, err := audit.Open(r.cfg); !errors.Is(err, audit.ErrState) {
			t.Errorf("%s: got %v, want ErrState", name, err)
		}
	}
	remove(t, state)
	if _, err := audit.Open(r.cfg); !errors.Is(err, audit.ErrState) {
		t.Errorf("missing: got %v, want ErrState", err)
	}
	rename(t, r.cfg.Path, r.cfg.Path+".old")
	rename(t, filepath.Join(r.cfg.StateDir, "audit-initial.key"), filepath.Join(r.cfg.StateDir, "old.key"))
	r.log(1) // the cure that the error names
	r.wantOK(2)
}

func TestEitherCopyOfTheStateIsEnough(t *testing.T) {
	for i := range 2 {
		r := newRig(t)
		r.log(2)
		state := filepath.Join(r.cfg.StateDir, "audit.state")
		content := load(t, state)
		content[i*1024+20] ^= 1
		store(t, state, content)
		r.log(1)
		r.wantOK(4)
	}
}

func TestStateIsStoredInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.cfg.SaveEvery = 3 * time.Second
		l := r.open()
		state := filepath.Join(r.cfg.StateDir, "audit.state")
		before := load(t, state)
		r.write(l, 1)
		time.Sleep(3*time.Second - time.Nanosecond)
		synctest.Wait()
		if !bytes.Equal(before, load(t, state)) {
			t.Error("state was stored early")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if !strings.Contains(string(load(t, state)), `"sequence":2,`) {
			t.Errorf("state after SaveEvery: %s", load(t, state))
		}
		r.close(l)
	})
}

func TestStateIsStoredAfterSaveRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.cfg.SaveEvery, r.cfg.SaveRecords = time.Hour, 4
		l := r.open()
		r.write(l, 4)
		synctest.Wait()
		if !strings.Contains(string(load(t, filepath.Join(r.cfg.StateDir, "audit.state"))), `"sequence":5,`) {
			t.Error("four records later the state was not stored")
		}
		r.close(l)
	})
}

// Who takes the host can compute later keys, never earlier ones.
func TestTheStateForgetsEarlierKeys(t *testing.T) {
	r := newRig(t)
	r.log(5)
	state := string(load(t, filepath.Join(r.cfg.StateDir, "audit.state")))
	for n, key := range keys(r.initialKey(), 7) {
		want := n == 6 // of the next record: started and five are written
		if got := strings.Contains(state, hex.EncodeToString(key)); got != want {
			t.Errorf("key of record %d in the state: %v, want %v", n+1, got, want)
		}
	}
}

func TestAStreamDeclaresWhatACrashMayHaveLost(t *testing.T) {
	r := newRig(t)
	m := &memory{}
	r.cfg.Sink, r.cfg.SaveEvery = m, time.Hour
	l := r.open()
	r.write(l, 3)
	after := newRig(t)
	for _, name := range []string{"audit.state", "audit-initial.key"} {
		store(t, filepath.Join(after.cfg.StateDir, name), load(t, filepath.Join(r.cfg.StateDir, name)))
	}
	after.cfg.Sink = m
	l2 := after.open()
	after.write(l2, 1)
	after.close(l2)
	l3 := after.open() // after an orderly end there is no gap
	after.write(l3, 1)
	after.close(l3)
	report, err := audit.Verify(after.initialKey(), audit.VerifyOptions{AllowGaps: true}, audit.Input{Name: "m", Reader: bytes.NewReader(m.bytes())})
	if err != nil || !report.OK() || len(report.Gaps) != 1 || report.Records != 7 {
		t.Errorf("got %+v, fault %v, %v; want 7 records and one gap", report, report.Fault, err)
	}
}

func TestTwoWritersFromOneStateAreTold(t *testing.T) {
	r := newRig(t)
	r.log(2)
	twin := r.crash()
	r.log(2)
	twin.log(3)
	// The twin's records 6 follows its own 5.
	mixed := append(bytes.Clone(r.content()), bytes.SplitAfter(twin.content(), []byte("\n"))[5]...)
	store(t, r.cfg.Path, mixed)
	if report := r.verify(audit.VerifyOptions{}); report.Fault == nil || report.Fault.Reason != audit.ReasonForked {
		t.Errorf("fault %v, want %s", report.Fault, audit.ReasonForked)
	}
}

// Wherever a crash cuts the log, the chain goes on and nothing before is lost.
func TestCrashAnywhere(t *testing.T) {
	r := newRig(t)
	r.cfg.SaveEvery = time.Hour
	l := r.open()
	begin := len(r.content())
	r.write(l, 3)
	whole := r.content()
	for cut := begin; cut <= len(whole); cut += 7 {
		after := r.crash()
		store(t, after.cfg.Path, whole[:cut])
		after.log(1)
		after.log(1)
		if report := after.verify(audit.VerifyOptions{}); !report.OK() {
			t.Fatalf("cut at %d of %d: %v", cut, len(whole), report.Fault)
		}
	}
	// Power losses leave other things than nothing.
	for _, rubbish := range []string{"\x00\x00\x00\x00", "\n", "\n\n", "\x00\n\x00", "{\n}\n", strings.Repeat("z", 3<<20)} {
		after := r.crash()
		store(t, after.cfg.Path, append(bytes.Clone(whole), rubbish...))
		after.log(1)
		after.log(1)
		if report := after.verify(audit.VerifyOptions{}); !report.OK() || len(report.Recovered) != 1 {
			t.Fatalf("rubbish %.10q: %v", rubbish, report.Fault)
		}
	}
}

// However the sink fails, what Write promised is in the log, in order, and the
// log verifies.
func TestFailingSinkKeepsPromises(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		r := newRig(t)
		m := &memory{}
		r.cfg.Sink = m
		l, err := audit.Open(r.cfg)
		if err != nil {
			rt.Fatal(err)
		}
		var promised []string
		for i := range rapid.IntRange(1, 12).Draw(rt, "records") {
			switch rapid.IntRange(0, 2).Draw(rt, "fault") {
			case 0:
				m.set(nil)
			default:
				part := rapid.IntRange(0, 1200).Draw(rt, "part")
				m.set(func(n int) (int, error) { return min(n, part), errDisk })
			}
			id := fmt.Sprintf("id-%d", i)
			if err := l.Write(context.Background(), sample(id)); err == nil {
				promised = append(promised, id)
			}
		}
		m.set(nil)
		if err := errors.Join(l.Write(context.Background(), sample("end")), l.Close()); err != nil {
			rt.Fatal(err)
		}
		content := m.bytes()
		report, err := audit.Verify(r.initialKey(), audit.VerifyOptions{}, audit.Input{Name: "m", Reader: bytes.NewReader(content)})
		if err != nil || !report.OK() {
			rt.Fatalf("verify: %v, %v\n%s", report.Fault, err, content)
		}
		rest := string(content)
		for _, id := range promised {
			_, after, found := strings.Cut(rest, `"request_id":"`+id+`"`)
			if !found {
				rt.Fatalf("record %s was promised and is not there, or not in order\n%s", id, content)
			}
			rest = after
		}
	})
}

func TestRotationOfATornLog(t *testing.T) {
	r := newRig(t)
	r.cfg.SaveEvery = time.Hour
	l := r.open()
	r.write(l, 2)
	after := r.crash()
	torn := after.content()
	store(t, after.cfg.Path, torn[:len(torn)-30])
	rename(t, after.cfg.Path, after.cfg.Path+".1")
	after.log(1)
	report := after.verify(audit.VerifyOptions{}, after.cfg.Path+".1", after.cfg.Path)
	if !report.OK() || len(report.Recovered) != 1 {
		t.Errorf("fault %v, recovered %v", report.Fault, report.Recovered)
	}
}

func TestALogThatCannotBeReopenedRefuses(t *testing.T) {
	r := newRig(t)
	l := r.open()
	r.write(l, 1)
	rename(t, r.cfg.Path, r.cfg.Path+".1")
	if err := os.Mkdir(r.cfg.Path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := l.Write(t.Context(), sample("a")); !errors.Is(err, audit.ErrSink) {
		t.Errorf("a directory in place of the log: got %v, want ErrSink", err)
	}
	remove(t, r.cfg.Path)
	r.write(l, 1)
	r.close(l)
	r.wantOK(3, r.cfg.Path+".1", r.cfg.Path)
}

func TestTheChainNeverLeadsItsStateTooFar(t *testing.T) {
	r := newRig(t)
	r.cfg.Sink, r.cfg.SaveEvery, r.cfg.SaveRecords = discard{}, time.Hour, 1<<40
	l := r.open()
	const bound = 1 << 16 // what docs/audit.md promises
	r.write(l, bound+10)
	if state := load(t, filepath.Join(r.cfg.StateDir, "audit.state")); strings.Contains(string(state), `"sequence":1,`) {
		t.Errorf("the state was not stored in %d records: %s", bound, state)
	}
	r.close(l)
}
