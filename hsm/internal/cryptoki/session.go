package cryptoki

/*
#include "cryptoki.h"
*/
import "C"

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// Session is an open session. It is used by one goroutine at a time.
type Session struct {
	list   *C.ck_functions
	handle C.ck_ulong
}

// Object is a handle of an object, as long as its session's application lives.
type Object uint

// Open opens a session with the token in the slot. Sessions are always able to
// write: some modules have no others.
func (m *Module) Open(slot uint) (Session, error) {
	s := Session{list: m.list}
	rv := C.ck_open_session(m.list, C.ck_ulong(slot), pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION, &s.handle)
	return s, check("C_OpenSession", rv)
}

// Close closes the session.
func (s Session) Close() error {
	return check("C_CloseSession", C.ck_close_session(s.list, s.handle))
}

// State returns the session's CKS_ state.
func (s Session) State() (uint, error) {
	var i C.ck_session_info
	rv := C.ck_get_session_info(s.list, s.handle, &i)
	return uint(i.state), check("C_GetSessionInfo", rv)
}

// Login logs the application in as the user. The PIN is not copied.
func (s Session) Login(pin []byte) error {
	return check("C_Login", C.ck_login(s.list, s.handle, pointer(pin), C.ck_ulong(len(pin))))
}

// Attribute is an attribute of an object, its value as the module holds it.
type Attribute struct {
	Type  uint
	Value []byte
}

// Bool returns an attribute of type CK_BBOOL.
func Bool(kind uint, value bool) Attribute {
	a := Attribute{kind, []byte{0}}
	if value {
		a.Value[0] = 1
	}
	return a
}

// Number returns an attribute of type CK_ULONG.
func Number(kind, value uint) Attribute {
	return Attribute{kind, binary.NativeEndian.AppendUint64(nil, uint64(value))[:unsafe.Sizeof(C.ck_ulong(0))]}
}

// Text returns an attribute of characters.
func Text(kind uint, value string) Attribute { return Attribute{kind, []byte(value)} }

// ReadNumber reads the value of an attribute of type CK_ULONG.
func ReadNumber(value []byte) (uint, error) {
	if len(value) != int(unsafe.Sizeof(C.ck_ulong(0))) {
		return 0, fmt.Errorf("a number of %d bytes", len(value))
	}
	return uint(binary.NativeEndian.Uint64(value)), nil
}

// template is a list of attributes as the C side takes it.
type template struct {
	n           C.ck_ulong
	types, lens []C.ck_ulong
	values      []byte
}

func flatten(attributes []Attribute) (template, error) {
	if len(attributes) > C.CK_MAX_ATTRIBUTES {
		return template{}, fmt.Errorf("%d attributes, at most %d are possible", len(attributes), C.CK_MAX_ATTRIBUTES)
	}
	// One more than needed each, so that there is a first.
	t := template{
		n: C.ck_ulong(len(attributes)), types: make([]C.ck_ulong, len(attributes)+1), lens: make([]C.ck_ulong, len(attributes)+1),
	}
	for i, a := range attributes {
		t.types[i], t.lens[i] = C.ck_ulong(a.Type), C.ck_ulong(len(a.Value))
		t.values = append(t.values, a.Value...)
	}
	t.values = append(t.values, 0)
	return t, nil
}

// Create creates an object, which must hold no secret: the attributes are copied.
func (s Session) Create(attributes []Attribute) (Object, error) {
	t, err := flatten(attributes)
	if err != nil {
		return 0, err
	}
	var object C.ck_ulong
	rv := C.ck_create_object(s.list, s.handle, t.n, &t.types[0], &t.lens[0], pointer(t.values), &object)
	return Object(object), check("C_CreateObject", rv)
}

// Destroy destroys an object.
func (s Session) Destroy(object Object) error {
	return check("C_DestroyObject", C.ck_destroy_object(s.list, s.handle, C.ck_ulong(object)))
}

// ErrNoAttribute says that the object has no such attribute, or does not show it.
var ErrNoAttribute = errors.New("the object has no such attribute or does not show it")

