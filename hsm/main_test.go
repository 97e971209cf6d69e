package hsm_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/kms-agent/kms-agent/hsm"
)

type pin string

func (p pin) Attempt(_ hsm.TokenInfo, log func([]byte) error) error { return log([]byte(p)) }
func (p pin) Changed(ctx context.Context) error                     { <-ctx.Done(); return ctx.Err() }

func softhsm(t testing.TB) {
	dir := t.TempDir()
	conf := filepath.Join(dir, "softhsm2.conf")
	_ = os.Mkdir(filepath.Join(dir, "tokens"), 0o700)
	_ = os.WriteFile(conf, []byte(fmt.Sprintf("directories.tokendir = %s/tokens\nobjectstore.backend = file\nlog.level = ERROR\n", dir)), 0o600)
	t.Setenv("SOFTHSM2_CONF", conf)
	if out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", "kms", "--so-pin", "so1234", "--pin", "user1234").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
}

func TestWalk(t *testing.T) {
	softhsm(t)
	tok, err := hsm.Open(hsm.Config{Module: "/usr/lib/softhsm/libsofthsm2.so", Token: hsm.URI{Token: "kms"}, Login: pin("user1234"),
		Events: func(e hsm.Event) { t.Logf("%+v", e) }})
	if err != nil {
		t.Fatal(err)
	}
	defer tok.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	p, err := tok.Probe(ctx)
	t.Logf("%+v %v", p, err)
	k, err := tok.CreateKey(ctx, "orders", 0)
	if err != nil {
		t.Fatal(err)
	}
	v := k.Versions[0]
	for _, size := range []int{1, 32, 255, 4096} {
		w, err := tok.Wrap(ctx, v, nil, bytes.Repeat([]byte{7}, size), []byte("aad"))
		if err != nil {
			t.Fatal(err)
		}
		out, err := tok.Unwrap(ctx, v, nil, w, []byte("aad"))
		if err != nil || !bytes.Equal(out, bytes.Repeat([]byte{7}, size)) {
			t.Fatal(size, err, out)
		}
		if _, err := tok.Unwrap(ctx, v, nil, w, []byte("aae")); hsm.KindOf(err) != hsm.BadCiphertext {
			t.Error(err)
		}
	}
	if k, err = tok.Rotate(ctx, "orders", 0); err != nil || k.Current != 2 {
		t.Fatal(err)
	}
	if _, err := tok.CreateKey(ctx, "rsa", hsm.OAEPSHA1); err != nil {
		t.Error(err)
	}
	k, err = tok.CreateKey(ctx, "cbc", hsm.CBCHMAC)
	if err != nil {
		t.Fatal(err)
	}
	w, err := tok.Wrap(ctx, k.Versions[0], nil, bytes.Repeat([]byte{7}, 4096), []byte("aad"))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := tok.Unwrap(ctx, k.Versions[0], nil, w, []byte("aad")); err != nil || len(out) != 4096 {
		t.Fatal(err)
	}
	ks, err := tok.Keys(ctx)
	t.Log(len(ks), err)
}

func BenchmarkPair(b *testing.B) {
	softhsm(b)
	tok, err := hsm.Open(hsm.Config{Module: "/usr/lib/softhsm/libsofthsm2.so", Token: hsm.URI{Token: "kms"}, Login: pin("user1234")})
	if err != nil {
		b.Fatal(err)
	}
	defer tok.Close()
	ctx, cancel := context.WithTimeout(b.Context(), 60*time.Second)
	defer cancel()
	k, err := tok.CreateKey(ctx, "orders", 0)
	if err != nil {
		b.Fatal(err)
	}
	dek, w, o := make([]byte, 32), make([]byte, 0, 200), make([]byte, 0, 200)
	b.ReportAllocs()
	for b.Loop() {
		if w, err = tok.Wrap(ctx, k.Versions[0], w[:0], dek, dek); err != nil {
			b.Fatal(err)
		}
		if o, err = tok.Unwrap(ctx, k.Versions[0], o[:0], w, dek); err != nil {
			b.Fatal(err)
		}
	}
}
