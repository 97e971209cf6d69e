package hsm_test

import (
	"os"
	"testing"

	"github.com/kms-agent/kms-agent/hsm"
)

// makesNone fails a test where a key is made in the place of one whose record was lost.
func (r *rig) makesNone(name string) {
	r.t.Helper()
	if k, err := r.CreateKey(bounded(r.t), name, hsm.GCM); err == nil {
		r.t.Errorf("CreateKey makes %s with the ID %x in the place of a key whose record was lost", name, k.Versions[0].ID)
	}
}

// A key whose record was lost is found, whatever the token stumbles over meanwhile.
func TestStraysOfATokenThatStumbles(t *testing.T) {
	for _, code := range []string{"0x30", "0xb3", "0x5", "0x82", "0x101"} {
		t.Run(code, func(t *testing.T) {
			r, fault := newFaultyRig(t)
			r.key("orders", hsm.GCM)
			r.tool("--delete-object", "--type", "data", "--label", "kmsagent/orders")
			if err := r.Check(bounded(t)); err != nil { // so that the first attribute is of such a key
				t.Fatal(err)
			}
			for _, skip := range []string{"", " skip=1", " skip=2", " skip=3"} {
				fault.Set("C_GetAttributeValue rv=" + code + " count=1" + skip)
				r.makesNone("orders")
			}
			fault.Set()
			r.makesNone("orders")
		})
	}
}

// So it is where all records were lost, with their file.
func TestStraysOfALostCatalogue(t *testing.T) {
	r := newRig(t, func(r *rig, c *hsm.Config) {
		c.Catalogue = &hsm.CatalogueFile{Path: r.path("catalogue"), KeyFile: r.path("catalogue.key")}
	})
	v := r.key("orders", hsm.CBCHMAC)
	if strays, err := r.Strays(bounded(t)); err != nil || len(strays) > 0 {
		t.Errorf("strays: %+v, %v; want none", strays, err)
	}
	for _, name := range []string{"catalogue", "catalogue.key"} {
		if err := os.Remove(r.path(name)); err != nil {
			t.Fatal(err)
		}
	}
	r.makesNone("orders")
	strays, err := r.Strays(bounded(t))
	if err != nil || len(strays) != 1 || strays[0].Key != "orders" || string(strays[0].ID) != string(v.ID[:]) {
		t.Errorf("strays: %+v, %v; want the one of orders", strays, err)
	}
}

// What somebody else's record has keeps nobody from making a key.
func TestCreateBesideADamagedRecord(t *testing.T) {
	r := newRig(t)
	r.write("damaged", "{")
	r.tool("--write-object", r.path("damaged"), "--type", "data", "--private", "--label", "kmsagent/elsewhere", "--application-label", "kms-agent")
	r.key("orders", hsm.GCM)
}