// maxAttribute is how many bytes an attribute may have.
const maxAttribute = 64 << 10

// Attribute reads an attribute.
func (s Session) Attribute(object Object, kind uint) ([]byte, error) {
	for room := 512; ; room = maxAttribute {
		value := make([]byte, room)
		n := C.ck_ulong(room)
		rv := C.ck_get_attribute(s.list, s.handle, C.ck_ulong(object), C.ck_ulong(kind), pointer(value), &n)
		switch {
		case rv == pkcs11.CKR_BUFFER_TOO_SMALL && room < maxAttribute:
			continue
		case rv == pkcs11.CKR_ATTRIBUTE_TYPE_INVALID || rv == pkcs11.CKR_ATTRIBUTE_SENSITIVE || rv == 0 && n == ^C.ck_ulong(0):
			return nil, ErrNoAttribute
		case rv != 0:
			return nil, check("C_GetAttributeValue", rv)
		case n > C.ck_ulong(room):
			return nil, fmt.Errorf("C_GetAttributeValue: %d bytes where %d had room", n, room)
		}
		return value[:n], nil
	}
}

// SetAttributes changes attributes.
func (s Session) SetAttributes(object Object, attributes []Attribute) error {
	t, err := flatten(attributes)
	if err != nil {
		return err
	}
	rv := C.ck_set_attributes(s.list, s.handle, C.ck_ulong(object), t.n, &t.types[0], &t.lens[0], pointer(t.values))
	return check("C_SetAttributeValue", rv)
}

// Find returns the objects with the attributes, at most limit.
func (s Session) Find(attributes []Attribute, limit int) ([]Object, error) {
	t, err := flatten(attributes)
	if err != nil {
		return nil, err
	}
	found := make([]C.ck_ulong, max(limit, 1))
	n := C.ck_ulong(len(found))
	rv := C.ck_find(s.list, s.handle, t.n, &t.types[0], &t.lens[0], pointer(t.values), &found[0], &n)
	if err := check("C_FindObjects", rv); err != nil {
		return nil, err
	}
	list, err := numbers(found, n)
	if err != nil {
		return nil, fmt.Errorf("C_FindObjects: %w", err)
	}
	objects := make([]Object, len(list))
	for i, h := range list {
		objects[i] = Object(h)
	}
	return objects, nil
}

// GenerateKey generates a secret key.
func (s Session) GenerateKey(mechanism uint, attributes []Attribute) (Object, error) {
	t, err := flatten(attributes)
	if err != nil {
		return 0, err
	}
	var key C.ck_ulong
	rv := C.ck_generate_key(s.list, s.handle, C.ck_ulong(mechanism), t.n, &t.types[0], &t.lens[0], pointer(t.values), &key)
	return Object(key), check("C_GenerateKey", rv)
}

// GenerateKeyPair generates a pair of keys.
func (s Session) GenerateKeyPair(mechanism uint, public, private []Attribute) (publicKey, privateKey Object, err error) {
	a, err := flatten(public)
	if err != nil {
		return 0, 0, err
	}
	b, err := flatten(private)
	if err != nil {
		return 0, 0, err
	}
	var first, second C.ck_ulong
	rv := C.ck_generate_pair(s.list, s.handle, C.ck_ulong(mechanism), a.n, &a.types[0], &a.lens[0], pointer(a.values),
		b.n, &b.types[0], &b.lens[0], pointer(b.values), &first, &second)
	return Object(first), Object(second), check("C_GenerateKeyPair", rv)
}

// Random fills out with the token's random bytes.
func (s Session) Random(out []byte) error {
	if len(out) == 0 {
		return nil
	}
	return check("C_GenerateRandom", C.ck_random(s.list, s.handle, pointer(out), C.ck_ulong(len(out))))
}

// pointer returns where b begins, nil where it is empty.
func pointer(b []byte) *C.ck_byte {
	if len(b) == 0 {
		return nil
	}
	return (*C.ck_byte)(unsafe.Pointer(&b[0]))
}
