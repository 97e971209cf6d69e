package hsm_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/kms-agent/kms-agent/hsm"
	"github.com/kms-agent/kms-agent/hsm/hsmtest"
)

// stranger runs pkcs11-tool as somebody who reaches the token and has no PIN.
func (r *rig) stranger(args ...string) {
	r.t.Helper()
	r.run("pkcs11-tool", append([]string{"--module", softHSM, "--token-label", hsmtest.Label}, args...)...)
}

// record returns the record of a key on the token.
func (r *rig) record(name string) []byte {
	r.t.Helper()
	r.tool("--read-object", "--type", "data", "--label", "kmsagent/"+name, "--output-file", r.path("record"))
	b, err := os.ReadFile(r.path("record"))
	if err != nil {
		r.t.Fatal(err)
	}
	return b
}

// Who has no PIN can make public objects on a token: a record among them is none, however
// high its revision, and no reason why those that are cannot be read or changed.
func TestPublicRecord(t *testing.T) {
	r := newRig(t)
	v := r.key("orders", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(v, m)
	later := bytes.Replace(bytes.Replace(r.record("orders"), []byte(`"revision":1,`), []byte(`"revision":9,`), 1), []byte("enabled"), []byte("disabled"), 1)
	for name, record := range map[string][]byte{"later": later, "rubbish": []byte("rubbish")} {
		r.write(name, string(record))
		r.stranger("--write-object", r.path(name), "--type", "data", "--label", "kmsagent/orders", "--application-label", "kms-agent")
	}
	if n := r.dataObjects(); n != 3 {
		t.Fatalf("%d records on the token, want that the stranger's are", n)
	}
	if keys, err := r.Keys(bounded(t)); err != nil || len(keys) != 1 || keys[0].Versions[0].State != hsm.Enabled {
		t.Errorf("Keys: %v, %v; want the one that is ours", keys, err)
	}
	k, err := r.Rotate(bounded(t), "orders", 0)
	if err != nil || k.Current != 2 {
		t.Fatalf("Rotate: %+v, %v", k, err)
	}
	r.opens(k.Versions[0], wrapped, m)
}

// A record that cannot be read is named, with what to do about it.
func TestDamagedRecord(t *testing.T) {
	r := newRig(t)
	r.write("rubbish", "rubbish")
	r.tool("--write-object", r.path("rubbish"), "--type", "data", "--private", "--label", "kmsagent/orders", "--application-label", "kms-agent")
	_, err := r.Keys(bounded(t))
	if hsm.KindOf(err) != hsm.Broken || !strings.Contains(err.Error(), `"kmsagent/orders"`) || !strings.Contains(err.Error(), "restore it") {
		t.Errorf("Keys: %v", err)
	}
}

// A public secret key with the ID of a version is none of its keys, whether that is there
// or not.
func TestPublicSecretKey(t *testing.T) {
	r := newRig(t)
	v := r.key("orders", hsm.GCM)
	m := material(32)
	wrapped := r.wrap(v, m)
	r.write("key", string(material(32)))
	id := fmt.Sprintf("%x", v.ID)
	r.stranger("--write-object", r.path("key"), "--type", "secrkey", "--key-type", "AES:32", "--id", id, "--label", "kmsagent/orders/v1")
	r.logOut() // so that the key is looked for again
	r.opens(v, wrapped, m)
	r.wrap(v, m)
	r.tool("--delete-object", "--type", "secrkey", "--id", id)
	r.tool("--delete-object", "--type", "secrkey", "--id", id)
	r.stranger("--write-object", r.path("key"), "--type", "secrkey", "--key-type", "AES:32", "--id", id, "--label", "kmsagent/orders/v1")
	r.logOut()
	_ = r.fails(v, wrapped, hsm.KeyNotFound)
}

// A key that may be taken out of the token is none that was made here.
func TestKeyThatMayBeTakenOut(t *testing.T) {
	r := newRig(t)
	v := r.key("orders", hsm.GCM)
	wrapped := r.wrap(v, material(32))
	id := fmt.Sprintf("%x", v.ID)
	r.tool("--delete-object", "--type", "secrkey", "--id", id)
	r.tool("--keygen", "--key-type", "AES:32", "--id", id, "--label", "kmsagent/orders/v1", "--private", "--extractable")
	r.logOut()
	if err := r.fails(v, wrapped, hsm.KeyUnusable); !strings.Contains(err.Error(), "taken out") {
		t.Errorf("Unwrap: %v, want that the key may be taken out", err)
	}
}

// publicKey returns the public key with the ID of a version.
func (r *rig) publicKey(v *hsm.Version) *rsa.PublicKey {
	r.t.Helper()
	r.tool("--read-object", "--type", "pubkey", "--id", fmt.Sprintf("%x", v.ID), "--output-file", r.path("public"))
	der, err := os.ReadFile(r.path("public"))
	if err != nil {
		r.t.Fatal(err)
	}
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		r.t.Fatal(err)
	}
	return key.(*rsa.PublicKey)
}

// plant makes a public key with the ID of a version, as a stranger.
func (r *rig) plant(v *hsm.Version, key *rsa.PublicKey) {
	r.t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		r.t.Fatal(err)
	}
	r.write("planted", string(der))
	r.stranger("--write-object", r.path("planted"), "--type", "pubkey", "--id", fmt.Sprintf("%x", v.ID), "--label", "kmsagent/orders/v1", "--usage-decrypt")
}

// Public keys are public objects: nothing is wrapped with one that a stranger made, and
// nobody is kept from opening by it. Without the right one nothing is wrapped.
func TestPublicKeyOfAStranger(t *testing.T) {
	other, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t)
	v := r.key("orders", hsm.OAEPSHA1)
	m := material(32)
	wrapped := r.wrap(v, m)
	right := r.publicKey(v)
	wraps := func(when string, want hsm.Kind) {
		t.Helper()
		r.logOut() // so that the keys are looked for again
		r.opens(v, wrapped, m)
		out, err := r.Wrap(bounded(t), v, nil, m, bound)
		if kindOf(err) != want {
			t.Errorf("%s: Wrap: %v, want %v", when, err, want)
		}
		if err == nil {
			r.opens(v, out, m)
		}
	}
	r.plant(v, &other.PublicKey)
	wraps("with another key beside the right one", 0)
	for range 2 {
		r.stranger("--delete-object", "--type", "pubkey", "--id", fmt.Sprintf("%x", v.ID))
	}
	wraps("without a public key", hsm.Unavailable)
	r.plant(v, &other.PublicKey)
	wraps("with another key alone", hsm.Unavailable)
	r.plant(v, &rsa.PublicKey{N: right.N, E: 3})
	wraps("with another exponent", hsm.Unavailable)
	if n := r.attached(); n != 1 {
		t.Errorf("attached %d times, want once", n)
	}
	if err := r.Verify(bounded(t), v); !hsm.OfVersion(err) {
		t.Errorf("Verify: %v, want that nothing can be wrapped", err)
	}
	_, err = r.SetState(bounded(t), "orders", 1, hsm.Disabled)
	if err == nil {
		_, err = r.Destroy(bounded(t), "orders", 1)
	}
	if err != nil {
		t.Errorf("it is not destroyed: %v", errors.Unwrap(err))
	}
}
