package hsm_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// strangerVariable makes the test binary a stranger: a process without a PIN.
const strangerVariable = "KMS_AGENT_HSM_TEST_STRANGER"

// planted are public keys that a stranger makes, or what he makes of those that there are.
type planted struct {
	ID            []byte
	Modulus       []byte // nil: of those that there are CKA_ENCRYPT is taken away
	Exponent      []byte
	MayNotEncrypt bool
	MayNotBeGone  bool
	MayNotChange  bool
	Count         int
}

// copyOf is the public key of a version as it is.
func (r *rig) copyOf(v *hsm.Version) planted {
	r.t.Helper()
	key := r.publicKey(v)
	return planted{ID: v.ID[:], Modulus: key.N.Bytes(), Exponent: big.NewInt(int64(key.E)).Bytes(), Count: 1}
}

// plants makes public keys, as a stranger.
func (r *rig) plants(p planted) {
	r.t.Helper()
	order, err := json.Marshal(p)
	if err != nil {
		r.t.Fatal(err)
	}
	c := exec.CommandContext(r.t.Context(), "/proc/self/exe")
	c.Env = append(os.Environ(), strangerVariable+"="+string(order))
	if out, err := c.CombinedOutput(); err != nil {
		r.t.Fatalf("the stranger: %v\n%s", err, out)
	}
}

// stranger is the main function of a stranger.
func stranger(order string) error {
	var p planted
	if err := json.Unmarshal([]byte(order), &p); err != nil {
		return err
	}
	library := pkcs11.New(softHSM)
	if err := library.Initialize(); err != nil {
		return err
	}
	defer func() { _ = library.Finalize() }()
	slots, err := library.GetSlotList(true)
	if err != nil {
		return err
	}
	for _, slot := range slots {
		if info, err := library.GetTokenInfo(slot); err != nil || info.Label != hsmtest.Label {
			continue
		}
		session, err := library.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			return err
		}
		return p.by(library, session)
	}
	return errors.New("the token is not there")
}

func (p planted) by(library *pkcs11.Ctx, session pkcs11.SessionHandle) error {
	whose := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_ID, p.ID),
	}
	if p.Modulus == nil {
		if err := library.FindObjectsInit(session, whose); err != nil {
			return err
		}
		found, _, err := library.FindObjects(session, 100)
		for _, o := range found {
			err = errors.Join(err, library.SetAttributeValue(session, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, false)}))
		}
		return errors.Join(err, library.FindObjectsFinal(session))
	}
	key := append(slices.Clone(whose), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
		pkcs11.NewAttribute(pkcs11.CKA_MODULUS, p.Modulus), pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, p.Exponent),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, !p.MayNotEncrypt), pkcs11.NewAttribute(pkcs11.CKA_DESTROYABLE, !p.MayNotBeGone),
		pkcs11.NewAttribute(pkcs11.CKA_MODIFIABLE, !p.MayNotChange))
	for range p.Count {
		if _, err := library.CreateObject(session, key); err != nil {
			return err
		}
	}
	return nil
}

// withoutPublic destroys the public key of a version, as a stranger.
func (r *rig) withoutPublic(v *hsm.Version) {
	r.t.Helper()
	r.stranger("--delete-object", "--type", "pubkey", "--id", fmt.Sprintf("%x", v.ID))
}

// hasty has calls wait a moment only for another connection.
func hasty(_ *rig, c *hsm.Config) { c.Patience = 50 * time.Millisecond }

// connectsAgain has the module initialised again, which may order what it finds anew.
func (r *rig) connectsAgain(fault *hsmtest.Fault, v *hsm.Version, wrapped []byte) {
	r.t.Helper()
	n := r.attached()
	fault.Set("dead")
	_ = r.fails(v, wrapped, hsm.Unavailable)
	fault.Set()
	eventually(r.t, "it is attached again", func() error {
		if r.attached() == n {
			return errors.New("it is not")
		}
		return r.Check(r.t.Context())
	})
}

// A public key that may not encrypt keeps nobody from the right one beside it.
func TestPublicKeysThatMayNotEncrypt(t *testing.T) {
	r, fault := newFaultyRig(t, hasty)
	v, m := r.key("orders", hsm.OAEPSHA1), material(32)
	wrapped, theirs := r.wrap(v, m), r.copyOf(v)
	theirs.MayNotEncrypt, theirs.Count = true, 20
	r.plants(theirs)
	for range 3 {
		r.connectsAgain(fault, v, wrapped)
		r.opens(v, r.wrap(v, m), m)
	}
}

