package local

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"
)

// vmFlags returns the kernel's flags of the mapping that begins at b.
func vmFlags(t *testing.T, b []byte) string {
	t.Helper()
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut("\n"+string(smaps), "\n"+strings.TrimPrefix(fmt.Sprintf("%p", b), "0x")+"-")
	if !found {
		t.Fatalf("no mapping begins at %p", b)
	}
	_, rest, _ = strings.Cut(rest, "VmFlags:")
	flags, _, _ := strings.Cut(rest, "\n")
	return flags + " "
}

func TestRegionIsLockedAndNotDumped(t *testing.T) {
	r, err := newRegion(5000)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.data) != 5000 || cap(r.data) != 5000 {
		t.Errorf("got %d bytes, capacity %d, want 5000", len(r.data), cap(r.data))
	}
	flags := vmFlags(t, r.mapped)
	for _, want := range []string{" lo ", " dd "} { // locked, do not dump
		if !strings.Contains(flags, want) {
			t.Errorf("mapping's flags are %q, want %q among them", flags, want)
		}
	}
	r.free()
	r.free()
	if r.data != nil || r.mapped != nil {
		t.Error("a freed region still shows its memory")
	}
}

// A loaded ring's keys all lie in its locked memory, and destroy erases.
func TestKeysLieInRegions(t *testing.T) {
	r := openVector(t)
	if err := r.create("new"); err != nil {
		t.Fatal(err)
	}
	for _, k := range r.keys {
		for i, v := range k.versions {
			if v.state != Destroyed && !inRegions(r, v.material) {
				t.Errorf("%s version %d lies outside protected memory", k.name, i+1)
			}
		}
	}
	material := r.keys[1].versions[1].material
	if err := r.destroy("orders", "2"); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(material, make([]byte, keySize)) {
		t.Error("destroy left the key in memory")
	}
}

func inRegions(r *ring, b []byte) bool {
	for _, m := range r.regions {
		for i := range m.data {
			if &m.data[i] == &b[0] {
				return true
			}
		}
	}
	return false
}
