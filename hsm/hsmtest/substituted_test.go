//go:build hsmall

package hsmtest_test

import (
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// NSS puts a key that is made with the ID of another in its place: under the handle that
// we have, and without a word. It is found out while wraps follow each other.
func TestKeyReplacedBehindItsHandle(t *testing.T) {
	k := hsmtest.NSS(t)
	token := attach(t, k)
	key, err := token.CreateKey(bounded(t), "orders", hsm.GCM)
	if err != nil {
		t.Fatal(err)
	}
	v := key.Versions[0]
	if _, err := token.Wrap(bounded(t), v, nil, []byte("a data key"), nil); err != nil {
		t.Fatal(err)
	}
	info, err := token.Info(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	library := pkcs11.New(k.Module)
	t.Cleanup(library.Destroy)
	session, err := library.OpenSession(info.Slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := library.GenerateKey(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32), pkcs11.NewAttribute(pkcs11.CKA_ID, v.ID[:]),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true), pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
	}); err != nil {
		t.Fatal(err)
	}
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		_, err := token.Wrap(bounded(t), v, nil, []byte("a data key"), nil)
		if hsm.KindOf(err) == hsm.KeyUnusable {
			return
		}
		if err != nil || time.Since(began) > 12*time.Second {
			t.Fatalf("Wrap: %v after %v, want that the key is another", err, time.Since(began))
		}
	}
}

// A login and sessions that are lost are so on other tokens, too.
func TestLoginAndSessionsLost(t *testing.T) {
	// Not with NSS: it frees the keys of other sessions then, and may crash at their next use.
	for name, module := range map[string]func(testing.TB) *hsmtest.Token{"opencryptoki": hsmtest.OpenCryptoki} {
		t.Run(name, func(t *testing.T) {
			k := module(t)
			token := attach(t, k)
			key, err := token.CreateKey(bounded(t), "orders", hsm.CBCHMAC)
			if err != nil {
				t.Fatal(err)
			}
			info, err := token.Info(bounded(t))
			if err != nil {
				t.Fatal(err)
			}
			library := pkcs11.New(k.Module)
			t.Cleanup(library.Destroy)
			for what, lose := range map[string]func() error{
				"login": func() error {
					session, err := library.OpenSession(info.Slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
					if err != nil {
						return err
					}
					return library.Logout(session)
				},
				"sessions": func() error { return library.CloseAllSessions(info.Slot) },
			} {
				for range 3 {
					wrapped, err := token.Wrap(bounded(t), key.Versions[0], nil, []byte("a data key"), nil)
					if err != nil {
						t.Fatalf("before the %s: Wrap: %v", what, err)
					}
					if err := lose(); err != nil {
						t.Fatal(err)
					}
					if got, err := token.Unwrap(bounded(t), key.Versions[0], nil, wrapped, nil); err != nil || string(got) != "a data key" {
						t.Errorf("%s: Unwrap: %q, %v", what, got, err)
					}
				}
			}
		})
	}
}
