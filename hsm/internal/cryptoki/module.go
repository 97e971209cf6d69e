// Package cryptoki is a thin binding to PKCS#11 modules: the caller owns every
// buffer, the parameters of a mechanism live until the operation ends, a wrap
// costs two calls of the module and one change to C. Nothing in it locks or
// retries; one session belongs to one goroutine at a time.
package cryptoki

/*
#cgo linux LDFLAGS: -ldl
#cgo noescape ck_encrypt
#cgo nocallback ck_encrypt
#cgo noescape ck_decrypt
#cgo nocallback ck_decrypt
#cgo noescape ck_sign
#cgo nocallback ck_sign
#cgo noescape ck_verify
#cgo nocallback ck_verify
#cgo noescape ck_random
#cgo nocallback ck_random
#cgo noescape ck_login
#cgo nocallback ck_login
#include <stdlib.h>
#include "cryptoki.h"
*/
import "C"

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// Module is a loaded PKCS#11 module. It stays loaded until the process ends:
// modules with threads of their own do not survive being unloaded.
type Module struct {
	path string
	// list comes from the one call of C_GetFunctionList: some modules make a new
	// instance at each.
	list *C.ck_functions
	// reserved is the module's setting in C, kept: modules may go on reading it.
	reserved *C.char
	// alone says that the module cannot lock. One that is initialised still does not
	// say so again.
	alone bool
}

// Load loads the module at path, which is absolute: a relative one would be
// looked for in places that others may write to.
func Load(path string) (*Module, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("module %q: the path must be absolute", path)
	}
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	var list *C.ck_functions
	var rv C.ck_rv
	var why [512]C.char
	handle := C.ck_open(name, &list, &rv, &why[0], C.ck_ulong(len(why))) //nolint:gocritic // cgo's own code compares
	if handle == nil {
		return nil, fmt.Errorf("load module %s: %s", path, C.GoString(&why[0]))
	}
	if rv != 0 {
		return nil, fmt.Errorf("load module %s: C_GetFunctionList: %w", path, Error(rv))
	}
	if list == nil {
		return nil, fmt.Errorf("load module %s: it has no function list", path)
	}
	return &Module{path: path, list: list}, nil
}

// Path returns where the module was loaded from.
func (m *Module) Path() string { return m.path }

// Initialize calls C_Initialize. reserved is a module's own setting (NSS reads
// its directory there), mostly "". It reports false where the module cannot lock
// by itself: then one thread may use it at a time. A module that is initialised
// already counts as initialised. reserved is that of the first call.
func (m *Module) Initialize(reserved string) (locks bool, err error) {
	if reserved != "" && m.reserved == nil {
		m.reserved = C.CString(reserved)
	}
	rv := C.ck_initialize(m.list, pkcs11.CKF_OS_LOCKING_OK, m.reserved)
	if rv == pkcs11.CKR_CANT_LOCK || rv == pkcs11.CKR_NEED_TO_CREATE_THREADS {
		m.alone = true
		rv = C.ck_initialize(m.list, 0, m.reserved)
	}
	if rv == pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED {
		rv = 0
	}
	return !m.alone, check("C_Initialize", rv)
}

// Finalize calls C_Finalize. A module that is not initialised counts as
// finalised. It blocks while calls are under way in some modules.
func (m *Module) Finalize() error {
	err := check("C_Finalize", C.ck_finalize(m.list))
	if errors.Is(err, Error(pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED)) {
		return nil
	}
	return err
}

// Info describes a module.
type Info struct {
	Manufacturer, Description string
	Cryptoki, Library         Version
}

// Version is a version of two numbers.
type Version struct{ Major, Minor uint8 }

// String returns "major.minor".
func (v Version) String() string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }

// Info calls C_GetInfo.
func (m *Module) Info() (Info, error) {
	var i C.ck_info
	if err := check("C_GetInfo", C.ck_get_info(m.list, &i)); err != nil {
		return Info{}, err
	}
	return Info{
		Manufacturer: text(i.manufacturer[:]), Description: text(i.description[:]),
		Cryptoki: version(i.cryptoki), Library: version(i.library),
	}, nil
}

// maxList is how many slots or mechanisms a module may speak of.
const maxList = 1 << 16

