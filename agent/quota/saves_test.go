package quota_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/agent/quota"
)

// TestNobodyIsForgottenBySaves: whoever an earlier process counted stands in
// every file, also in one that is stored while they come for the first time in
// this one.
func TestNobodyIsForgottenBySaves(t *testing.T) {
	const known = 3000
	limits := map[string]quota.Limits{"r": {PerDay: 100, BytesPerDay: 100}}
	h, dir := newHost(), t.TempDir()
	before := open(t, h, dir, limits)
	var work sync.WaitGroup
	for i := range known {
		work.Go(func() {
			if err := before.take(fmt.Sprint("known ", i), 1); err != nil {
				t.Errorf("caller %d: %v", i, err)
			}
		})
	}
	work.Wait()
	for range 20 {
		after := before.crash(limits)
		var come atomic.Int64
		work.Go(func() { // too much, so that they need nothing stored
			for i := range known {
				if err := after.take(fmt.Sprint("known ", i), 101); err == nil {
					t.Error("a caller has more than its limit")
				}
				come.Add(1)
			}
		})
		for i := 1; come.Load() < known; i++ {
			if err := after.take(fmt.Sprint("new ", i), 1); err != nil {
				t.Fatal(err)
			}
			if n := after.saved("r"); n < known+i {
				t.Fatalf("%d callers are stored, want %d", n, known+i)
			}
		}
		work.Wait()
	}
}

// saved is how many callers of a rule stand in the file.
func (r *rig) saved(rule string) int {
	r.t.Helper()
	content, err := os.ReadFile(filepath.Join(r.dir, "quota.state"))
	if err != nil {
		r.t.Fatal(err)
	}
	var file struct{ Rules map[string]map[string]any }
	if err := json.NewDecoder(bytes.NewReader(content)).Decode(&file); err != nil {
		r.t.Fatal(err)
	}
	return len(file.Rules[rule])
}

func TestDiskTrouble(t *testing.T) {
	limits := map[string]quota.Limits{"r": {PerDay: 640}}
	h := newHost()
	r := open(t, h, t.TempDir(), limits)
	if err := r.take("a", 0); err != nil {
		t.Fatal(err)
	}
	obstacle := filepath.Join(r.dir, "quota.state.new")
	if err := os.MkdirAll(filepath.Join(obstacle, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	var err error
	served := 1
	for ; err == nil; served++ {
		err = r.take("a", 0)
	}
	if !errors.Is(err, quota.ErrUnavailable) || served > 22 || !strings.Contains(err.Error(), r.dir) {
		t.Fatalf("after %d requests: %v", served, err)
	}
	if _, fault := r.Status(); fault == nil {
		t.Error("status tells nothing")
	}
	if err := os.RemoveAll(obstacle); err != nil {
		t.Fatal(err)
	}
	h.pass(time.Second)
	if err := r.take("a", 0); err != nil {
		t.Errorf("after the trouble: %v", err)
	}
	if _, fault := r.Status(); fault != nil {
		t.Errorf("status: %v", fault)
	}
}

// Counts that cannot be read are no reason to begin anew.
func TestDamagedState(t *testing.T) {
	limits := map[string]quota.Limits{"r": {PerDay: 5}}
	h := newHost()
	r := open(t, h, t.TempDir(), limits)
	r.takeAll("a", 0, 5)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(r.dir, "quota.state")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"empty": "", "cut": string(good[:len(good)-3]), "changed": strings.Replace(string(good), "[5,", "[1,", 1),
		"newer": strings.Replace(string(good), `"format":1`, `"format":2`, 1),
	} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := quota.Open(r.dir, h.now, time.Now)
		if !errors.Is(err, quota.ErrState) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "remove it") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	wantExceeded(t, open(t, h, r.dir, limits).take("a", 0), quota.PerDay)
}
