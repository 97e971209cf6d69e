package audit_test

import (
	"compress/gzip"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/audit"
)

// rotated lists what the rig's log was rotated to, oldest first.
func (r *rig) rotated() []string {
	r.t.Helper()
	names, err := filepath.Glob(r.cfg.Path + ".2*Z")
	if err != nil {
		r.t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

func (r *rig) verifyFiles(names ...string) audit.Report {
	r.t.Helper()
	report, err := audit.VerifyFiles(r.initialKey(), audit.VerifyOptions{}, names...)
	if err != nil {
		r.t.Fatalf("VerifyFiles: %v", err)
	}
	return report
}

func (r *rig) wantWhole(records uint64) audit.Report {
	r.t.Helper()
	report := r.verifyFiles(filepath.Dir(r.cfg.Path))
	if !report.OK() || report.Last != records {
		r.t.Fatalf("verify: got last record %d, fault %v, gaps %v; want %d, none", report.Last, report.Fault, report.Gaps, records)
	}
	return report
}

func TestRotationBySize(t *testing.T) {
	r := newRig(t)
	r.cfg.Rotation = audit.Rotation{MaxSize: 3000}
	l := r.open()
	r.write(l, 30)
	r.close(l)
	if n := len(r.rotated()); n < 5 {
		t.Errorf("%d rotated files, want 5 or more", n)
	}
	for _, name := range r.rotated() {
		if info, err := os.Stat(name); err != nil || info.Size() < 3000 || info.Size() > 4000 || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v; want 3000 to 4000 bytes, mode 0600", name, info, err)
		}
	}
	report := r.wantWhole(31)
	if len(report.Expired) != 0 || !slices.Contains(report.Ignored, r.cfg.StateDir) {
		t.Errorf("expired %v, ignored %v; want none, and the state directory", report.Expired, report.Ignored)
	}
	r.log(1) // it goes on where it ended
	r.wantWhole(32)
}

func TestRotationByAge(t *testing.T) {
	r := newRig(t)
	now := clock()
	r.cfg.Now = func() time.Time { return now }
	r.cfg.Rotation = audit.Rotation{MaxAge: time.Hour}
	r.log(1)
	now = now.Add(59 * time.Minute)
	r.log(1)
	if n := len(r.rotated()); n != 0 {
		t.Errorf("after 59 minutes: %d rotated files, want none", n)
	}
	now = now.Add(time.Minute)
	r.log(1)
	if names := r.rotated(); len(names) != 1 || !strings.HasSuffix(names[0], "audit.log.20260304T060607.890000000Z") {
		t.Errorf("after an hour: rotated %v, want one of the time of its rotation", names)
	}
	r.wantWhole(4)
}

// A log that is verified says itself which records have expired; every other
// hole is a fault.
func TestRetention(t *testing.T) {
	r := newRig(t)
	now := time.Now()
	r.cfg.Now = func() time.Time { return now }
	r.cfg.Rotation = audit.Rotation{MaxSize: 3000, Retention: 24 * time.Hour}
	dir := filepath.Dir(r.cfg.Path)
	r.log(10)
	old := r.rotated()
	foreign := []string{"audit.log.1", "audit.log.20200101T000000.000000000Z.bak", "audit.log.20200101T000000.000000000Z", "other.20200101T000000.000000000Z"}
	for _, name := range foreign {
		writeFile(t, filepath.Join(dir, name), "no record\n")
	}
	now = now.Add(23 * time.Hour)
	r.log(10)
	kept := len(r.rotated())
	now = now.Add(2 * time.Hour)
	for _, name := range append(old, foreign...) {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		if err := os.Chtimes(name, clock(), clock()); err != nil {
			t.Fatal(err)
		}
	}
	r.log(1)
	for _, name := range old {
		if _, err := os.Stat(name); err == nil {
			t.Errorf("%s is still there after its retention", name)
		}
	}
	for _, name := range foreign {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Errorf("a file that was not rotated is gone: %v", err)
		}
	}
	if n := len(r.rotated()); n < kept-len(old) {
		t.Errorf("%d rotated files are left, want %d", n, kept-len(old))
	}
	report := r.verifyFiles(dir)
	if !report.OK() || len(report.Expired) != 1 || report.Expired[0].From != 1 || report.Expired[0].To != report.First-1 {
		t.Fatalf("fault %v, expired %v, first %d; want the records before the first expired", report.Fault, report.Expired, report.First)
	}
	if err := os.Remove(r.rotated()[1]); err != nil {
		t.Fatal(err)
	}
	if report := r.verifyFiles(dir); report.OK() || report.Fault.Reason != audit.ReasonRemoved {
		t.Errorf("one more file removed: fault %v, want %s", report.Fault, audit.ReasonRemoved)
	}
}

