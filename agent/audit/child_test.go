package audit_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kms-agent/kms-agent/agent/audit"
)

// child is what the test binary does when a test starts it again.
func child(role string) int {
	dir := os.Getenv("AUDIT_TEST_DIR")
	cfg := audit.Config{Path: filepath.Join(dir, "audit.log"), StateDir: filepath.Join(dir, "state")}
	run := map[string]func(audit.Config) error{"write": writeForEver, "full": fillDisk, "stdout": loseReader}[role]
	if err := run(cfg); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func childCommand(t *testing.T, role, dir string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), "AUDIT_TEST_CHILD="+role, "AUDIT_TEST_DIR="+dir)
	cmd.Stderr = os.Stderr
	return cmd
}

// writeForEver prints the sequence number of every record that was written.
func writeForEver(cfg audit.Config) error {
	cfg.Rotation = audit.Rotation{MaxSize: 64 << 10}
	l, err := audit.Open(cfg)
	if err != nil {
		return err
	}
	for i := range 1000000 {
		r := sample(strconv.Itoa(i))
		if err := l.Write(context.Background(), r); err != nil {
			return err
		}
		fmt.Println(r.Sequence)
	}
	return l.Close()
}

func TestKilledAgentLosesNothingItPromised(t *testing.T) {
	r := newRig(t)
	last := uint64(0)
	for round := range 6 {
		cmd := childCommand(t, "write", filepath.Dir(r.cfg.Path))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for range 50 + 700*round {
			if !lines.Scan() {
				t.Fatalf("round %d: the writer ended: %v", round, lines.Err())
			}
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for text := lines.Text(); ; text = lines.Text() {
			if n, err := strconv.ParseUint(text, 10, 64); err == nil && n > last {
				last = n
			}
			if !lines.Scan() {
				break
			}
		}
		_ = cmd.Wait() // killed
		report, err := audit.VerifyFiles(r.initialKey(), audit.VerifyOptions{AtLeast: last}, filepath.Dir(r.cfg.Path))
		if err != nil {
			t.Fatal(err)
		}
		if report.Fault != nil && report.Fault.Reason != audit.ReasonTorn {
			t.Fatalf("round %d: after a kill, before the next start: %v", round, report.Fault)
		}
	}
	r.log(1)
	if report := r.verifyFiles(filepath.Dir(r.cfg.Path)); !report.OK() || report.Last <= last || len(report.Files) < 10 {
		t.Fatalf("after the kills: %v, last record %d of %d, %d files", report.Fault, report.Last, last, len(report.Files))
	}
}

// fillDisk runs into a limit of the file size, as into a full disk, and out of it.
func fillDisk(cfg audit.Config) error {
	l, err := audit.Open(cfg)
	if err != nil {
		return err
	}
	if err := l.Write(context.Background(), sample("before")); err != nil {
		return err
	}
	info, err := os.Stat(cfg.Path)
	if err != nil {
		return err
	}
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		return err
	}
	// Room for one record and a part of another.
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: uint64(info.Size()) + 1000, Max: old.Max}); err != nil {
		return err
	}
	refused := 0
	for i := range 20 {
		err := l.Write(context.Background(), sample("full-"+strconv.Itoa(i)))
		if err == nil {
			continue
		}
		if !errors.Is(err, audit.ErrSink) || !errors.Is(err, syscall.EFBIG) {
			return fmt.Errorf("full disk: got error %w, want ErrSink with EFBIG", err)
		}
		refused++
	}
	if s := l.Status(); refused != 19 || s.Refused != 19 || !s.Failing || !strings.Contains(s.LastError, "file too large") {
		return fmt.Errorf("full disk: %d refused, status %+v; want 19 refused and failing", refused, s)
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		return err
	}
	if err := l.Write(context.Background(), sample("after")); err != nil {
		return fmt.Errorf("with space again: %w", err)
	}
	if s := l.Status(); s.Failing || s.Sequence != 5 {
		return fmt.Errorf("with space again: status %+v; want sequence 5, not failing", s)
	}
	return l.Close()
}

func TestFullDiskRefusesAndRecovers(t *testing.T) {
	r := newRig(t)
	if err := childCommand(t, "full", filepath.Dir(r.cfg.Path)).Run(); err != nil {
		t.Fatal(err)
	}
	// Started, before, one that still fitted, recovered, after.
	report := r.wantOK(5)
	if len(report.Recovered) != 1 {
		t.Errorf("recovered places: got %v, want one", report.Recovered)
	}
}

// loseReader writes to a standard output whose reader is gone.
func loseReader(cfg audit.Config) error {
	cfg.Path = audit.Stdout
	l, err := audit.Open(cfg)
	if err != nil {
		return err
	}
	if err := l.Write(context.Background(), sample("read")); err != nil {
		return err
	}
	if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
		return err
	}
	if err := l.Write(context.Background(), sample("nobody reads")); !errors.Is(err, audit.ErrSink) || !errors.Is(err, syscall.EPIPE) {
		return fmt.Errorf("without a reader: got %w, want ErrSink with EPIPE", err)
	}
	return l.Close()
}

// A process that writes to standard output without a reader is killed; this one
// must live and refuse.
func TestLostReaderOfStandardOutput(t *testing.T) {
	cmd := childCommand(t, "stdout", filepath.Dir(newRig(t).cfg.Path))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() && !strings.Contains(lines.Text(), `"request_id":"read"`) {
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the process: %v, want an ordinary end", err)
	}
}

func TestFullDevice(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = full.Close() })
	r := newRig(t)
	r.cfg.Sink = audit.NewStream(full)
	l := r.open()
	err = l.Write(context.Background(), sample("a"))
	if !errors.Is(err, audit.ErrSink) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("Write to a full device: got %v, want ErrSink with ENOSPC", err)
	}
	if s := l.Status(); !s.Failing || s.Refused != 1 || s.Sequence != 0 {
		t.Errorf("status %+v; want failing, one refused, sequence 0", s)
	}
}
