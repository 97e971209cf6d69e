package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/kms-agent/kms-agent/api/admin/v1"
	"github.com/kms-agent/kms-agent/cmd/kms-agent/renew"
)

// terminal opens a pseudo-terminal: what a command writes to the second file
// comes out of the first.
func terminal(t *testing.T) (outer, inner *os.File) {
	t.Helper()
	outer, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = outer.Close() })
	if err := unix.IoctlSetPointerInt(int(outer.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(outer.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	inner, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = inner.Close() })
	return outer, inner
}

func TestCiphertextStaysOffTheTerminal(t *testing.T) {
	serveFake(t, &fakeAgent{})
	_, inner := terminal(t)
	stderr := create(t, filepath.Join(t.TempDir(), "err"))
	for _, args := range [][]string{
		{"encrypt", "--key", "orders"}, {"reencrypt"}, {"unwrap"}, {"random", "8", "--encoding", "raw"},
	} {
		if code := run(args, os.Stdin, inner, stderr); code != int(exitUsage) {
			t.Errorf("%v: exit code %d, want %d", args, code, exitUsage)
		}
	}
	if got := read(t, stderr.Name()); strings.Count(got, "standard output a terminal") != 4 {
		t.Errorf("standard error = %s", got)
	}
}

func TestColoursOnlyOnTerminals(t *testing.T) {
	_, inner := terminal(t)
	file := create(t, filepath.Join(t.TempDir(), "file"))
	environment := map[string]string{"TERM": "xterm"}
	a := newApp(os.Stdin, inner, file, func(name string) string { return environment[name] })
	if !a.colours(inner) || a.colours(file) {
		t.Errorf("colours: terminal %v, file %v, want true, false", a.colours(inner), a.colours(file))
	}
	environment["NO_COLOR"] = "1"
	if a.colours(inner) {
		t.Error("colours although NO_COLOR is set")
	}
}

func TestBreakerLine(t *testing.T) {
	if got := breakerLine(&adminv1.BackendStatus{Breaker: "closed", Calls: 5}); got != "" {
		t.Errorf("a breaker that never opened: %q, want nothing", got)
	}
	b := &adminv1.BackendStatus{Breaker: "open", BreakerOpened: 2, Refused: 40, FailureRate: 0.75, NextTry: timestamppb.New(time.Unix(0, 0))}
	want := "breaker open, opened 2 times, 40 calls refused, 75% of the last calls failed or were slow, next try " + when(time.Unix(0, 0))
	if got := breakerLine(b); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestTable(t *testing.T) {
	table := &table{}
	table.header("KEY", "STATE")
	table.row("schlüssel", "up")
	table.row("evil\x1b[2J", "down")
	want := "KEY            STATE\nschlüssel      up\n\"evil\\x1b[2J\"  down\n"
	if got := table.render(false); got != want {
		t.Errorf("table:\n%q, want\n%q", got, want)
	}
	coloured := table.render(true)
	for _, code := range []string{"\x1b[32mup\x1b[0m", "\x1b[31mdown\x1b[0m", "\x1b[1mKEY"} {
		if !strings.Contains(coloured, code) {
			t.Errorf("coloured table lacks %q: %q", code, coloured)
		}
	}
}

func TestStateBeforeOtherWords(t *testing.T) {
	status := &table{}
	status.row("up", "up (process 7)", "up and down")
	if got, want := status.render(true), "\x1b[32mup\x1b[0m  \x1b[32mup\x1b[0m (process 7)  up and down\n"; got != want {
		t.Errorf("status:\n%q, want\n%q", got, want)
	}
}

func TestProgress(t *testing.T) {
	for _, c := range []struct {
		done, total int64
		want        string
	}{
		{5 << 20, -1, "5.0 MiB, 2.5 MiB/s"},
		{5 << 20, 10 << 20, " 50%  5.0 MiB of 10.0 MiB, 2.5 MiB/s, 2s left"},
		{10, 10, "100%  10 B of 10 B, 5 B/s"},
	} {
		if got := progressLine(c.done, c.total, 2*time.Second); got != c.want {
			t.Errorf("progress = %q, want %q", got, c.want)
		}
	}
	var shown bytes.Buffer
	p := startProgress(strings.NewReader("short"), 5, &shown, true)
	if _, err := io.Copy(io.Discard, p); err != nil {
		t.Fatal(err)
	}
	p.stop()
	p.stop()
	if shown.String() != "" || p.done.Load() != 5 {
		t.Errorf("a short transfer showed %q and counted %d", shown.String(), p.done.Load())
	}
}

func TestProgressOfALongTransfer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		show := func(lasts time.Duration) string {
			var shown bytes.Buffer
			p := startProgress(strings.NewReader(strings.Repeat("x", 2048)), 4096, &shown, true)
			if _, err := io.Copy(io.Discard, p); err != nil {
				t.Fatal(err)
			}
			time.Sleep(lasts)
			p.stop()
			return shown.String()
		}
		if got := show(999 * time.Millisecond); got != "" {
			t.Errorf("%q is shown before a second is over", got)
		}
		if got := show(2 * time.Second); !strings.Contains(got, " 50%  2.0 KiB of 4.0 KiB") || !strings.HasSuffix(got, "\r\x1b[K") {
			t.Errorf("shown: %q, want a line that is removed at the end", got)
		}
	})
}

