package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/plugintest"
)

var message = plugins.Binding{Purpose: "message"}

// counted returns what a file of counts has of the only version that is in it.
func counted(t *testing.T, dir string) (n uint64) {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(dir, "wraps.json"))
	var counts struct{ Wraps map[string]uint64 }
	if err = errors.Join(err, json.Unmarshal(content, &counts)); err != nil || len(counts.Wraps) != 1 {
		t.Fatalf("%v: %s", err, content)
	}
	for _, n = range counts.Wraps {
	}
	return n
}

// A module that hangs ends the process, and not what a version may wrap.
func TestHungProcessGivesBackItsWraps(t *testing.T) {
	cfg, fault := faulty(t, hsmtest.PIN)
	s, state := plugintest.Start(t, cfg), cfg.Access.Write[1]
	var wrapped []byte
	eventually(t, func() (err error) {
		wrapped, err = s.Wrap(bounded(t), orders, make([]byte, 32), message)
		return err
	})
	if n := counted(t, state); n < 1000 {
		t.Fatalf("%d wraps are counted while the process runs: it reserves none", n)
	}
	pid := s.Status().PID
	fault.Set("C_Decrypt hang")
	if _, err := s.Unwrap(bounded(t), orders, wrapped, message); plugins.ClassOf(err) != plugins.Unavailable {
		t.Errorf("Unwrap: %v, want Unavailable", err)
	}
	eventually(t, func() error {
		if now := s.Status().PID; now == pid || now == 0 {
			return errors.New("the process goes on")
		}
		return nil
	})
	if n := counted(t, state); n > 100 {
		t.Errorf("%d wraps are counted, want those that were made", n)
	}
}

// The end of the process does not wait for whoever else has the counts.
func TestGivingBackIsBounded(t *testing.T) {
	dir := t.TempDir()
	c, err := hsm.OpenCounter(dir, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Take(&hsm.Version{Suite: hsm.GCM}); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "wraps.json.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := giveBack(c); err == nil || !strings.Contains(err.Error(), "given back") {
		t.Errorf("with the counts locked: %v", err)
	}
	if took := time.Since(began); took > 2*givePatience {
		t.Errorf("it took %v", took)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { // the attempt that nobody waits for
		if n := counted(t, dir); n != 1 {
			return fmt.Errorf("%d wraps are counted", n)
		}
		return nil
	})
}

// lines is a log that several goroutines write.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer // mu guards it
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// with returns the lines that hold a text.
func (l *lines) with(text string) (found []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.buf.String()) {
		if strings.Contains(line, text) {
			found = append(found, line)
		}
	}
	return found
}

// opened is the backend in this process, and its log.
func (r *rig) opened(t *testing.T) (*backend, *lines) {
	t.Helper()
	b, log := newBackend(), &lines{}
	b.log = log
	t.Cleanup(func() { _ = b.Close() })
	if _, err := b.Open(bounded(t), r.json()); err != nil {
		t.Fatal(err)
	}
	return b, log
}

// A version that has made all its wraps says so in the log, once, with the cure: callers
// are told only that it cannot be used.
func TestWornVersionIsTold(t *testing.T) {
	r := newRig(t)
	id := r.must(request{Command: "init-key", Key: "orders"}).Keys[0].Versions[0].ID
	r.settings["fleet_size"] = maxFleet
	const limit, left = (1 << 32) / maxFleet, 20
	r.Write("state/wraps.json", fmt.Sprintf(`{"format":1,"wraps":{%q:%d}}`, id, limit-left))
	b, log := r.opened(t)
	wrapped, err := b.Wrap(bounded(t), orders, make([]byte, 32), message)
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; err == nil && n < left; n++ {
		_, err = b.Wrap(bounded(t), orders, make([]byte, 32), message)
	}
	for range 2 {
		if plugins.ClassOf(err) != plugins.KeyUnusable {
			t.Fatalf("one wrap too many: %v", err)
		}
		_, err = b.Wrap(bounded(t), orders, make([]byte, 32), message)
	}
	told := log.with("has made all the wraps")
	if len(told) != 1 || !strings.Contains(told[0], `"cure":"kms-agent hsm rotate orders"`) || !strings.Contains(told[0], `"@level":"error"`) {
		t.Errorf("the log says %q, want one line with the cure", told)
	}
	if _, err := b.Unwrap(bounded(t), orders, wrapped, message); err != nil {
		t.Errorf("what it wrapped: %v", err)
	}
	w := r.must(request{Command: "list"}).Keys[0].Versions[0].Wraps
	if w == nil || w.Used != limit || w.Limit != limit {
		t.Errorf("listed are %+v, want all of %d", w, limit)
	}
}

