package hsmtest_test

import (
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// A login that is lost is so until the next, which the module behind does not miss.
func TestLoggedOut(t *testing.T) {
	r := newRig(t)
	key, iv, plaintext := r.key(), []byte("twelve bytes"), []byte("some plaintext")
	ciphertext, _ := r.encrypt(r.session, key, iv, plaintext)
	r.Set("logged-out")
	m, _ := r.gcm(iv)
	r.wantCode("EncryptInit", r.EncryptInit(r.session, m, key), pkcs11.CKR_USER_NOT_LOGGED_IN)
	r.wantCode("DecryptInit", r.DecryptInit(r.session, m, key), pkcs11.CKR_USER_NOT_LOGGED_IN)
	if info, err := r.GetSessionInfo(r.session); err != nil || info.State != pkcs11.CKS_RW_PUBLIC_SESSION {
		t.Errorf("the session: %+v, %v", info, err)
	}
	if err := r.Login(r.session, pkcs11.CKU_USER, hsmtest.PIN); err != nil {
		t.Errorf("Login: %v", err)
	}
	if info, err := r.GetSessionInfo(r.session); err != nil || info.State != pkcs11.CKS_RW_USER_FUNCTIONS {
		t.Errorf("the session: %+v, %v", info, err)
	}
	if got, err := r.decrypt(key, iv, ciphertext); err != nil || string(got) != string(plaintext) {
		t.Errorf("Decrypt: %q, %v", got, err)
	}
}

func TestSlotsRenumbered(t *testing.T) {
	r := newRig(t)
	r.Set("slots 1000")
	slots, err := r.GetSlotList(true)
	if err != nil || slots[0] != r.slot+1000 {
		t.Fatalf("slots %d, %v; want %d", slots, err, r.slot+1000)
	}
	if info, err := r.GetTokenInfo(slots[0]); err != nil || info.Label != hsmtest.Label {
		t.Errorf("the token: %+v, %v", info, err)
	}
	_, err = r.OpenSession(r.slot, pkcs11.CKF_SERIAL_SESSION)
	r.wantCode("OpenSession in the slot of before", err, pkcs11.CKR_SLOT_ID_INVALID)
	session, err := r.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := r.GetSessionInfo(session); err != nil || info.SlotID != slots[0] {
		t.Errorf("the session: %+v, %v", info, err)
	}
}

func TestBoast(t *testing.T) {
	r := newRig(t)
	key := r.key()
	r.Set("boast 40")
	if ciphertext, _ := r.encrypt(r.session, key, []byte("twelve bytes"), []byte("some plaintext")); len(ciphertext) != 40 {
		t.Errorf("Encrypt: %d bytes, want what the rule says", len(ciphertext))
	}
	r.Set("boast 5")
	if list, err := r.GetSlotList(true); err != nil || len(list) != 5 {
		t.Errorf("slots %d, %v; want as many as the rule says", list, err)
	}
}
