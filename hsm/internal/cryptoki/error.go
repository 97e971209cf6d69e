package cryptoki

import (
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"
)

// Error is the return value of a function of the module, a CKR_ code.
type Error uint

// Error returns the code's name and number, as "CKR_DEVICE_ERROR (0x30)".
func (e Error) Error() string { return fmt.Sprintf("%s (%#x)", e.Name(), uint(e)) }

// Name returns the code's name.
func (e Error) Name() string {
	switch {
	case e == ActionProhibited:
		return "CKR_ACTION_PROHIBITED"
	case e&pkcs11.CKR_VENDOR_DEFINED != 0:
		return "a code of the vendor's own"
	}
	_, name, _ := strings.Cut(pkcs11.Error(e).Error(), ": 0x")
	if _, name, _ = strings.Cut(name, ": "); name == "" {
		return "an unknown code"
	}
	return name
}

// ActionProhibited is CKR_ACTION_PROHIBITED of PKCS#11 v2.40.
const ActionProhibited Error = 0x1B

// Policy tells whether the code says that the token does not allow a use of a key.
func (e Error) Policy() bool {
	switch uint(e) {
	case pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_MECHANISM_PARAM_INVALID, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED,
		pkcs11.CKR_KEY_TYPE_INCONSISTENT, pkcs11.CKR_KEY_SIZE_RANGE, pkcs11.CKR_FUNCTION_NOT_SUPPORTED, uint(ActionProhibited):
		return true
	}
	return false
}

// CallError says which function of the module failed.
type CallError struct {
	Function string
	Code     Error
}

// Error returns the function and the code.
func (e *CallError) Error() string { return e.Function + ": " + e.Code.Error() }

// Unwrap returns the code.
func (e *CallError) Unwrap() error { return e.Code }

func check[T ~uint64](function string, rv T) error {
	if rv == 0 {
		return nil
	}
	return &CallError{Function: function, Code: Error(rv)}
}
