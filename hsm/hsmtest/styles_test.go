package hsmtest_test

import (
	"bytes"
	"testing"

	"github.com/miekg/pkcs11"
)

// Where the vector is that a result was made with.
func TestStyles(t *testing.T) {
	r := newRig(t)
	key, caller, plaintext := r.key(), []byte("twelve bytes"), []byte("some plaintext")
	const tag = 16
	for style, find := range map[string]func(result, written []byte) (iv, ciphertext []byte){
		"written": func(result, written []byte) (iv, ciphertext []byte) { return written, result },
		"appended-12": func(result, _ []byte) (iv, ciphertext []byte) {
			return result[len(result)-12:], result[:len(result)-12]
		},
		"appended-16": func(result, _ []byte) (iv, ciphertext []byte) {
			return result[len(result)-16:], result[:len(result)-16]
		},
		"prepended-12": func(result, _ []byte) (iv, ciphertext []byte) { return result[:12], result[12:] },
		"stuck":        func(result, written []byte) (iv, ciphertext []byte) { return written, result },
		"fixed":        func(result, _ []byte) (iv, ciphertext []byte) { return []byte("a vector for all")[:12], result },
	} {
		seen := map[string]bool{}
		for range 3 {
			r.Set("iv " + style)
			iv, ciphertext := find(r.encrypt(r.session, key, caller, plaintext))
			if len(ciphertext) != len(plaintext)+tag || bytes.Equal(iv, caller) {
				t.Errorf("%s: %d bytes under vector %x", style, len(ciphertext), iv)
			}
			r.Set()
			if got, err := r.decrypt(key, iv, ciphertext); err != nil || !bytes.Equal(got, plaintext) {
				t.Errorf("%s: Decrypt: %q, %v", style, got, err)
			}
			seen[string(iv)] = true
		}
		if len(seen) != 3 && style != "fixed" && style != "stuck" {
			t.Errorf("%s: a vector came twice", style)
		}
	}
	r.Set("iv short-tag")
	ciphertext, _ := r.encrypt(r.session, key, caller, plaintext)
	if got, err := r.decrypt(key, caller, ciphertext); len(ciphertext) != len(plaintext)+12 || err != nil || !bytes.Equal(got, plaintext) {
		t.Errorf("short-tag: %d bytes; Decrypt: %q, %v", len(ciphertext), got, err)
	}
	r.Set()
	if got, err := r.decrypt(key, caller, ciphertext); err == nil {
		t.Errorf("short-tag: it opens without the rule, to %q", got)
	}
}

// An encryption keeps the style that it began with.
func TestStyleChangesInBetween(t *testing.T) {
	r := newRig(t)
	key, plaintext := r.key(), []byte("some plaintext")
	r.Set("iv prepended-12")
	m, _ := r.gcm([]byte("twelve bytes"))
	if err := r.EncryptInit(r.session, m, key); err != nil {
		t.Fatal(err)
	}
	r.Set()
	result, err := r.Encrypt(r.session, plaintext)
	if err != nil || len(result) != 12+len(plaintext)+16 {
		t.Fatalf("Encrypt: %d bytes, %v", len(result), err)
	}
	if got, err := r.decrypt(key, result[:12], result[12:]); err != nil || !bytes.Equal(got, plaintext) {
		t.Errorf("Decrypt: %q, %v", got, err)
	}
}

// Sessions that begin an encryption and never end it cost no other session its vector.
func TestManySessions(t *testing.T) {
	r := newRig(t)
	key, plaintext := r.key(), []byte("some plaintext")
	r.Set("iv appended-12")
	var last pkcs11.SessionHandle
	for i := range 400 {
		session, err := r.OpenSession(r.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			t.Fatal(err)
		}
		m, _ := r.gcm([]byte("twelve bytes"))
		if err := r.EncryptInit(session, m, key); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			if err := r.CloseSession(session); err != nil {
				t.Fatal(err)
			}
		}
		last = session
	}
	if result, err := r.Encrypt(last, plaintext); err != nil || len(result) != len(plaintext)+16+12 {
		t.Errorf("Encrypt: %d bytes, %v; want the vector with them", len(result), err)
	}
	result, _ := r.encrypt(r.session, key, []byte("twelve bytes"), plaintext)
	if len(result) != len(plaintext)+16+12 {
		t.Errorf("Encrypt: %d bytes; want the vector with them", len(result))
	}
}
