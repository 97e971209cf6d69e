package local

import (
	"bytes"
	"errors"
	"testing"
)

func FuzzParseBody(f *testing.F) {
	r := openVector(f)
	f.Add(marshalled(f, r))
	f.Add(marshalled(f, &ring{generation: 1}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := parseBody(body)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatalf("unnamed fault %v", err)
			}
			return
		}
		if len(body) <= maxBody && !bytes.Equal(marshalled(t, r), body) {
			t.Fatal("what parsed does not marshal back")
		}
	})
}

func FuzzParseFile(f *testing.F) {
	f.Add(testdata(f, "v1.keystore"), true)
	f.Add(testdata(f, "v1.backup"), false)
	f.Add([]byte(magic), true)
	f.Fuzz(func(t *testing.T, file []byte, keystore bool) {
		want := backupFile
		if keystore {
			want = keystoreFile
		}
		h, body, err := parseFile(file, want)
		if err != nil {
			return
		}
		if h.rounds > maxRounds || h.kind != want || !bytes.Equal(append(h.marshal(), body...), file) {
			t.Fatal("what parsed does not marshal back")
		}
	})
}

func FuzzUnwrap(f *testing.F) {
	r := openVector(f)
	v, err := r.version("orders", "3")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(testdata(f, "v1.wrapped"), []byte(vectorAAD))
	f.Add([]byte{wrapFormat}, []byte{})
	f.Fuzz(func(t *testing.T, wrapped, aad []byte) {
		frozen := bytes.Equal(wrapped, testdata(t, "v1.wrapped")) && string(aad) == vectorAAD
		if plain, err := v.unwrap(wrapped, aad); (err == nil) != frozen {
			t.Fatalf("got %q, %v", plain, err)
		}
	})
}
