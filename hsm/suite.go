package hsm

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/kms-agent/kms-agent/hsm/internal/cryptoki"
)

// Suite says how a version of a key wraps. A version has one suite for life.
type Suite uint8

// The suites, in the order of preference; docs/format.md has their numbers.
const (
	// GCM is CKM_AES_GCM: authenticated by itself.
	GCM Suite = iota + 1
	// KWP is CKM_AES_KEY_WRAP_KWP (RFC 5649) over random bytes, the material and a
	// commitment to what is bound: by itself it wraps the same to the same.
	KWP
	// CBCHMAC is CKM_AES_CBC, then CKM_SHA256_HMAC under a second key.
	CBCHMAC
	// OAEP is RSA-OAEP with SHA-256 over the material and a commitment to what is
	// bound. Who has the public key can wrap, so it proves no origin.
	OAEP
	// OAEPSHA1 is OAEP with SHA-1, for tokens that have nothing else; by choice only.
	OAEPSHA1
)

// Suites returns the suites in the order in which they are preferred. OAEPSHA1 is
// not among them.
func Suites() []Suite { return []Suite{GCM, KWP, CBCHMAC, OAEP} }

func suiteNames() map[Suite]string {
	return map[Suite]string{GCM: "aes-gcm", KWP: "aes-kwp", CBCHMAC: "aes-cbc-hmac", OAEP: "rsa-oaep-sha256", OAEPSHA1: "rsa-oaep-sha1"}
}

// String returns the suite's name, as "aes-gcm".
func (s Suite) String() string {
	if name, ok := suiteNames()[s]; ok {
		return name
	}
	return fmt.Sprintf("suite %d", uint8(s))
}

// ParseSuite reads a suite's name.
func ParseSuite(name string) (Suite, error) {
	for s, n := range suiteNames() {
		if n == name {
			return s, nil
		}
	}
	return 0, fmt.Errorf("no suite %q: they are aes-gcm, aes-kwp, aes-cbc-hmac, rsa-oaep-sha256, rsa-oaep-sha1", name)
}

func (s Suite) asymmetric() bool { return s == OAEP || s == OAEPSHA1 }

// maxWraps is how many wraps a version may make in all: SP 800-38D, section 8.3,
// for random initialization vectors; 0 where there is no such limit.
func (s Suite) maxWraps() uint64 {
	if s == GCM {
		return 1 << 32
	}
	return 0
}

// IVStyle says where a token takes the initialization vector of CKM_AES_GCM from.
type IVStyle uint8

// The styles of real tokens.
const (
	// IVCaller: it is ours.
	IVCaller IVStyle = iota + 1
	// IVWritten: the token chooses it and writes it into the parameters.
	IVWritten
	// IVAppended12 and IVAppended16: the token chooses it and appends it to the
	// ciphertext.
	IVAppended12
	IVAppended16
	// IVPrepended12: the token chooses it and puts it before the ciphertext.
	IVPrepended12
	// IVChosen12: as IVAppended12, where the token must be told the length only.
	IVChosen12
)

func styleNames() []string {
	return []string{"", "caller", "written", "appended-12", "appended-16", "prepended-12", "chosen-12"}
}

// String returns the style's name.
func (s IVStyle) String() string {
	if names := styleNames(); int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("style %d", uint8(s))
}

// parseIVStyle reads a style's name; "" is none.
func parseIVStyle(name string) (IVStyle, error) {
	for i, n := range styleNames() {
		if n == name {
			return IVStyle(i), nil
		}
	}
	return 0, fmt.Errorf("no IV style %q", name)
}

// sizes of what suites add.
const (
	gcmIV, gcmTag = 12, 16
	block         = 16
	commitment    = sha256.Size
	macSize       = sha256.Size
)

// handles are the keys of one version on the token.
type handles struct {
	key    cryptoki.Object // secret or private
	mac    cryptoki.Object // of CBCHMAC
	public cryptoki.Object // of OAEP
	// modulus is the length of an RSA modulus in bytes, and so of a ciphertext; 0 where
	// the token does not tell it.
	modulus int
	epoch   int64 // of the login in which they were found
}

// errOpen says that key material does not open.
var errOpen = &Error{Kind: BadCiphertext, Detail: "this was not wrapped under this version of the key for this use, or it is damaged"}