// Slots returns the slots with a token in them. There may be none while an HSM
// is away.
func (m *Module) Slots() ([]uint, error) {
	for range 8 { // the number may change between the calls
		var n C.ck_ulong
		if err := check("C_GetSlotList", C.ck_slots(m.list, nil, &n)); err != nil {
			return nil, err
		}
		if n > maxList {
			return nil, fmt.Errorf("C_GetSlotList: %d slots are not believable", n)
		}
		slots := make([]C.ck_ulong, n+4)
		n = C.ck_ulong(len(slots))
		err := check("C_GetSlotList", C.ck_slots(m.list, &slots[0], &n))
		if errors.Is(err, Error(pkcs11.CKR_BUFFER_TOO_SMALL)) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return numbers(slots, n)
	}
	return nil, errors.New("C_GetSlotList: the list of slots does not stand still")
}

// numbers returns the first n of list, which a module said to have filled.
func numbers(list []C.ck_ulong, n C.ck_ulong) ([]uint, error) {
	if n > C.ck_ulong(len(list)) {
		return nil, fmt.Errorf("the module says that it gave %d values where %d had room", n, len(list))
	}
	out := make([]uint, n)
	for i := range out {
		out[i] = uint(list[i])
	}
	return out, nil
}

// Token describes a token.
type Token struct {
	Label, Manufacturer, Model, Serial string
	// Flags are CKF_ bits.
	Flags uint
	// MaxSessions is 0 where the token says nothing.
	MaxSessions, Sessions uint
	Hardware, Firmware    Version
}

// Token calls C_GetTokenInfo.
func (m *Module) Token(slot uint) (Token, error) {
	var i C.ck_token_info
	if err := check("C_GetTokenInfo", C.ck_get_token_info(m.list, C.ck_ulong(slot), &i)); err != nil {
		return Token{}, err
	}
	t := Token{
		Label: text(i.label[:]), Manufacturer: text(i.manufacturer[:]), Model: text(i.model[:]), Serial: text(i.serial[:]),
		Flags: uint(i.flags), Sessions: uint(i.sessions), Hardware: version(i.hardware), Firmware: version(i.firmware),
	}
	// Modules say "unlimited" and "unknown" in several ways, all very large.
	if n := uint(i.max_sessions); n < 1<<31 {
		t.MaxSessions = n
	}
	return t, nil
}

// Mechanisms returns the mechanisms that the token claims. It may lie.
func (m *Module) Mechanisms(slot uint) ([]uint, error) {
	var n C.ck_ulong
	if err := check("C_GetMechanismList", C.ck_mechanisms(m.list, C.ck_ulong(slot), nil, &n)); err != nil {
		return nil, err
	}
	if n > maxList {
		return nil, fmt.Errorf("C_GetMechanismList: %d mechanisms are not believable", n)
	}
	list := make([]C.ck_ulong, n+16)
	n = C.ck_ulong(len(list))
	if err := check("C_GetMechanismList", C.ck_mechanisms(m.list, C.ck_ulong(slot), &list[0], &n)); err != nil {
		return nil, err
	}
	return numbers(list, n)
}

// Mechanism describes a mechanism of a token: key sizes and CKF_ bits.
type Mechanism struct{ MinKey, MaxKey, Flags uint }

// Mechanism calls C_GetMechanismInfo. Its flags are rubbish in some modules.
func (m *Module) Mechanism(slot, mechanism uint) (Mechanism, error) {
	var i C.ck_mechanism_info
	rv := C.ck_get_mechanism_info(m.list, C.ck_ulong(slot), C.ck_ulong(mechanism), &i)
	return Mechanism{uint(i.min), uint(i.max), uint(i.flags)}, check("C_GetMechanismInfo", rv)
}

// CloseAllSessions closes every session with the token in the slot.
func (m *Module) CloseAllSessions(slot uint) error {
	return check("C_CloseAllSessions", C.ck_close_all(m.list, C.ck_ulong(slot)))
}

// text reads a field that is padded with blanks, or wrongly with zeros.
func text(b []C.ck_byte) string {
	return strings.TrimRight(strings.ToValidUTF8(string(C.GoBytes(unsafe.Pointer(&b[0]), C.int(len(b)))), "?"), " \x00")
}

func version(v C.ck_version) Version { return Version{uint8(v.major), uint8(v.minor)} }