// That a disabled version does not wrap is not told as wear.
func TestDisabledVersionIsNotWorn(t *testing.T) {
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "orders"})
	b, log := r.opened(t)
	r.must(request{Command: "disable", Key: "orders", Version: 1, Confirmed: true})
	eventually(t, func() error {
		if _, err := b.Wrap(bounded(t), orders, make([]byte, 32), message); plugins.ClassOf(err) != plugins.KeyUnusable {
			return errors.New("it is not disabled yet")
		}
		return nil
	})
	if told := log.with("has made all the wraps"); len(told) != 0 {
		t.Errorf("the log says %q", told)
	}
}

// Counts that somebody has damaged are told, and what was wrapped opens all the same.
func TestDamagedCounts(t *testing.T) {
	r := newRig(t)
	r.must(request{Command: "init-key", Key: "orders"})
	b, log := r.opened(t)
	wrapped, err := b.Wrap(bounded(t), orders, make([]byte, 32), message)
	if err = errors.Join(err, b.Close()); err != nil {
		t.Fatal(err)
	}
	if told := log.with("counts of wraps"); len(told) != 0 {
		t.Errorf("of counts that are well: %q", told)
	}
	r.Write("state/wraps.json", "{")
	b, log = r.opened(t)
	if _, err := b.Unwrap(bounded(t), orders, wrapped, message); err != nil {
		t.Errorf("with damaged counts: %v", err)
	}
	if _, err := b.Wrap(bounded(t), orders, make([]byte, 32), message); plugins.ClassOf(err) != plugins.Unavailable {
		t.Errorf("Wrap, which cannot be counted: %v, want Unavailable", err)
	}
	if told := log.with("the counts of wraps are damaged"); len(told) != 1 || !strings.Contains(told[0], "rotate the keys") {
		t.Errorf("the log says %q, want one line with the cure", told)
	}
}

// A state directory that was made anew under a running process is another one: the agent's
// log names the cure, and it is one.
func TestStateDirectoryMadeAnew(t *testing.T) {
	cfg, _ := faulty(t, hsmtest.PIN)
	s, state := plugintest.Start(t, cfg), cfg.Access.Write[1]
	if err := errors.Join(os.RemoveAll(state), os.Mkdir(state, 0o700)); err != nil {
		t.Fatal(err)
	}
	wrap := func() error {
		_, err := s.Wrap(bounded(t), orders, make([]byte, 32), message)
		return err
	}
	if err := wrap(); err == nil || !strings.Contains(err.Error(), "kms-agent plugin restart") {
		t.Errorf("Wrap: %v, want the cure", err)
	}
	if err := s.Replace(bounded(t)); err != nil {
		t.Fatal(err)
	}
	eventually(t, wrap)
}

// A list makes no wraps that nobody counts, nor under a version that has made all of its.
func TestListMakesNoWrapTooMany(t *testing.T) {
	r := newRig(t)
	id := r.must(request{Command: "init-key", Key: "orders"}).Keys[0].Versions[0].ID
	fault := hsmtest.NewFault(t, "../../hsm", hsmtest.SoftHSMModule)
	r.settings["module"] = fault.Module
	for name, content := range map[string]string{"worn": fmt.Sprintf(`{"format":1,"wraps":{%q:%d}}`, id, uint64(1<<32)), "damaged": "{", "no counts": `{"format":1}`} {
		r.Write("state/wraps.json", content)
		fault.Calls()
		a := r.administer(request{Command: "list"})
		if n := fault.Calls()["C_Encrypt"]; n != 0 || a.Error != "" || len(a.Keys) != 1 {
			t.Errorf("%s: %d wraps, %+v", name, n, a)
		}
	}
}

// One version of which nothing tells what ails it does not hide the others.
func TestListWithAnUndecidedVersion(t *testing.T) {
	r := newRig(t)
	id := r.must(request{Command: "init-key", Key: "aaa"}).Keys[0].Versions[0].ID
	r.must(request{Command: "init-key", Key: "bbb"})
	r.Write("state/wraps.json", fmt.Sprintf(`{"format":1,"wraps":{%q:%d}}`, id, uint64(1<<32)))
	r.Tool("--delete-object", "--type", "secrkey", "--id", id)
	r.Tool("--keygen", "--key-type", "AES:32", "--id", id, "--label", "kmsagent/aaa/v1", "--sensitive", "--private")
	a := r.must(request{Command: "list"})
	if len(a.Keys) != 2 || a.Keys[0].Versions[0].Problem == "" || a.Keys[1].Versions[0].Problem != "" {
		t.Errorf("%+v", a.Keys)
	}
}
