package quota_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/kms-agent/kms-agent/agent/quota"
)

// childVariable makes the test binary a process that counts until it is killed.
const childVariable = "KMS_AGENT_TEST_QUOTA_DIR"

func TestMain(m *testing.M) {
	if dir, ok := os.LookupEnv(childVariable); ok {
		if err := child(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// noon is of a day that clocks are set to.
func noon() time.Time { return time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC) }

// host has the clocks of a host under the test's control.
type host struct{ boot, wall atomic.Int64 }

func newHost() *host {
	h := &host{}
	h.boot.Store(int64(time.Hour))
	h.wall.Store(noon().UnixNano())
	return h
}

func (h *host) now() time.Duration { return time.Duration(h.boot.Load()) }

// pass lets time go by; set changes the wall clock.
func (h *host) pass(d time.Duration) {
	h.boot.Add(int64(d))
	h.wall.Add(int64(d))
}

func (h *host) set(t time.Time) { h.wall.Store(t.UnixNano()) }

// rig is a Keeper over a directory.
type rig struct {
	*quota.Keeper
	t     testing.TB
	host  *host
	dir   string
	rules map[string]*quota.Rule
}

// open starts a Keeper on dir, as a new process would.
func open(t testing.TB, h *host, dir string, limits map[string]quota.Limits) *rig {
	t.Helper()
	k, err := quota.Open(dir, h.now, func() time.Time { return time.Unix(0, h.wall.Load()) })
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	t.Cleanup(func() { _ = k.Close() })
	return &rig{Keeper: k, t: t, host: h, dir: dir, rules: k.Configure(limits)}
}

// crash starts a Keeper on what r's has stored so far, as after a kill: r's own
// goes on in a directory of its own.
func (r *rig) crash(limits map[string]quota.Limits) *rig {
	r.t.Helper()
	dir, err := os.MkdirTemp(r.t.TempDir(), "")
	if err != nil {
		r.t.Fatal(err)
	}
	content, err := os.ReadFile(filepath.Join(r.dir, "quota.state"))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "quota.state"), content, 0o600)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		r.t.Fatal(err)
	}
	return open(r.t, r.host, dir, limits)
}

func newRig(t testing.TB, limits quota.Limits) *rig {
	t.Helper()
	return open(t, newHost(), t.TempDir(), map[string]quota.Limits{"r": limits})
}

// take makes one request that ends at once.
func (r *rig) take(caller string, bytes uint64) error {
	var h quota.Held
	defer h.Release()
	return r.hold(&h, caller, bytes)
}

// hold makes one request that lasts, under every rule.
func (r *rig) hold(h *quota.Held, caller string, bytes uint64) error {
	rules := make([]*quota.Rule, 0, len(r.rules))
	for _, rule := range r.rules {
		rules = append(rules, rule)
	}
	return h.Take(context.Background(), r.host.now(), rules, caller, bytes)
}

// takeAll makes requests until one is refused, and returns how many were not.
func (r *rig) takeAll(caller string, bytes uint64, most int) (granted int) {
	r.t.Helper()
	for range most {
		err := r.take(caller, bytes)
		var e *quota.Exceeded
		switch {
		case errors.As(err, &e):
			return granted
		case err != nil:
			r.t.Fatalf("after %d requests: %v", granted, err)
		}
		granted++
	}
	return granted
}

// wantExceeded fails unless err is of that limit; it returns what it says.
func wantExceeded(t testing.TB, err error, limit quota.Limit) quota.Exceeded {
	t.Helper()
	var e *quota.Exceeded
	if !errors.As(err, &e) || e.Limit != limit {
		t.Fatalf("error = %v, want limit %s", err, limit)
	}
	return *e
}

// child counts requests of one caller, and says so after each, until it is killed
// or has no more.
func child(dir string) error {
	k, err := quota.Open(dir, func() time.Duration { return time.Hour }, noon)
	if err != nil {
		return err
	}
	r := k.Configure(map[string]quota.Limits{"r": {PerDay: childLimit}})["r"]
	for {
		var h quota.Held
		err := h.Take(context.Background(), time.Hour, []*quota.Rule{r}, "caller", 0)
		var e *quota.Exceeded
		switch {
		case errors.As(err, &e):
			fmt.Println("end")
			return nil
		case err != nil:
			return err
		}
		h.Release()
		if _, err := fmt.Println("one"); err != nil {
			return err
		}
	}
}

// childLimit is more than fits into a pipe, so that no child ends before it is killed.
const childLimit = 40_000

// Whatever a killed process has served, all of them together serve no more than
// the limit, and each kill costs two blocks at most.
func TestKilledProcess(t *testing.T) {
	dir, total, kills := t.TempDir(), 0, 0
	for ended := false; !ended; {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), childVariable+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		buf, said := make([]byte, 256), strings.Builder{}
		for kill := 300; err == nil && kill > 0; kill -= 64 {
			var n int
			n, err = out.Read(buf)
			said.Write(buf[:n])
		}
		_ = cmd.Process.Kill()
		for err == nil { // what it said before it was killed counts as well
			var n int
			n, err = out.Read(buf)
			said.Write(buf[:n])
		}
		_ = cmd.Wait()
		total += strings.Count(said.String(), "one\n")
		ended = strings.Contains(said.String(), "end\n")
		kills++
	}
	lost := kills * 3 * childLimit / 64
	if total > childLimit || total < childLimit-lost {
		t.Errorf("%s processes served %d together, want at most %d and not much less", strconv.Itoa(kills), total, childLimit)
	}
	if kills < 2 {
		t.Errorf("nothing was killed")
	}
}
