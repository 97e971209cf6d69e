package quota_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

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
