package audit_test

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/audit"
)

// withCheckpoints adds checkpoints, which are returned once the log is closed.
func (r *rig) withCheckpoints(every time.Duration) func() []audit.Checkpoint {
	r.cfg.Checkpoints, r.cfg.CheckpointEvery = audit.SinkConfig{File: r.path("checkpoints")}, every
	return func() []audit.Checkpoint {
		r.t.Helper()
		content, err := os.ReadFile(r.path("checkpoints"))
		if err != nil {
			r.t.Fatal(err)
		}
		found, err := audit.ParseCheckpoints(bytes.NewReader(content))
		if err != nil {
			r.t.Fatal(err)
		}
		return found
	}
}

func TestCheckpointsProveTheTail(t *testing.T) {
	r := newRig(t)
	read := r.withCheckpoints(time.Hour)
	r.log(5)
	r.log(5)
	points := read()
	if n := len(points); n < 2 || points[n-1].Sequence != 11 {
		t.Fatalf("checkpoints %+v; want one at least for each time the log was closed, the last of record 11", points)
	}
	report := r.verify(audit.VerifyOptions{Checkpoints: points})
	if !report.OK() || report.TailUnproven || report.Proven != 11 || report.Checkpoints != len(points) {
		t.Errorf("whole log: %+v; want proven up to 11", report)
	}
	whole := r.content()
	lines := bytes.SplitAfter(whole, []byte("\n"))
	writeFile(t, r.cfg.Path, string(bytes.Join(lines[:9], nil)))
	report = r.verify(audit.VerifyOptions{Checkpoints: points})
	if report.OK() || report.Fault.Reason != audit.ReasonRemoved || !strings.Contains(report.Fault.Detail, "reached 11") {
		t.Errorf("two records cut off: %v, want %s", report.Fault, audit.ReasonRemoved)
	}
	writeFile(t, r.cfg.Path, string(whole))
	report = r.verify(audit.VerifyOptions{Checkpoints: points[:1]})
	if !report.OK() || !report.TailUnproven || report.Proven == 0 || report.Proven >= 11 {
		t.Errorf("without the last checkpoint: %+v; want the tail unproven from %d on", report, points[0].Sequence)
	}
}

// Anybody can write to a syslog daemon: what nobody with the key wrote is worth
// nothing, neither for the log nor against it.
func TestForgedCheckpoints(t *testing.T) {
	r := newRig(t)
	read := r.withCheckpoints(time.Hour)
	r.log(3)
	genuine := read()
	other := newRig(t)
	readOther := other.withCheckpoints(time.Hour)
	other.log(9)
	text := func(p audit.Checkpoint, sequence uint64, mac string) string {
		return fmt.Sprintf(`<86>noise {"checkpoint":"%s","sequence":%d,"time":"2026-03-04T05:06:07Z","mac":"%s","proof":"%s"}`+"\n",
			p.Chain, sequence, mac, strings.Repeat("0", 64))
	}
	forged, err := audit.ParseCheckpoints(strings.NewReader(
		text(genuine[0], 4, strings.Repeat("1", 64)) + text(genuine[0], 100, strings.Repeat("2", 64)) +
			text(genuine[0], 1<<63, strings.Repeat("2", 64)) + "a line of something else\n"))
	if err != nil || len(forged) != 3 {
		t.Fatalf("parsed %d, %v; want 3", len(forged), err)
	}
	report := r.verify(audit.VerifyOptions{Checkpoints: append(forged, readOther()...)})
	if !report.OK() || report.Proven != 0 || report.Checkpoints != 0 || report.CheckpointsIgnored != 3+len(readOther()) {
		t.Errorf("forged and foreign checkpoints: %+v; want all ignored", report)
	}
}

// Two logs that were written from one state: each verifies, and a checkpoint of
// the one shows the other.
func TestCheckpointOfAnotherFuture(t *testing.T) {
	r := newRig(t)
	read := r.withCheckpoints(time.Hour)
	r.log(2)
	copied := copyDir(t, r.path(""))
	r.log(3)
	points := read()
	twin := &rig{t: t, cfg: r.cfg}
	twin.cfg.Path, twin.cfg.StateDir, twin.cfg.Checkpoints = copied+"/audit.log", copied+"/state", audit.SinkConfig{}
	l := twin.open()
	twin.write(l, 2)
	twin.write(l, 2)
	twin.close(l)
	report := twin.verify(audit.VerifyOptions{Checkpoints: points})
	if report.OK() || report.Fault.Reason != audit.ReasonForked {
		t.Errorf("the other log: %v, want %s", report.Fault, audit.ReasonForked)
	}
}

func TestCheckpointsInTheirTime(t *testing.T) {
	r := newRig(t)
	m := &memory{}
	r.cfg.Checkpoints, r.cfg.CheckpointEvery, r.cfg.SaveEvery = audit.SinkConfig{Sink: m}, 100*time.Millisecond, 10*time.Millisecond
	l := r.open()
	r.write(l, 3)
	for deadline := time.Now().Add(10 * time.Second); !strings.Contains(string(m.bytes()), `"sequence":4,`); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no checkpoint of the last record while the log is idle:\n%s", m.bytes())
		}
	}
	if s := l.Status().Checkpoints; s == nil || s.Written == 0 || s.LastError != "" {
		t.Errorf("status %+v; want some written, no error", s)
	}
	r.close(l)
}

func FuzzParseCheckpoints(f *testing.F) {
	r := newRig(f)
	read := r.withCheckpoints(time.Hour)
	r.log(1)
	content, err := os.ReadFile(r.path("checkpoints"))
	if err != nil {
		f.Fatal(err)
	}
	if len(read()) == 0 {
		f.Fatal("no checkpoint")
	}
	f.Add(string(content))
	f.Add("Mar  4 05:06:07 host kms-agent[1]: " + string(content))
	f.Add(`{"checkpoint":"","sequence":,"time":"","mac":"","proof":""}`)
	key, log := r.initialKey(), r.content()
	f.Fuzz(func(t *testing.T, text string) {
		points, err := audit.ParseCheckpoints(strings.NewReader(text))
		if err != nil {
			return
		}
		report, err := audit.Verify(key, audit.VerifyOptions{Checkpoints: points}, audit.Input{Name: "log", Reader: bytes.NewReader(log)})
		if err != nil || !report.OK() || report.Proven > report.Last {
			t.Errorf("checkpoints made of noise change the verdict: %v, %+v", err, report)
		}
	})
}
