package renew_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/cmd/kms-agent/renew"
)

var version2 = renew.Wrapping{URI: "local:orders", Version: "2"}

// counts fails when a run has other outcomes than these.
func counts(t *testing.T, s *renew.Summary, want map[renew.Outcome]int64) {
	t.Helper()
	for _, o := range renew.Outcomes() {
		if got := s.Counts[o].Files; got != want[o] {
			t.Errorf("%d files are %s, want %d; failures: %v", got, o, want[o], s.Failures)
		}
	}
}

func TestABackendThatIsGiven(t *testing.T) {
	f := newFake()
	c := serve(t, f)
	dir := t.TempDir()
	lost := renew.Wrapping{URI: "vault:orders", Version: "7"}
	kept := renew.Wrapping{URI: "local:orders", Version: "1"}
	f.under(kept, lost)
	write(t, filepath.Join(dir, "both"), f.seal("orders", nil, []byte("in both")))
	f.under(kept)
	write(t, filepath.Join(dir, "one"), f.seal("orders", nil, []byte("in one")))
	o := options()
	o.Filter.WrappingKey = lost.URI
	o.DryRun = true
	s, err := renew.Run(t.Context(), c, o, []string{dir})
	if err != nil {
		t.Fatal(err)
	}
	counts(t, s, map[renew.Outcome]int64{renew.WouldRenew: 1, renew.NotSelected: 1})
	if len(s.Found) != 2 || len(s.Found[1].Wrapping) != 2 {
		t.Errorf("found %v, want the two sets of wrapping keys", s.Found)
	}
	if s, err = renew.Run(t.Context(), c, options(), []string{dir}); err != nil {
		t.Fatal(err)
	}
	counts(t, s, map[renew.Outcome]int64{renew.Renewed: 1, renew.Current: 1})
	if got := opened(t, filepath.Join(dir, "both")); got != "in both" {
		t.Errorf("plaintext %q", got)
	}
}

func TestAnotherKeyAndContext(t *testing.T) {
	f := newFake()
	c := serve(t, f)
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, f.seal("orders", map[string]string{"tenant": "a"}, []byte("x")))
	o := options()
	o.Settings = renew.Settings{ToKey: "archive", NewContext: map[string]string{"tenant": "b"}, ReplaceContext: true}
	for _, want := range []renew.Outcome{renew.Renewed, renew.Current} {
		s, err := renew.Run(t.Context(), c, o, []string{path})
		if err != nil {
			t.Fatal(err)
		}
		counts(t, s, map[renew.Outcome]int64{want: 1})
	}
	o.ToKey, o.ReplaceContext, o.NewContext = "", true, nil
	var told []string
	o.Renewed = func(path string, from, to renew.Label) { told = append(told, fmt.Sprintf("%s %s", from, to)) }
	s, err := renew.Run(t.Context(), c, o, []string{path})
	if err != nil || s.Counts[renew.Renewed].Files != 1 || told[0] != "archive (local:orders version 1) archive (local:orders version 1)" {
		t.Errorf("%v, %v, told %q", s.Counts, err, told)
	}
}

// TestAnswersThatCannotBeRight: whatever the agent answers, a file is replaced
// only by what it should become.
func TestAnswersThatCannotBeRight(t *testing.T) {
	f := newFake()
	c := serve(t, f)
	for name, garble := range map[string]func([]byte) []byte{
		"nothing":         func([]byte) []byte { return nil },
		"rubbish":         func([]byte) []byte { return []byte("rubbish") },
		"cut":             func(m []byte) []byte { return m[:len(m)-1] },
		"another key":     func([]byte) []byte { return f.seal("other", nil, []byte("plaintext")) },
		"another context": func([]byte) []byte { return f.seal("orders", map[string]string{"a": "b"}, []byte("plaintext")) },
		"another length":  func([]byte) []byte { return f.seal("orders", nil, []byte("longer plaintext")) },
		"another content": func([]byte) []byte { return f.seal("orders", nil, []byte("plainTEXT")) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "file")
			f.under(renew.Wrapping{URI: "local:orders", Version: "1"})
			old := f.seal("orders", nil, []byte("plaintext"))
			write(t, path, old)
			f.under(version2)
			f.set(func(f *fakeAgent) { f.garble = garble })
			defer f.set(func(f *fakeAgent) { f.garble = nil })
			o := options()
			o.Verify = true
			s, err := renew.Run(t.Context(), c, o, []string{path})
			if !errors.Is(err, renew.ErrFailed) || s.Failures[0].Reason != renew.ReasonMismatch {
				t.Errorf("%v, %v, want %s", s.Failures, err, renew.ReasonMismatch)
			}
			if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, old) {
				t.Errorf("the file is not what it was: %v", err)
			}
			alone(t, dir, "file")
		})
	}
	t.Run("its own message ID", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "file")
		old := f.seal("orders", nil, []byte("x"))
		write(t, path, old)
		f.set(func(f *fakeAgent) { f.garble = func([]byte) []byte { return old } })
		defer f.set(func(f *fakeAgent) { f.garble = nil })
		o := options()
		o.All = true
		if s, err := renew.Run(t.Context(), c, o, []string{path}); !errors.Is(err, renew.ErrFailed) || s.Failures[0].Reason != renew.ReasonMismatch {
			t.Errorf("%v, %v, want %s", s, err, renew.ReasonMismatch)
		}
	})
}

