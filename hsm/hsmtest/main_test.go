package hsmtest_test

import (
	"errors"
	"os"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// childVariable makes the test binary a process that uses a module once.
const childVariable = "KMS_AGENT_HSMTEST_CHILD"

func TestMain(m *testing.M) {
	if module := os.Getenv(childVariable); module != "" {
		os.Exit(child(module))
	}
	os.Exit(m.Run())
}

func child(module string) int {
	ctx := pkcs11.New(module)
	if err := ctx.Initialize(); err != nil {
		return 10
	}
	if err := ctx.Finalize(); err != nil {
		return 11
	}
	return 0
}

// rig is the fault module before a token of its own, with a session that is logged in.
type rig struct {
	*pkcs11.Ctx
	*hsmtest.Fault

	t       *testing.T
	slot    uint
	session pkcs11.SessionHandle
}

func newRig(t *testing.T) *rig {
	t.Helper()
	hsmtest.NewSoftHSM(t)
	fault := hsmtest.NewFault(t, "..", hsmtest.SoftHSMModule)
	r := &rig{Ctx: pkcs11.New(fault.Module), Fault: fault, t: t}
	r.connect()
	t.Cleanup(func() {
		fault.Set()
		if err := r.Finalize(); err != nil {
			t.Errorf("C_Finalize: %v", err)
		}
		r.Destroy()
	})
	r.Calls()
	return r
}

// connect does what an application does first.
func (r *rig) connect() {
	r.t.Helper()
	err := r.Initialize()
	if err == nil {
		var slots []uint
		if slots, err = r.GetSlotList(true); err == nil {
			r.slot = slots[0]
			r.session, err = r.OpenSession(r.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		}
	}
	if err == nil {
		err = r.Login(r.session, pkcs11.CKU_USER, hsmtest.PIN)
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

// random makes a call that stands for any.
func (r *rig) random() error {
	_, err := r.GenerateRandom(r.session, 32)
	return err
}

func (r *rig) wantCode(what string, err error, want pkcs11.Error) {
	r.t.Helper()
	if code(err) != want {
		r.t.Errorf("%s: %v, want %v", what, err, want)
	}
}

// code is that of a call's result; 0 where it was well.
func code(err error) pkcs11.Error {
	var e pkcs11.Error
	if err != nil && !errors.As(err, &e) {
		return ^pkcs11.Error(0)
	}
	return e
}

// key makes a key for the session.
func (r *rig) key() pkcs11.ObjectHandle {
	r.t.Helper()
	key, err := r.GenerateKey(r.session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32), pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true), pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return key
}

// gcm is the mechanism, and the parameters, which the test frees.
func (r *rig) gcm(iv []byte) ([]*pkcs11.Mechanism, *pkcs11.GCMParams) {
	p := pkcs11.NewGCMParams(iv, []byte("bound"), 128)
	r.t.Cleanup(p.Free)
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, p)}, p
}

// encrypt returns what a module gives, and what is in the caller's vector then.
func (r *rig) encrypt(session pkcs11.SessionHandle, key pkcs11.ObjectHandle, iv, plaintext []byte) (ciphertext, written []byte) {
	r.t.Helper()
	m, p := r.gcm(iv)
	err := r.EncryptInit(session, m, key)
	if err == nil {
		ciphertext, err = r.Encrypt(session, plaintext)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return ciphertext, p.IV()
}

func (r *rig) decrypt(key pkcs11.ObjectHandle, iv, ciphertext []byte) ([]byte, error) {
	r.t.Helper()
	m, _ := r.gcm(iv)
	if err := r.DecryptInit(r.session, m, key); err != nil {
		r.t.Fatal(err)
	}
	return r.Decrypt(r.session, ciphertext)
}