// seal wraps w.in[:n], bound to w.aad, into w.out, and sets w.iv. It returns the
// length of the ciphertext.
func (s Suite) seal(w *worker, style IVStyle, k handles, n int) (int, error) {
	switch s {
	case GCM:
		return sealGCM(w, style, k, n)
	case KWP:
		return sealKWP(w, k, n)
	case CBCHMAC:
		return sealCBC(w, k, n)
	case OAEP, OAEPSHA1:
		p := s.oaep()
		// There are modules that say how much room they had, not how much they wrote.
		return w.session.Encrypt(k.public, &p, w.in[:w.pack(n, true)], w.out[:k.modulus])
	}
	return 0, fmt.Errorf("%v is not known", s)
}

// open unwraps w.in[:n], with the IV w.iv and bound to w.aad, and leaves the
// material in w.out.
func (s Suite) open(w *worker, k handles, n int) (int, error) {
	switch s {
	case GCM:
		p := cryptoki.GCM(w.iv, w.aad)
		got, err := w.session.Decrypt(k.key, &p, w.in[:n], w.out)
		if err == nil && got != n-gcmTag {
			return 0, fmt.Errorf("C_Decrypt: %d bytes of a ciphertext of %d", got, n)
		}
		return got, err
	case KWP:
		return openKWP(w, k, n)
	case CBCHMAC:
		return openCBC(w, k, n)
	case OAEP, OAEPSHA1:
		if k.modulus != 0 && n != k.modulus { // some modules take that for a fault of ours
			return 0, errOpen
		}
		p := s.oaep()
		return w.unpack(w.session.Decrypt(k.key, &p, w.in[:n], w.out))
	}
	return 0, fmt.Errorf("%v is not known", s)
}

// ckmKWP is CKM_AES_KEY_WRAP_KWP of PKCS#11 v3.0. CKM_AES_KEY_WRAP_PAD, which
// came before it, means different things in different modules.
const ckmKWP = 0x210B

func (s Suite) oaep() cryptoki.Parameters {
	if s == OAEPSHA1 {
		return cryptoki.OAEP(pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1)
	}
	return cryptoki.OAEP(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256)
}

// ivLength is the length of the IV that stands in wrapped key material.
func (s Suite) ivLength(style IVStyle) int {
	switch {
	case s == CBCHMAC, s == GCM && style == IVAppended16:
		return 16
	case s == GCM:
		return gcmIV
	}
	return 0
}

// fits tells whether a ciphertext can be this long.
func (s Suite) fits(n int) bool {
	switch s {
	case GCM:
		return n > gcmTag
	case KWP:
		return n >= block+block+commitment+8 && n%8 == 0
	case CBCHMAC:
		return n >= block+macSize && n%block == 0
	default:
		return n >= 128 && n <= 1024
	}
}

// gives tells whether a wrap of n bytes of material can have so many bytes. What a module
// says of that is not believed.
func (s Suite) gives(n, got int) bool {
	framed := (2 + n + block - 1) / block * block
	switch s {
	case GCM:
		return got == n+gcmTag
	case KWP:
		return got == block+framed+commitment+8
	case CBCHMAC:
		return got == framed+macSize
	default:
		return s.fits(got) // the length of the modulus
	}
}

// takes is how much material a version wraps itself; more goes by way of a key of
// one use.
func (s Suite) takes(modulus int) int {
	switch s {
	case OAEP:
		return (modulus-2*sha256.Size-2-commitment)/block*block - 2
	case OAEPSHA1:
		return (modulus-2*20-2-commitment)/block*block - 2
	case KWP:
		return 256 - 2 // tokens take keys there, and not everyone takes more
	default:
		return MaxMaterial
	}
}

