package hsm

import (
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// What a token does not allow it says itself: a code in what an outage is told with is of
// something else.
func TestDenied(t *testing.T) {
	code := &cryptoki.CallError{Function: "C_EncryptInit", Code: cryptoki.Error(pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED)}
	if !denied(code) {
		t.Errorf("%v is a no", code)
	}
	if err := errorf(Unavailable, code, "the connection is lost"); denied(err) {
		t.Errorf("%v is an outage", err)
	}
	if denied(&cryptoki.CallError{Function: "C_EncryptInit", Code: cryptoki.Error(pkcs11.CKR_DEVICE_ERROR)}) {
		t.Error("a lost connection is no no")
	}
}