// TestMessagesOfAnyLength go through this process where the agent does not take
// them, byte for byte.
func TestMessagesOfAnyLength(t *testing.T) {
	f := newFake()
	f.maxMessage = 100
	c := serve(t, f)
	dir := t.TempDir()
	want := map[string]string{}
	for _, size := range []int{0, 99, 101, 65536, 3 << 20} {
		name := fmt.Sprint(size)
		want[name] = strings.Repeat("x", size)
		write(t, filepath.Join(dir, name), f.seal("orders", map[string]string{"a": "b"}, []byte(want[name])))
	}
	f.under(version2)
	o := options()
	o.NoStream = true
	s, err := renew.Run(t.Context(), c, o, []string{dir})
	if !errors.Is(err, renew.ErrFailed) || s.Counts[renew.Failed].Files != 3 || s.Failures[0].Reason != "TOO_LARGE" {
		t.Errorf("without streams: %v, %v", s.Failures, err)
	}
	o.NoStream, o.Verify = false, true
	if s, err = renew.Run(t.Context(), c, o, []string{dir}); err != nil {
		t.Fatal(err, s.Failures)
	}
	counts(t, s, map[renew.Outcome]int64{renew.Renewed: 3, renew.Current: 2})
	for name, plaintext := range want {
		if got := opened(t, filepath.Join(dir, name)); got != plaintext {
			t.Errorf("%s: %d bytes of plaintext", name, len(got))
		}
	}
}

// TestAFileThatChangesMeanwhile stays as it has become.
func TestAFileThatChangesMeanwhile(t *testing.T) {
	f := newFake()
	c := serve(t, f)
	for name, change := range map[string]func(path string) error{
		"replaced": func(path string) error {
			return errors.Join(os.WriteFile(path+".new", []byte("newer"), 0o600), os.Rename(path+".new", path))
		},
		"written to": func(path string) error { return os.WriteFile(path, []byte("newer"), 0o600) },
		"made a link": func(path string) error {
			return errors.Join(os.WriteFile(path+".new", []byte("newer"), 0o600), os.Remove(path), os.Symlink(path+".new", path))
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "file")
			f.under(renew.Wrapping{URI: "local:orders", Version: "1"})
			write(t, path, f.seal("orders", nil, []byte("plaintext")))
			f.under(version2)
			f.set(func(f *fakeAgent) { f.before = func(string) error { return change(path) } })
			s, err := renew.Run(t.Context(), c, options(), []string{path})
			if !errors.Is(err, renew.ErrFailed) || s.Failures[0].Reason != renew.ReasonChanged {
				t.Errorf("%v, %v, want %s", s.Failures, err, renew.ReasonChanged)
			}
			if now, err := os.ReadFile(path); err != nil || string(now) != "newer" {
				t.Errorf("the file is %q, %v", now, err)
			}
		})
	}
}