func TestProgressOfTrees(t *testing.T) {
	for _, c := range []struct {
		sight renew.Sight
		want  string
	}{
		{renew.Sight{Files: 10, Bytes: 1 << 20, TotalFiles: -1, TotalBytes: -1}, "10 files, 1.0 MiB, 5 files/s, 512.0 KiB/s"},
		{
			renew.Sight{Files: 50, TotalFiles: 100, Failed: 3, Waiting: "SHUTTING_DOWN"},
			" 50%  50 of 100 files, 0 B, 25 files/s, 0 B/s, 2s left, 3 failed, waiting: SHUTTING_DOWN",
		},
		{renew.Sight{Files: 100, TotalFiles: 100}, "100%  100 of 100 files, 0 B, 50 files/s, 0 B/s"},
	} {
		if got := treesLine(c.sight, 2*time.Second); got != c.want {
			t.Errorf("progress = %q, want %q", got, c.want)
		}
	}
}

// TestProgressLineOfTrees: the line appears after a second, tells an interruption
// and is gone at the end.
func TestProgressLineOfTrees(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var shown locked
		interrupted, end, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
		go func() {
			defer close(ended)
			showLine(interrupted, end, &shown, &renew.Progress{})
		}()
		time.Sleep(progressDelay - time.Millisecond)
		synctest.Wait()
		if shown.String() != "" {
			t.Errorf("%q is shown before a second is over", shown.String())
		}
		time.Sleep(progressInterval)
		close(interrupted)
		synctest.Wait()
		close(end)
		<-ended
		got := shown.String()
		if !strings.Contains(got, "0 files") || !strings.Contains(got, "finishing the files under way") || !strings.HasSuffix(got, "\r\x1b[K") {
			t.Errorf("shown: %q", got)
		}
	})
}

func TestParseWrapped(t *testing.T) {
	const edk = `{"provider_id":"kms-agent","provider_info":"AQ==","ciphertext":"AgM="}`
	for _, document := range []string{edk, `{"encrypted_data_key":` + edk + `,"plaintext":"","key_use":null}`, `{"wrapped":` + edk + `}`} {
		got, err := parseWrapped([]byte(document))
		if err != nil || got.GetProviderId() != "kms-agent" || !bytes.Equal(got.GetCiphertext(), []byte{2, 3}) {
			t.Errorf("%s = %v, %v", document, got, err)
		}
	}
	for _, document := range []string{"", "{}", "[]", `{"wrapped":{}}`, "text", `{"wrapped":5}`} {
		if got, err := parseWrapped([]byte(document)); err == nil {
			t.Errorf("%q = %v, want an error", document, got)
		}
	}
}

func TestVersionIsJSON(t *testing.T) {
	r := command(t, "", "version", "--output", "json")
	var v versionInfo
	if err := json.Unmarshal([]byte(r.out), &v); err != nil || v.Go == "" || v.FIPS140 == "" {
		t.Errorf("version = %s, %v", r.out, err)
	}
}

// Status tells since when a backend is in its state, which is not since when its process
// runs; and of a backend that is not well, what it says itself and not what the last of
// the calls met.
func TestStatusOfBackends(t *testing.T) {
	const met = "backend hsm: it answers Check, but not calls, the last: Unauthenticated: PIN"
	for _, c := range []struct{ state, reason, want string }{
		{"degraded", "the token refuses the PIN", "the backend is degraded: its last error, above, says why"},
		{"up", "", "last error: " + met},
		{"down", "", "last error: " + met},
	} {
		shown := &table{}
		statusTable(shown, &adminv1.StatusResponse{
			Backends: []*adminv1.BackendStatus{{
				Name: "hsm", State: c.state, Plugin: "pkcs11", PluginVersion: "1", Pid: 7, LastError: c.reason, Since: timestamppb.New(time.Unix(1764391776, 0)),
			}},
			Outages: []*adminv1.Outage{{Backend: "hsm", LastError: met}},
		})
		got := shown.render(false)
		if line := "\nbackend hsm    " + c.state + " (pkcs11 1, process 7) since 2025-11-29 04:49:36Z, 0 calls"; !strings.Contains(got, line) {
			t.Errorf("%s has no %q", got, line)
		}
		if line := "0 not served\n               " + c.want + "\n"; !strings.Contains(got, line) {
			t.Errorf("%s has no %q", got, line)
		}
	}
}

// locked is a buffer that one goroutine reads while another writes.
type locked struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *locked) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