// What a public key may not do says nothing of the private one: the version opens, and
// wraps are an outage of this version.
func TestPublicKeyThatMayNotEncrypt(t *testing.T) {
	r, fault := newFaultyRig(t)
	v, m := r.key("orders", hsm.OAEPSHA1), material(32)
	wrapped, theirs := r.wrap(v, m), r.copyOf(v)
	refused := func(when string) {
		t.Helper()
		r.logOut()
		r.opens(v, wrapped, m)
		if _, err := r.Wrap(bounded(t), v, nil, m, bound); !hsm.OfVersion(err) || !strings.Contains(err.Error(), "hsm rotate orders") {
			t.Errorf("%s: Wrap: %v, want an outage of this version with its cure", when, err)
		}
		r.opens(v, wrapped, m)
	}
	for _, code := range []string{"0x68", "0x70", "0x71", "0x63", "0x62", "0x54", "0x1b", "0x21"} {
		fault.Set("C_EncryptInit rv=" + code)
		refused(code)
	}
	fault.Set()
	r.withoutPublic(v)
	theirs.MayNotEncrypt = true
	r.plants(theirs)
	refused("a stranger's alone")
	if n := r.attached(); n != 1 {
		t.Errorf("attached %d times, want once", n)
	}
}

// A public key that may not encrypt any more, since a stranger has changed it in the midst
// of its use, says nothing of the private one either.
func TestPublicKeyThatIsChanged(t *testing.T) {
	r := newRig(t)
	v, m := r.key("orders", hsm.OAEPSHA1), material(32)
	wrapped, theirs := r.wrap(v, m), r.copyOf(v)
	r.plants(planted{ID: v.ID[:]})
	if _, err := r.Wrap(bounded(t), v, nil, m, bound); !hsm.OfVersion(err) {
		t.Errorf("Wrap: %v, want an outage of this version", err)
	}
	r.opens(v, wrapped, m)
	r.plants(theirs) // as an operator may do as well
	r.logOut()
	r.opens(v, wrapped, m)
	r.opens(v, r.wrap(v, m), m)
}

// An attribute that is larger than any that is ours says that a public key is not ours.
func TestHugePublicKeys(t *testing.T) {
	huge := append([]byte{1}, make([]byte, 70_000)...)
	for name, grow := range map[string]func(*planted){
		"modulus":  func(p *planted) { p.Modulus = huge },
		"exponent": func(p *planted) { p.Exponent = huge },
	} {
		t.Run(name, func(t *testing.T) {
			r, fault := newFaultyRig(t, hasty)
			v, m := r.key("orders", hsm.OAEPSHA1), material(32)
			wrapped, theirs := r.wrap(v, m), r.copyOf(v)
			grow(&theirs)
			theirs.Count = 20
			r.plants(theirs)
			for range 3 {
				r.connectsAgain(fault, v, wrapped)
				r.opens(v, r.wrap(v, m), m)
			}
			if _, err := r.SetState(bounded(t), "orders", 1, hsm.Disabled); err != nil {
				t.Errorf("it is not disabled: %v", err)
			}
			if _, err := r.Unwrap(bounded(t), v, nil, wrapped, bound); hsm.KindOf(err) != hsm.KeyUnusable {
				t.Errorf("the private key opens all the same: %v", err)
			}
			if _, err := r.SetState(bounded(t), "orders", 1, hsm.Enabled); err != nil {
				t.Errorf("it is not enabled: %v", err)
			}
		})
	}
}

// However many public keys there are of its ID, the right one is found.
func TestFloodOfPublicKeys(t *testing.T) {
	r, fault := newFaultyRig(t, hasty)
	v, m := r.key("orders", hsm.OAEPSHA1), material(32)
	wrapped, theirs := r.wrap(v, m), r.copyOf(v)
	theirs.Modulus[len(theirs.Modulus)-1] ^= 2
	theirs.Count = 300
	r.plants(theirs)
	for range 3 {
		r.connectsAgain(fault, v, wrapped)
		r.opens(v, r.wrap(v, m), m)
	}
}

// Public keys that can neither be changed nor destroyed keep nobody from disabling,
// enabling and destroying what counts; that they are there is told.
func TestPublicKeysThatStay(t *testing.T) {
	r, fault := newFaultyRig(t) // with patience for connections that are made again
	v, m := r.key("orders", hsm.OAEPSHA1), material(32)
	wrapped, theirs := r.wrap(v, m), r.copyOf(v)
	theirs.MayNotEncrypt, theirs.MayNotChange, theirs.MayNotBeGone, theirs.Count = true, true, true, 20
	r.plants(theirs)
	r.connectsAgain(fault, v, wrapped)
	for _, state := range []hsm.State{hsm.Disabled, hsm.Enabled} {
		if k, err := r.SetState(bounded(t), "orders", 1, state); err != nil || k.Versions[0].State != state {
			t.Fatalf("it is not %v: %v", state, err)
		}
	}
	v, err := r.Version(bounded(t), "orders", 1)
	if err != nil {
		t.Fatal(err)
	}
	r.opens(v, wrapped, m)
	r.opens(v, r.wrap(v, m), m)
	if _, err := r.SetState(bounded(t), "orders", 1, hsm.Disabled); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		k, err := r.Destroy(bounded(t), "orders", 1)
		if err != nil || k.Versions[0].State != hsm.Destroyed || !strings.Contains(k.Note, "public keys") {
			t.Fatalf("Destroy: %+v, %v; want that it is done, and a note", k, err)
		}
	}
	if err := r.Verify(bounded(t), v); hsm.KindOf(err) != hsm.KeyNotFound {
		t.Errorf("the private key is there still: %v", err)
	}
}