// TestPatience: what passes is waited for; what does not, ends the run or fails
// the files that need it, never more.
func TestPatience(t *testing.T) {
	f := newFake()
	c := serve(t, f)
	run := func(wait time.Duration, before func(string) error) (*renew.Summary, error) {
		dir := t.TempDir()
		f.under(renew.Wrapping{URI: "local:orders", Version: "1"})
		for _, name := range []string{"1", "2", "3"} {
			write(t, filepath.Join(dir, name), f.seal("orders", nil, []byte(name)))
		}
		f.under(version2)
		f.set(func(f *fakeAgent) { f.before, f.inside = before, 0 })
		o := options()
		o.Wait, o.Jobs = wait, 1
		return renew.Run(t.Context(), c, o, []string{dir})
	}
	passing := func(reason client.Reason, code codes.Code) func(string) error {
		left := 2
		return func(string) error {
			if left--; left < 0 {
				return nil
			}
			return refusal(code, reason, time.Millisecond)
		}
	}
	for reason, code := range map[client.Reason]codes.Code{
		client.ErrTooManyRequests: codes.ResourceExhausted, client.ErrQuotaExceeded: codes.ResourceExhausted,
		client.ErrShuttingDown: codes.Unavailable, client.ErrBackendUnavailable: codes.Unavailable, client.ErrKeySuspended: codes.Unavailable,
	} {
		if s, err := run(time.Minute, passing(reason, code)); err != nil || s.Counts[renew.Renewed].Files != 3 {
			t.Errorf("%s that passes: %v, %v", reason, s, err)
		}
	}
	always := func(string) error { return refusal(codes.ResourceExhausted, client.ErrQuotaExceeded, time.Hour) }
	s, err := run(time.Minute, always)
	var stopped *renew.StoppedError
	if !errors.As(err, &stopped) || !errors.Is(err, client.ErrQuotaExceeded) || f.inside != 1 || s.Counts[renew.Failed].Files != 0 {
		t.Errorf("a limit for longer than the wait: %v, %v, %d calls, want a stop at the first", s, err, f.inside)
	}
	one := func(plaintext string) error {
		if plaintext == "2" {
			return refusal(codes.Unavailable, client.ErrBackendUnavailable, 0)
		}
		return nil
	}
	s, err = run(0, one)
	if !errors.Is(err, renew.ErrFailed) || s.Counts[renew.Renewed].Files != 2 || s.Failures[0].Reason != "BACKEND_UNAVAILABLE" {
		t.Errorf("a backend that does not come back: %v, %v, want one failure", s, err)
	}
}

// TestInterrupted: the file under way is finished, no other is begun.
func TestInterrupted(t *testing.T) {
	f := newFake()
	c := serve(t, f)
	dir := t.TempDir()
	for _, name := range []string{"1", "2", "3"} {
		write(t, filepath.Join(dir, name), f.seal("orders", nil, []byte(name)))
	}
	f.under(version2)
	ctx, cancel := context.WithCancel(t.Context())
	f.before = func(string) error {
		cancel()
		return nil
	}
	o := options()
	o.Jobs = 1
	s, err := renew.Run(ctx, c, o, []string{dir})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	counts(t, s, map[renew.Outcome]int64{renew.Renewed: 1})
}

// TestInterruptedWhileWaiting: who waits for the agent stops, and has failed
// nothing.
func TestInterruptedWhileWaiting(t *testing.T) {
	f := newFake()
	c := serve(t, f)
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, f.seal("orders", nil, []byte("x")))
	f.under(version2)
	ctx, cancel := context.WithCancel(t.Context())
	f.before = func(string) error {
		cancel()
		return refusal(codes.Unavailable, client.ErrShuttingDown, time.Hour)
	}
	o := options()
	o.Wait = 2 * time.Hour
	s, err := renew.Run(ctx, c, o, []string{path})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	counts(t, s, nil)
}

// TestHostileNeighbour: who may write to the directory swaps files for links all
// the time, and reaches nothing outside of it.
func TestHostileNeighbour(t *testing.T) {
	f := newFake()
	c := serve(t, f)
	outside, dir := filepath.Join(t.TempDir(), "outside"), filepath.Join(t.TempDir(), "tree")
	victim := f.seal("orders", nil, []byte("victim"))
	write(t, filepath.Join(outside, "sub", "victim"), victim)
	write(t, filepath.Join(dir, "sub", "victim"), f.seal("orders", nil, []byte("bait")))
	write(t, filepath.Join(dir, "bait"), f.seal("orders", nil, []byte("bait")))
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			for _, name := range []string{"sub", "bait"} {
				select {
				case <-stop:
					return
				default:
				}
				at, aside := filepath.Join(dir, name), filepath.Join(filepath.Dir(dir), name)
				_ = os.Rename(at, aside)
				_ = os.Symlink(filepath.Join(outside, "sub"), at)
				_ = os.Remove(at)
				_ = os.Rename(aside, at)
			}
		}
	}()
	o := options()
	o.All = true
	for range 50 {
		if s, err := renew.Run(t.Context(), c, o, []string{dir}); err != nil && !errors.Is(err, renew.ErrFailed) {
			t.Fatal(s, err)
		}
	}
	close(stop)
	<-stopped
	if now, err := os.ReadFile(filepath.Join(outside, "sub", "victim")); err != nil || !bytes.Equal(now, victim) {
		t.Errorf("the victim is not what it was: %v", err)
	}
	alone(t, filepath.Join(outside, "sub"), "victim")
}
