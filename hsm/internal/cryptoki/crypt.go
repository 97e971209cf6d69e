package cryptoki

/*
#include "cryptoki.h"
*/
import "C"

import (
	"fmt"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// Parameters are what a mechanism is given. Build them with None, IV, GCM or OAEP.
type Parameters struct {
	kind         C.ck_ulong
	mechanism    uint
	iv, aad      []byte
	ivLen        C.ck_ulong
	ivBits       C.ck_ulong
	hash, maskFn uint
}

// None gives a mechanism no parameters.
func None(mechanism uint) Parameters {
	return Parameters{kind: C.CK_PARAMS_NONE, mechanism: mechanism}
}

// IV gives a mechanism an initialization vector.
func IV(mechanism uint, iv []byte) Parameters {
	return Parameters{kind: C.CK_PARAMS_IV, mechanism: mechanism, iv: iv, ivLen: C.ck_ulong(len(iv))}
}

// GCM is CKM_AES_GCM with a tag of 128 bits. A module may write the IV that it
// chose into iv.
func GCM(iv, aad []byte) Parameters {
	return Parameters{
		kind: C.CK_PARAMS_GCM, mechanism: pkcs11.CKM_AES_GCM, iv: iv, aad: aad, ivLen: C.ck_ulong(len(iv)), ivBits: C.ck_ulong(8 * len(iv)),
	}
}

// GCMChosen is CKM_AES_GCM where the token is told how long the IV is, and that it
// chooses it (Luna in FIPS mode from firmware 7.9.3).
func GCMChosen(ivBits uint, aad []byte) Parameters {
	return Parameters{kind: C.CK_PARAMS_GCM, mechanism: pkcs11.CKM_AES_GCM, aad: aad, ivBits: C.ck_ulong(ivBits)}
}

// OAEP is CKM_RSA_PKCS_OAEP without a label: modules do not agree on labels.
func OAEP(hash, maskFn uint) Parameters {
	return Parameters{kind: C.CK_PARAMS_OAEP, mechanism: pkcs11.CKM_RSA_PKCS_OAEP, hash: hash, maskFn: maskFn}
}

// Encrypt encrypts in into out and returns how many bytes it wrote. out has room
// for what the module adds; it does not overlap in.
func (s Session) Encrypt(key Object, p *Parameters, in, out []byte) (int, error) {
	r := C.ck_encrypt(s.functions(), s.handle, C.ck_ulong(key), C.ck_ulong(p.mechanism), p.kind, pointer(p.iv), p.ivLen, p.ivBits,
		pointer(p.aad), C.ck_ulong(len(p.aad)), C.ck_ulong(p.hash), C.ck_ulong(p.maskFn),
		pointer(in), C.ck_ulong(len(in)), pointer(out), C.ck_ulong(len(out)))
	return outcome(r, "C_EncryptInit", "C_Encrypt", len(out))
}

// Decrypt decrypts in into out and returns how many bytes it wrote. out has room
// for as many bytes as in has.
func (s Session) Decrypt(key Object, p *Parameters, in, out []byte) (int, error) {
	r := C.ck_decrypt(s.functions(), s.handle, C.ck_ulong(key), C.ck_ulong(p.mechanism), p.kind, pointer(p.iv), p.ivLen, p.ivBits,
		pointer(p.aad), C.ck_ulong(len(p.aad)), C.ck_ulong(p.hash), C.ck_ulong(p.maskFn),
		pointer(in), C.ck_ulong(len(in)), pointer(out), C.ck_ulong(len(out)))
	return outcome(r, "C_DecryptInit", "C_Decrypt", len(out))
}

// Sign signs, or authenticates, in and returns how many bytes of out it wrote.
func (s Session) Sign(key Object, mechanism uint, in, out []byte) (int, error) {
	r := C.ck_sign(s.list, s.handle, C.ck_ulong(key), C.ck_ulong(mechanism),
		pointer(in), C.ck_ulong(len(in)), pointer(out), C.ck_ulong(len(out)))
	return outcome(r, "C_SignInit", "C_Sign", len(out))
}

// Verify checks what Sign made.
func (s Session) Verify(key Object, mechanism uint, in, mac []byte) error {
	r := C.ck_verify(s.list, s.handle, C.ck_ulong(key), C.ck_ulong(mechanism),
		pointer(in), C.ck_ulong(len(in)), pointer(mac), C.ck_ulong(len(mac)))
	_, err := outcome(r, "C_VerifyInit", "C_Verify", 0)
	return err
}

// functions is the module's list as a number, for calls that are made often: cgo checks each
// pointer to what may hold pointers of Go.
func (s Session) functions() C.ck_ulong { return C.ck_ulong(uintptr(unsafe.Pointer(s.list))) }

func outcome(r C.ck_result, first, second string, room int) (int, error) {
	switch {
	case r.rv != 0 && r.init != 0:
		return 0, check(first, r.rv)
	case r.rv != 0:
		return 0, check(second, r.rv)
	case uint64(r.len) > uint64(room):
		return 0, fmt.Errorf("%s: the module says %d bytes where %d had room", second, r.len, room)
	}
	return int(r.len), nil
}
