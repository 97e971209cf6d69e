package hsm_test

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// A change of a key whose answer is lost, wherever that is, is made once: the key that
// its record names is there.
func TestChangeWhoseAnswerIsLost(t *testing.T) {
	for _, rule := range []string{
		"C_DestroyObject rv=0xb3 count=1", "C_DestroyObject rv=0x30 count=1", "C_CreateObject rv=0xb3 count=1", "C_CreateObject rv=0x30 count=1",
		"C_GetAttributeValue rv=0x82 count=1", "C_FindObjects rv=0x30 count=1 skip=3", "C_FindObjects rv=0xb3 count=1 skip=7",
		"C_FindObjectsFinal rv=0x30 count=1 skip=5", "C_GetAttributeValue rv=0x30 skip=13 count=1", "C_GetAttributeValue rv=0xb3 skip=14 count=1",
		"C_GetAttributeValue rv=0xb3 skip=15 count=1", "C_GetAttributeValue rv=0xb3 skip=30 count=1",
	} {
		t.Run(rule, func(t *testing.T) {
			r, fault := newFaultyRig(t, func(_ *rig, c *hsm.Config) { c.Patience = 5 * time.Second })
			r.key("orders", 0)
			fault.Set(rule)
			k, err := r.Rotate(bounded(t), "orders", 0)
			fault.Set()
			if err != nil || k.Current != 2 || len(k.Versions) != 2 {
				t.Fatalf("Rotate: %+v, %v", k, err)
			}
			m := material(32)
			r.opens(k.Versions[1], r.wrap(k.Versions[1], m), m)
			if n := r.dataObjects(); n != 1 {
				t.Errorf("%d records of the key, want one", n)
			}
			if k, err = r.Rotate(bounded(t), "orders", 0); err != nil || k.Current != 3 {
				t.Errorf("Rotate again: %+v, %v", k, err)
			}
		})
	}
}

// dataObjects returns how many records are on the token.
func (r *rig) dataObjects() int {
	r.t.Helper()
	out, err := exec.CommandContext(r.t.Context(), "pkcs11-tool", "--module", softHSM, "--token-label", hsmtest.Label, "--login", "--pin", userPIN,
		"--list-objects", "--type", "data").CombinedOutput()
	if err != nil {
		r.t.Fatalf("%v\n%s", err, out)
	}
	return strings.Count(string(out), "kmsagent/")
}

// Who does not wait for a change leaves it to be made: what is on the token in the end
// is one or the other, whole.
func TestChangeThatIsLeft(t *testing.T) {
	for _, rule := range []string{"C_CreateObject sleep_ms=600 count=1", "C_DestroyObject sleep_ms=600 count=1"} {
		t.Run(rule, func(t *testing.T) {
			r, fault := newFaultyRig(t)
			r.key("orders", 0)
			fault.Set(rule)
			ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
			defer cancel()
			if k, err := r.Rotate(ctx, "orders", 0); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Rotate: %+v, %v; want that the time is over", k, err)
			}
			eventually(t, "the change is made", func() error {
				if calls := fault.Calls(); calls["C_CreateObject"]+calls["C_DestroyObject"] == 0 {
					time.Sleep(700 * time.Millisecond) // in which it arrives
					return nil
				}
				return errors.New("it is under way")
			})
			k, err := r.Key(bounded(t), "orders")
			if err != nil {
				t.Fatal(err)
			}
			v, err := k.Version(k.Current)
			if err != nil {
				t.Fatal(err)
			}
			m := material(32)
			r.opens(v, r.wrap(v, m), m)
		})
	}
}

// A record that is replaced while it is read is no key that is gone.
func TestReplacedWhileItIsRead(t *testing.T) {
	r, fault := newFaultyRig(t)
	r.key("orders", 0)
	_ = fault.Calls()
	for range 3 {
		fault.Set("C_GetAttributeValue rv=0x82 count=1")
		if keys, err := r.Keys(bounded(t)); err != nil || len(keys) != 1 {
			t.Errorf("%d keys, %v; want one", len(keys), err)
		}
	}
	if n := fault.Calls()["C_CloseSession"]; n != 0 {
		t.Errorf("%d sessions were closed, want none", n)
	}
}

// A key that is made anew, or restored, has records with lower numbers than those that
// were read before: they count.
func TestKeyMadeAnew(t *testing.T) {
	r := newRig(t)
	r.key("orders", hsm.OAEPSHA1)
	elsewhere := over(t, r.soft)
	for range 2 {
		if _, err := r.Rotate(bounded(t), "orders", 0); err != nil {
			t.Fatal(err)
		}
	}
	r.tool("--delete-object", "--type", "data", "--label", "kmsagent/orders")
	for i := range 3 { // else it is a record that was lost
		r.tool("--delete-object", "--type", "privkey", "--label", fmt.Sprintf("kmsagent/orders/v%d", i+1))
	}
	want := elsewhere.key("orders", hsm.OAEPSHA1)
	eventually(t, "the key is the new one", func() error {
		k, err := r.Key(t.Context(), "orders")
		if err == nil && (k.Current != 1 || k.Versions[0].ID != want.ID) {
			err = fmt.Errorf("it has %d versions", len(k.Versions))
		}
		return err
	})
	v, err := r.Version(bounded(t), "orders", 1)
	if err != nil {
		t.Fatal(err)
	}
	m := material(32)
	r.opens(v, r.wrap(v, m), m)
}