// Whoever takes records away cannot say that they have expired.
func TestForgedExpiry(t *testing.T) {
	r := newRig(t)
	r.cfg.Rotation = audit.Rotation{MaxSize: 3000}
	r.log(12)
	first := r.rotated()[0]
	if err := os.Remove(first); err != nil {
		t.Fatal(err)
	}
	zeros := strings.Repeat("0", 64)
	for name, line := range map[string]string{
		"at the end": `{"sequence":14,"time":"2026-03-04T05:06:07Z","kind":"event","operation":"audit-expired","log":{"expired_from":1,"expired_to":9},"previous":"` + zeros + `","mac":"` + zeros + `"}` + "\n",
	} {
		content := r.content()
		writeFile(t, r.cfg.Path, string(content)+line)
		if report := r.verifyFiles(filepath.Dir(r.cfg.Path)); report.OK() {
			t.Errorf("%s: verified with %v expired", name, report.Expired)
		}
		writeFile(t, r.cfg.Path, string(content))
	}
}

func writeFile(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// The states that a kill between any two steps of a rotation leaves behind.
func TestRotationKilledBetweenSteps(t *testing.T) {
	for name, spoil := range map[string]func(r *rig) error{
		"the next file is made": func(r *rig) error { return os.WriteFile(r.cfg.Path+".new", nil, 0o600) },
		"the log is set aside": func(r *rig) error {
			return errorsOf(os.WriteFile(r.cfg.Path+".new", nil, 0o600), os.Rename(r.cfg.Path, r.cfg.Path+".20260304T050607.890000000Z"))
		},
		"the next file is in place": func(r *rig) error {
			return errorsOf(os.Rename(r.cfg.Path, r.cfg.Path+".20260304T050607.890000000Z"), os.WriteFile(r.cfg.Path, nil, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.cfg.Rotation = audit.Rotation{MaxSize: 4000}
			l := r.open()
			r.write(l, 3)
			copied := copyDir(t, filepath.Dir(r.cfg.Path)) // as if killed here
			r.close(l)
			killed := &rig{t: t, cfg: r.cfg}
			killed.cfg.Path, killed.cfg.StateDir = filepath.Join(copied, "audit.log"), filepath.Join(copied, "state")
			if err := spoil(killed); err != nil {
				t.Fatal(err)
			}
			l = killed.open()
			killed.write(l, 12)
			last := l.Status().Sequence
			killed.close(l)
			killed.wantWhole(last)
			if len(killed.rotated()) == 0 {
				t.Error("nothing was rotated afterwards")
			}
		})
	}
}

func errorsOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func copyDir(t *testing.T, dir string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return to
}

// Killed in the middle of the deletion of what has expired: the record of it is
// there, the file too; it is deleted later.
func TestRetentionKilledBeforeDeletion(t *testing.T) {
	r := newRig(t)
	now := time.Now()
	r.cfg.Now = func() time.Time { return now }
	r.cfg.Rotation = audit.Rotation{MaxSize: 2000, Retention: time.Hour}
	r.log(4)
	name := r.rotated()[0]
	content, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	now = now.Add(2 * time.Hour)
	if err := os.Chtimes(name, clock(), clock()); err != nil {
		t.Fatal(err)
	}
	r.log(1)
	writeFile(t, name, string(content)) // as if it had not been deleted
	if err := os.Chtimes(name, clock(), clock()); err != nil {
		t.Fatal(err)
	}
	if report := r.verifyFiles(filepath.Dir(r.cfg.Path)); !report.OK() {
		t.Errorf("expired, and still there: %v", report.Fault)
	}
	now = now.Add(2 * time.Minute)
	r.log(1)
	if _, err := os.Stat(name); err == nil {
		t.Error("an expired file stays for ever")
	}
	if report := r.verifyFiles(filepath.Dir(r.cfg.Path)); !report.OK() {
		t.Errorf("afterwards: %v", report.Fault)
	}
}

// A rotation that is not possible stops no record, and is told.
func TestRotationThatFails(t *testing.T) {
	r := newRig(t)
	r.cfg.Rotation = audit.Rotation{MaxSize: 2000}
	blocked := r.cfg.Path + ".new"
	if err := os.MkdirAll(filepath.Join(blocked, "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	l := r.open()
	r.write(l, 12)
	if s := l.Status(); s.Failing || !strings.Contains(s.RotationError, "rotate audit log") {
		t.Errorf("status %+v; want not failing, with the error of the rotation", s)
	}
	r.close(l)
	if err := os.RemoveAll(blocked); err != nil {
		t.Fatal(err)
	}
	l = r.open()
	r.write(l, 1)
	if s := l.Status(); s.RotationError != "" || len(r.rotated()) != 1 {
		t.Errorf("afterwards: %q, %d rotated; want none, one", s.RotationError, len(r.rotated()))
	}
	r.close(l)
	r.wantWhole(14)
}

func TestVerifyFilesInAnyOrderAndCompressed(t *testing.T) {
	r := newRig(t)
	r.cfg.Rotation = audit.Rotation{MaxSize: 2000}
	r.log(12)
	names, err := audit.LogFiles(r.cfg.Path)
	if err != nil || len(names) < 4 {
		t.Fatalf("LogFiles: %v, %v", names, err)
	}
	content, err := os.ReadFile(names[1])
	if err != nil {
		t.Fatal(err)
	}
	var compressed strings.Builder
	z := gzip.NewWriter(&compressed)
	if _, err := z.Write(content); errorsOf(err, z.Close(), os.Remove(names[1])) != nil {
		t.Fatal(err)
	}
	names[1] += ".gz"
	writeFile(t, names[1], compressed.String())
	slices.Reverse(names)
	if report := r.verifyFiles(names...); !report.OK() || report.Records != 13 {
		t.Errorf("reversed: %d records, %v; want 13 good ones", report.Records, report.Fault)
	}
	for i := range names[:len(names)-1] {
		without := slices.Delete(slices.Clone(names), i, i+1)
		if report := r.verifyFiles(without...); i > 0 && (report.OK() || report.Fault.Reason != audit.ReasonRemoved) {
			t.Errorf("without %s: %v, want %s", names[i], report.Fault, audit.ReasonRemoved)
		}
	}
}

// The log goes on by itself, also when nobody asks for a record: status and
// readiness must not wait for the request that they keep away.
func TestLogResumesWithoutRequests(t *testing.T) {
	r := newRig(t)
	m := &memory{}
	r.cfg.Sink = m
	l := r.open()
	m.set(func(int) (int, error) { return 0, errDisk })
	if err := l.Write(context.Background(), sample("refused")); err == nil {
		t.Fatal("Write: no error")
	}
	m.set(nil)
	for deadline := time.Now().Add(20 * time.Second); l.Status().Failing; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("still failing 20 s after the sink works")
		}
	}
	r.close(l)
	if text := string(m.bytes()); !strings.Contains(text, `"audit-resumed"`) || !strings.Contains(text, fmt.Sprint(errDisk)) {
		t.Errorf("no record of the time without records:\n%s", text)
	}
}
