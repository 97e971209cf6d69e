package plugins

import (
	"bytes"
	"crypto/ecdh"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"slices"
	"testing"

	pluginv1 "github.com/kms-agent/kms-agent/api/plugin/v1"
)

// fixedKey is a private key that a seed names; for tests alone.
func fixedKey(t testing.TB, seed string) *ecdh.PrivateKey {
	t.Helper()
	scalar := sha256.Sum256([]byte(seed))
	key, err := ecdh.P256().NewPrivateKey(scalar[:])
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sessions(t testing.TB) (host, process *session) {
	t.Helper()
	hostKey, processKey := fixedKey(t, "host"), fixedKey(t, "plugin")
	host, err := newSession(hostKey, processKey.PublicKey().Bytes(), true)
	if err != nil {
		t.Fatal(err)
	}
	process, err = newSession(processKey, hostKey.PublicKey().Bytes(), false)
	if err != nil {
		t.Fatal(err)
	}
	return host, process
}

func testBinding() Binding {
	return Binding{Purpose: "message", ProviderInfo: []byte("info"), ContextBound: true, Context: map[string]string{"a": "b"}}
}

func TestSessionOpensWhatTheOtherSideSealed(t *testing.T) {
	host, process := sessions(t)
	key := KeyRef{URI: "local:orders", Version: "3"}
	for _, size := range []int{1, 32, MaxMaterialSize} {
		want := bytes.Repeat([]byte{7}, size)
		sealed, err := host.seal(host.toPlugin, want, wrapAAD(key, testBinding()))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(sealed.GetCiphertext(), want) && size > 16 {
			t.Error("sealed material stands in clear")
		}
		got, err := process.open(process.toPlugin, sealed, wrapAAD(key, testBinding()))
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes: got %x and %v, want what was sealed", size, got, err)
		}
	}
}

func TestSessionBindsDirectionMethodAndRequest(t *testing.T) {
	host, process := sessions(t)
	key, b, ciphertext := KeyRef{URI: "local:orders", Version: "3"}, testBinding(), []byte("ciphertext")
	sealed, err := process.seal(process.toHost, []byte("data key"), unwrapAAD(key, ciphertext, b))
	if err != nil {
		t.Fatal(err)
	}
	other := b
	other.Purpose = "wrap"
	for name, aad := range map[string][]byte{
		"another method":     wrapAAD(key, b),
		"another key":        unwrapAAD(KeyRef{URI: "local:other", Version: "3"}, ciphertext, b),
		"another version":    unwrapAAD(KeyRef{URI: "local:orders", Version: "4"}, ciphertext, b),
		"moved bytes":        unwrapAAD(KeyRef{URI: "local:order", Version: "s3"}, ciphertext, b),
		"another ciphertext": unwrapAAD(key, []byte("ciphertexu"), b),
		"another binding":    unwrapAAD(key, ciphertext, other),
	} {
		if got, err := host.open(host.toHost, sealed, aad); !errors.Is(err, errUnseal) || got != nil {
			t.Errorf("%s: got %x and %v, want errUnseal", name, got, err)
		}
	}
	if _, err := host.open(host.toPlugin, sealed, unwrapAAD(key, ciphertext, b)); !errors.Is(err, errUnseal) {
		t.Errorf("the other direction's key: got %v, want errUnseal", err)
	}
	if _, err := host.open(host.toHost, sealed, unwrapAAD(key, ciphertext, b)); err != nil {
		t.Errorf("the right request: %v", err)
	}
}

const (
	vectorNonce      = "59a0df3cbdd0c3c5ef0c6d2d"
	vectorCiphertext = "94efaae5473378393f72624aa8b2f5070507594f76cc3804aea1e807e6c8e41419a56b5f12098381596c4c8ce083a160"
)

// Frozen, and sealed by another implementation (Python): a plugin in another
// language derives the same keys.
func TestSessionVector(t *testing.T) {
	_, process := sessions(t)
	aad := wrapAAD(KeyRef{URI: "local:orders", Version: "3"}, testBinding())
	sealed := &pluginv1.Sealed{Nonce: unhex(t, vectorNonce), Ciphertext: unhex(t, vectorCiphertext)}
	got, err := process.open(process.toPlugin, sealed, aad)
	if want := "0123456789abcdef0123456789abcdef"; err != nil || string(got) != want {
		t.Errorf("got %q and %v, want %q", got, err, want)
	}
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSessionRefusesBadPublicKeys(t *testing.T) {
	own := fixedKey(t, "host")
	good := fixedKey(t, "plugin").PublicKey().Bytes()
	offCurve := slices.Clone(good)
	offCurve[64] ^= 1
	for name, peer := range map[string][]byte{
		"none": nil, "the point at infinity": {0}, "not on the curve": offCurve, "short": good[:64], "long": append(slices.Clone(good), 0),
	} {
		if _, err := newSession(own, peer, true); err == nil {
			t.Errorf("public key %s: accepted", name)
		}
	}
}

func TestSessionEndsBeforeItsKeyIsWorn(t *testing.T) {
	host, _ := sessions(t)
	host.seals.Store(maxSeals - 1)
	if _, err := host.seal(host.toPlugin, []byte{1}, nil); err != nil {
		t.Errorf("the last use: %v", err)
	}
	if _, err := host.seal(host.toPlugin, []byte{1}, nil); !errors.Is(err, errSeal) {
		t.Errorf("one use more: got %v, want errSeal", err)
	}
}

func FuzzSessionOpen(f *testing.F) {
	host, process := sessions(f)
	aad := wrapAAD(KeyRef{URI: "local:orders", Version: "3"}, testBinding())
	sealed, err := host.seal(host.toPlugin, []byte("data key"), aad)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sealed.GetNonce(), sealed.GetCiphertext())
	f.Add([]byte{}, []byte{})
	f.Add(make([]byte, 12), make([]byte, 16))
	f.Add(make([]byte, 13), make([]byte, MaxMaterialSize+17))
	f.Fuzz(func(t *testing.T, nonce, ciphertext []byte) {
		got, err := process.open(process.toPlugin, &pluginv1.Sealed{Nonce: nonce, Ciphertext: ciphertext}, aad)
		// Only the seed opens, and workers have seeds of their own.
		if err == nil && string(got) != "data key" || err != nil && got != nil {
			t.Errorf("got %x and %v", got, err)
		}
	})
}