func sealGCM(w *worker, style IVStyle, k handles, n int) (int, error) {
	w.iv = w.ivRoom[:gcmIV]
	clear(w.iv)
	if style == IVCaller {
		if _, err := rand.Read(w.iv); err != nil {
			return 0, err
		}
	}
	p := cryptoki.GCM(w.iv, w.aad)
	if style == IVChosen12 {
		p = cryptoki.GCMChosen(8*gcmIV, w.aad)
	}
	got, err := w.session.Encrypt(k.key, &p, w.in[:n], w.out)
	if err != nil {
		return 0, err
	}
	extra := got - n - gcmTag
	switch style {
	case IVCaller, IVWritten:
	case IVAppended12, IVAppended16, IVChosen12:
		if got -= GCM.ivLength(style); got > 0 {
			w.iv = w.ivRoom[:copy(w.ivRoom[:], w.out[got:got+GCM.ivLength(style)])]
		}
		extra -= GCM.ivLength(style)
	case IVPrepended12:
		copy(w.iv, w.out[:gcmIV])
		got = copy(w.out, w.out[gcmIV:max(got, gcmIV)])
		extra -= gcmIV
	default:
		return 0, fmt.Errorf("%v is not known", style)
	}
	if extra != 0 {
		return 0, fmt.Errorf("C_Encrypt: %d bytes more than CKM_AES_GCM with IV style %v gives", extra, style)
	}
	if allZero(w.iv) {
		return 0, errors.New("C_Encrypt: the token says that its initialization vector is all zero")
	}
	return got, nil
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// pack makes of the material w.in[:n] what mechanisms of whole blocks take: length,
// material, zeros, and with a commitment the hash of what is bound. It returns the
// length.
func (w *worker) pack(n int, commit bool) int {
	copy(w.in[2:], w.in[:n])
	binary.BigEndian.PutUint16(w.in, uint16(n))
	end := (2 + n + block - 1) / block * block
	clear(w.in[2+n : end])
	if !commit {
		return end
	}
	sum := sha256.Sum256(w.aad)
	return end + copy(w.in[end:], sum[:])
}

// unpack undoes pack with a commitment on w.out[:n].
func (w *worker) unpack(n int, err error) (int, error) {
	if err != nil {
		return 0, err
	}
	if n < block+commitment {
		return 0, errOpen
	}
	sum := sha256.Sum256(w.aad)
	if subtle.ConstantTimeCompare(sum[:], w.out[n-commitment:n]) != 1 {
		return 0, errOpen
	}
	return w.unframe(n - commitment)
}

// unframe leaves the material at the beginning of w.out.
func (w *worker) unframe(n int) (int, error) {
	if n < block || n%block != 0 {
		return 0, errOpen
	}
	size := int(binary.BigEndian.Uint16(w.out))
	if (2+size+block-1)/block*block != n || !allZero(w.out[2+size:n]) {
		return 0, errOpen
	}
	copy(w.out, w.out[2:2+size])
	clear(w.out[size:n])
	return size, nil
}

func sealKWP(w *worker, k handles, n int) (int, error) {
	n = w.pack(n, true)
	copy(w.in[block:], w.in[:n])
	if _, err := rand.Read(w.in[:block]); err != nil {
		return 0, err
	}
	p := cryptoki.None(ckmKWP)
	return w.session.Encrypt(k.key, &p, w.in[:block+n], w.out)
}

func openKWP(w *worker, k handles, n int) (int, error) {
	p := cryptoki.None(ckmKWP)
	n, err := w.session.Decrypt(k.key, &p, w.in[:n], w.out)
	if err != nil {
		return 0, err
	}
	if n < block {
		return 0, errOpen
	}
	copy(w.out, w.out[block:n])
	clear(w.out[n-block : n])
	return w.unpack(n-block, nil)
}

func sealCBC(w *worker, k handles, n int) (int, error) {
	w.iv = w.ivRoom[:block]
	if _, err := rand.Read(w.iv); err != nil {
		return 0, err
	}
	n = w.pack(n, false)
	p := cryptoki.IV(pkcs11.CKM_AES_CBC, w.iv)
	got, err := w.session.Encrypt(k.key, &p, w.in[:n], w.out)
	if err != nil {
		return 0, err
	}
	if got != n {
		return 0, fmt.Errorf("C_Encrypt: %d bytes of CKM_AES_CBC over %d", got, n)
	}
	return w.mac(k, w.out[:n], w.out[n:])
}

// mac writes the MAC over what is bound, the IV and the ciphertext to out. It
// returns the length of both.
func (w *worker) mac(k handles, ciphertext, out []byte) (int, error) {
	w.aad = append(append(w.aad, w.iv...), ciphertext...)
	n, err := w.session.Sign(k.mac, pkcs11.CKM_SHA256_HMAC, w.aad, out)
	if err != nil {
		return 0, err
	}
	if n != macSize {
		return 0, fmt.Errorf("C_Sign: %d bytes of CKM_SHA256_HMAC", n)
	}
	return len(ciphertext) + n, nil
}

func openCBC(w *worker, k handles, n int) (int, error) {
	end := n - macSize
	if _, err := w.mac(k, w.in[:end], w.out); err != nil {
		return 0, err
	}
	if subtle.ConstantTimeCompare(w.out[:macSize], w.in[end:n]) != 1 {
		return 0, errOpen
	}
	p := cryptoki.IV(pkcs11.CKM_AES_CBC, w.iv)
	got, err := w.session.Decrypt(k.key, &p, w.in[:end], w.out)
	if err != nil {
		return 0, err
	}
	return w.unframe(got)
}
