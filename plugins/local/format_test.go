package local

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/fips140"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kms-agent/kms-agent/plugins"
)

// The frozen files of testdata are sealed by this key file and passphrase.
const (
	vectorPassphrase = "correct horse battery staple"
	vectorPlaintext  = "thirty-two bytes of a data key!!"
	vectorAAD        = "bound to this"
)

func vectorKey() []byte {
	b := make([]byte, SealKeySize)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}

func vectorSeals(t testing.TB) (key, passphrase Seal) {
	t.Helper()
	dir := t.TempDir()
	key, passphrase = Seal{KeyFile: filepath.Join(dir, "key")}, Seal{PassphraseFile: filepath.Join(dir, "phrase")}
	for path, content := range map[string][]byte{key.KeyFile: vectorKey(), passphrase.PassphraseFile: []byte(vectorPassphrase + "\n")} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return key, passphrase
}

func testdata(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func openVector(t testing.TB) *ring {
	t.Helper()
	seal, _ := vectorSeals(t)
	u := &unlocker{seal: seal}
	t.Cleanup(u.close)
	r, _, err := u.open(testdata(t, "v1.keystore"), keystoreFile)
	if err != nil {
		t.Fatalf("frozen keystore: %v", err)
	}
	t.Cleanup(r.free)
	return r
}

func TestFrozenFiles(t *testing.T) {
	r := openVector(t)
	var got []string
	for _, k := range r.keys {
		for i, v := range k.versions {
			got = append(got, VersionRef{Name: k.name, Version: string(rune('1' + i))}.String()+" "+v.state.String())
		}
	}
	want := []string{"orders version 1 destroyed", "orders version 2 disabled", "orders version 3 enabled", "shop/archive version 1 enabled"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("frozen keystore (-want +got):\n%s", diff)
	}
	v, err := r.version("orders", "3")
	if err != nil {
		t.Fatal(err)
	}
	plain, err := v.unwrap(testdata(t, "v1.wrapped"), []byte(vectorAAD))
	if err != nil || string(plain) != vectorPlaintext {
		t.Errorf("frozen wrapped key: got %q, %v", plain, err)
	}
	_, phrase := vectorSeals(t)
	backup, err := readBackup(bytes.NewReader(testdata(t, "v1.backup")), phrase)
	if err != nil {
		t.Fatalf("frozen backup: %v", err)
	}
	defer backup.free()
	if !bytes.Equal(marshalled(t, backup), marshalled(t, r)) {
		t.Error("frozen backup and keystore differ")
	}
}

func marshalled(t testing.TB, r *ring) []byte {
	t.Helper()
	m, err := r.marshal()
	if err != nil {
		t.Fatal(err)
	}
	defer m.free()
	return bytes.Clone(m.data)
}

// expand is HKDF-Expand-SHA-256 (RFC 5869) for two blocks, written out.
func expand(prk []byte, info string) []byte {
	var out, block []byte
	for i := byte(1); i <= 2; i++ {
		m := hmac.New(sha256.New, prk)
		m.Write(block)
		m.Write([]byte(info))
		m.Write([]byte{i})
		block = m.Sum(nil)
		out = append(out, block...)
	}
	return out
}

func gcmOpen(t *testing.T, key, nonceAndBody, aad []byte) []byte {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	var gcm cipher.AEAD
	fips140.WithoutEnforcement(func() { gcm, err = cipher.NewGCM(block) }) // it only opens
	if err != nil {
		t.Fatal(err)
	}
	plain, err := gcm.Open(nil, nonceAndBody[:12], nonceAndBody[12:], aad)
	if err != nil {
		t.Fatal(err)
	}
	return plain
}

// The frozen files open by what docs/local-backend.md says alone, at the
// offsets that it gives, without this package's code.
func TestDocumentedFormat(t *testing.T) {
	stretched, err := pbkdf2.Key(sha512.New, vectorPassphrase, testdata(t, "v1.backup")[16:48], 210_000, 32)
	if err != nil {
		t.Fatal(err)
	}
	var body []byte
	for name, secret := range map[string][]byte{"v1.keystore": vectorKey(), "v1.backup": stretched} {
		file := testdata(t, name)
		extract := hmac.New(sha256.New, file[48:80])
		extract.Write(secret)
		okm := expand(extract.Sum(nil), "kms-agent local keystore 1")
		if !bytes.Equal(okm[32:], file[80:112]) {
			t.Errorf("%s: check value differs", name)
		}
		if got, want := int(binary.BigEndian.Uint32(file[112:116])), len(file)-116; got != want {
			t.Errorf("%s: body length %d, want %d", name, got, want)
		}
		body = gcmOpen(t, okm[:32], file[116:], file[:116])
	}
	// keystore ID 16, generation 8, updated 8, count 2; "orders": 1+6+2;
	// version 1 (destroyed) 25, version 2 57, version 3
	third := body[34+9+25+57:]
	if third[0] != 1 {
		t.Fatalf("state of orders version 3: got %d, want 1", third[0])
	}
	keyID, kek := third[9:25], third[25:57]
	wrapped := testdata(t, "v1.wrapped")
	if wrapped[0] != 1 || !bytes.Equal(wrapped[1:17], keyID) {
		t.Fatalf("wrapped key begins % x, want 01 and % x", wrapped[:17], keyID)
	}
	okm := expand(kek, "kms-agent local wrap 1"+string(keyID)+string(wrapped[17:49]))
	if !bytes.Equal(okm[32:], wrapped[49:81]) {
		t.Error("commitment differs")
	}
	if plain := gcmOpen(t, okm[:32], wrapped[81:], []byte(vectorAAD)); string(plain) != vectorPlaintext {
		t.Errorf("unwrapped %q", plain)
	}
}

// Every flipped bit and every length of a file is refused, as one of the
// faults that a reader is told about.
func TestEveryDamageIsRefused(t *testing.T) {
	seal, _ := vectorSeals(t)
	u := &unlocker{seal: seal}
	defer u.close()
	file := testdata(t, "v1.keystore")
	refused := func(what string, at int, damaged []byte) {
		r, _, err := u.open(damaged, keystoreFile)
		if err == nil {
			r.free()
			t.Fatalf("%s at %d: opened", what, at)
		}
		for _, known := range []error{ErrForeign, ErrNewer, ErrTruncated, ErrDamaged, ErrWrongSeal} {
			if errors.Is(err, known) && strings.Contains(err.Error(), ": ") {
				return
			}
		}
		t.Fatalf("%s at %d: unnamed fault %v", what, at, err)
	}
	for i := range len(file) * 8 {
		damaged := bytes.Clone(file)
		damaged[i/8] ^= 1 << (i % 8)
		refused("bit flip", i, damaged)
	}
	for n := range file {
		refused("truncation", n, file[:n])
	}
	refused("appended byte", len(file), append(bytes.Clone(file), 0))
}

func TestWrapRefusesEveryDamage(t *testing.T) {
	r := openVector(t)
	v, err := r.version("orders", "3")
	if err != nil {
		t.Fatal(err)
	}
	wrapped, aad := testdata(t, "v1.wrapped"), []byte(vectorAAD)
	refused := func(what string, at int, wrapped, aad []byte) {
		if plain, err := v.unwrap(wrapped, aad); !errors.Is(err, errOpen) || plain != nil {
			t.Fatalf("%s at %d: got %q, %v", what, at, plain, err)
		}
	}
	for i := range len(wrapped) * 8 {
		damaged := bytes.Clone(wrapped)
		damaged[i/8] ^= 1 << (i % 8)
		refused("bit flip", i, damaged, aad)
	}
	for n := range wrapped {
		refused("truncation", n, wrapped[:n], aad)
	}
	refused("appended byte", len(wrapped), append(bytes.Clone(wrapped), 0), aad)
	refused("other binding", 0, wrapped, []byte("bound to that"))
	refused("no binding", 0, wrapped, nil)
	refused("too long", 0, append(bytes.Clone(wrapped), make([]byte, plugins.MaxMaterialSize)...), aad)
	v, _ = r.version("orders", "2")
	refused("other version", 0, wrapped, aad)
}

func TestWrapIsFresh(t *testing.T) {
	r := openVector(t)
	v, _ := r.version("orders", "3")
	seen := map[string]bool{}
	for range 100 {
		wrapped, err := v.wrap([]byte(vectorPlaintext), nil)
		if err != nil || len(wrapped) != len(vectorPlaintext)+WrapOverhead {
			t.Fatalf("wrap: %d bytes, %v", len(wrapped), err)
		}
		for _, part := range []string{string(wrapped[17:49]), string(wrapped[49:81]), string(wrapped[81:93])} {
			if seen[part] {
				t.Fatal("salt, commitment or nonce came twice")
			}
			seen[part] = true
		}
	}
}

// No key seals two files: each has its own HKDF salt, and a backup its own
// PBKDF2 salt.
func TestEveryFileHasItsOwnKey(t *testing.T) {
	r := openVector(t)
	for _, seal := range both(vectorSeals(t)) {
		u := &unlocker{seal: seal}
		defer u.close()
		like, seen := u.newHeader(backupFile), map[[saltSize]byte]bool{}
		if seal.kind() == sealPassphrase && like.stretchSalt == u.newHeader(backupFile).stretchSalt {
			t.Error("PBKDF2 salt came twice")
		}
		for range 10 {
			file, err := u.sealRing(r, like)
			if err != nil {
				t.Fatal(err)
			}
			h, _, err := parseFile(file, backupFile)
			if err != nil || seen[h.salt] {
				t.Fatalf("HKDF salt came twice, or %v", err)
			}
			seen[h.salt] = true
		}
	}
}

func both(a, b Seal) []Seal { return []Seal{a, b} }

// Bodies that authenticate and still break a rule: only a broken writer makes
// them, and a reader refuses them.
func TestBodyRules(t *testing.T) {
	good := func() *ring {
		v := func(b byte) version {
			return version{state: Enabled, id: [idSize]byte{b}, material: bytes.Repeat([]byte{b}, keySize)}
		}
		return &ring{generation: 1, keys: []key{{name: "a", versions: []version{v(1), v(2)}}, {name: "b", versions: []version{v(3)}}}}
	}
	for what, spoil := range map[string]func(r *ring){
		"generation 0":  func(r *ring) { r.generation = 0 },
		"time":          func(r *ring) { r.updated = maxTime + 1 },
		"creation time": func(r *ring) { r.keys[0].versions[0].created = -1 },
		"order":         func(r *ring) { r.keys[0], r.keys[1] = r.keys[1], r.keys[0] },
		"same name":     func(r *ring) { r.keys[1].name = "a" },
		"name":          func(r *ring) { r.keys[1].name = "B" },
		"empty name":    func(r *ring) { r.keys[0].name = "" },
		"no versions":   func(r *ring) { r.keys[1].versions = nil },
		"state 0":       func(r *ring) { r.keys[1].versions[0].state = 0 },
		"state 4":       func(r *ring) { r.keys[1].versions[0].state = 4 },
		"key ID twice":  func(r *ring) { r.keys[1].versions[0].id = r.keys[0].versions[0].id },
		"many versions": func(r *ring) {
			one := r.keys[0].versions[0]
			for i := range MaxVersions + 1 {
				one.id = [idSize]byte{9, byte(i >> 8), byte(i)}
				r.keys[0].versions = append(r.keys[0].versions, one)
			}
		},
		"destroyed with key": func(r *ring) { r.keys[0].versions[0].state = Destroyed },
		"enabled without":    func(r *ring) { r.keys[0].versions[0].material = nil },
	} {
		r := good()
		if _, err := parseBody(marshalled(t, r)); err != nil {
			t.Fatalf("good body: %v", err)
		}
		spoil(r)
		if _, err := parseBody(marshalled(t, r)); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: got %v, want ErrDamaged", what, err)
		}
	}
	if _, err := parseBody(append(marshalled(t, good()), 0)); !errors.Is(err, ErrDamaged) {
		t.Errorf("trailing byte: got %v, want ErrDamaged", err)
	}
}

func TestLimits(t *testing.T) {
	r := &ring{generation: 1, keys: make([]key, MaxKeys)}
	for i := range r.keys {
		r.keys[i] = key{name: strings.Repeat("a", 128), versions: make([]version, 100)}
	}
	if _, err := r.marshal(); !errors.Is(err, ErrLimit) {
		t.Errorf("marshal: got %v, want ErrLimit", err)
	}
	if err := r.create("b"); !errors.Is(err, ErrLimit) {
		t.Errorf("create beyond MaxKeys: got %v, want ErrLimit", err)
	}
	r.keys = []key{{name: "a", versions: make([]version, MaxVersions)}}
	if _, err := r.rotate("a"); !errors.Is(err, ErrLimit) {
		t.Errorf("rotate beyond MaxVersions: got %v, want ErrLimit", err)
	}
}
