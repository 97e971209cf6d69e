package hsm_test

import (
	"testing"

	"github.com/kms-agent/kms-agent/hsm"
)

// Numbers of versions that are not there do not have the token read each time; one that
// is made meanwhile is seen soon.
func TestUnknownVersions(t *testing.T) {
	r, fault := newFaultyRig(t)
	r.key("orders", hsm.OAEPSHA1)
	elsewhere := over(t, r.soft)
	unknown := func(number uint32) {
		if _, err := r.Version(bounded(t), "orders", number); kindOf(err) != hsm.KeyNotFound {
			t.Errorf("version %d: %v, want that it is not there", number, err)
		}
	}
	unknown(1000)
	fault.Calls()
	for number := range uint32(200) {
		unknown(1000 + number)
	}
	if n := fault.Calls()["C_FindObjectsInit"]; n > 8 {
		t.Errorf("200 numbers had the token read %d times", n)
	}
	if _, err := elsewhere.Rotate(bounded(t), "orders", 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the second version is seen", func() error {
		_, err := r.Version(t.Context(), "orders", 2)
		return err
	})
	if _, err := elsewhere.Rotate(bounded(t), "orders", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Version(bounded(t), "orders", 3); err != nil {
		t.Errorf("a version that nobody has asked for before: %v", err)
	}
}

// The random of a token that is away is no answer to what the token can do.
func TestProbeInAnOutage(t *testing.T) {
	r, fault := newFaultyRig(t)
	fault.Set("C_GenerateRandom rv=0x30")
	if p, err := r.Probe(bounded(t)); kindOf(err) != hsm.Unavailable {
		t.Errorf("Probe: %+v, %v; want Unavailable", p, err)
	}
}
