package local_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kms-agent/kms-agent/plugins"
	"github.com/kms-agent/kms-agent/plugins/local"
)

var (
	dataKey = []byte("thirty-two bytes of a data key!!")
	binding = plugins.Binding{Purpose: "message", ProviderInfo: []byte("info"), ContextBound: true, Context: map[string]string{"tenant": "a"}}
	orders1 = plugins.KeyRef{URI: "local:orders", Version: "1"}
)

func config(t testing.TB, path string, seal local.Seal) json.RawMessage {
	t.Helper()
	b, err := json.Marshal(map[string]any{"keystore": path, "seal": seal})
	must(t, err)
	return b
}

func openBackend(t testing.TB, path string, seal local.Seal) *local.Backend {
	t.Helper()
	b := local.New()
	t.Cleanup(func() { _ = b.Close() })
	info, err := b.Open(context.Background(), config(t, path, seal))
	must(t, err)
	if info.Name != "local" || info.Version == "" || info.FIPS140 == "" {
		t.Fatalf("Open: got %+v", info)
	}
	return b
}

func wrap(t testing.TB, b *local.Backend, ref plugins.KeyRef) []byte {
	t.Helper()
	wrapped, err := b.Wrap(t.Context(), ref, dataKey, binding)
	must(t, err)
	return wrapped
}

// wantClass fails unless err is of class and says each text.
func wantClass(t testing.TB, what string, err error, class plugins.Class, texts ...string) {
	t.Helper()
	if err == nil || plugins.ClassOf(err) != class {
		t.Errorf("%s: got %v, want class %s", what, err, class)
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%s: error does not say %q: %v", what, text, err)
		}
	}
}

func TestWrapUnwrap(t *testing.T) {
	seal := keyFile(t)
	b := openBackend(t, newStore(t, seal, "orders").Path(), seal)
	for _, size := range []int{1, 32, 4096} {
		plain := bytes.Repeat([]byte{7}, size)
		wrapped, err := b.Wrap(t.Context(), orders1, plain, binding)
		must(t, err)
		got, err := b.Unwrap(t.Context(), orders1, wrapped, binding)
		must(t, err)
		if !bytes.Equal(got, plain) || !bytes.Equal(plain, bytes.Repeat([]byte{7}, size)) {
			t.Errorf("%d bytes did not come back, or were changed", size)
		}
	}
	_, err := b.Wrap(t.Context(), orders1, nil, binding)
	wantClass(t, "wrap nothing", err, plugins.Invalid, "1 to 4096")
	_, err = b.Wrap(t.Context(), orders1, make([]byte, 4097), binding)
	wantClass(t, "wrap too much", err, plugins.Invalid, "1 to 4096")
}

func TestErrorClasses(t *testing.T) {
	seal := keyFile(t)
	k := newStore(t, seal, "orders", "other")
	for range 2 {
		_, err := k.Rotate("orders")
		must(t, err)
	}
	b := openBackend(t, k.Path(), seal)
	wrapped := wrap(t, b, orders1)
	must(t, k.Disable("orders", "2"), k.Disable("orders", "3"), k.Destroy("orders", "3"))
	for _, c := range []struct {
		ref   plugins.KeyRef
		class plugins.Class
		text  string
	}{
		{plugins.KeyRef{URI: "local:missing", Version: "1"}, plugins.KeyNotFound, "missing"},
		{plugins.KeyRef{URI: "local:orders", Version: "4"}, plugins.KeyNotFound, "1 to 3"},
		{plugins.KeyRef{URI: "local:orders", Version: "01"}, plugins.KeyNotFound, "1 to 3"},
		{plugins.KeyRef{URI: "local:orders"}, plugins.Invalid, "Describe"},
		{plugins.KeyRef{URI: "local:orders", Version: "2"}, plugins.KeyUnusable, "disabled: enable it"},
		{plugins.KeyRef{URI: "local:orders", Version: "3"}, plugins.KeyUnusable, "destroyed"},
		{plugins.KeyRef{URI: "vault:transit/orders", Version: "1"}, plugins.Invalid, "local:<name>"},
		{plugins.KeyRef{URI: "local:Orders", Version: "1"}, plugins.Invalid, "a-z"},
		{plugins.KeyRef{Version: "1"}, plugins.Invalid, "local:<name>"},
	} {
		_, err := b.Wrap(t.Context(), c.ref, dataKey, binding)
		wantClass(t, "wrap "+c.ref.URI+" "+c.ref.Version, err, c.class, c.text)
		_, err = b.Unwrap(t.Context(), c.ref, wrapped, binding)
		wantClass(t, "unwrap "+c.ref.URI+" "+c.ref.Version, err, c.class, c.text)
	}
	_, err := b.Describe(t.Context(), "local:missing")
	wantClass(t, "describe missing", err, plugins.KeyNotFound)
	_, err = b.Describe(t.Context(), "pkcs11:x")
	wantClass(t, "describe foreign", err, plugins.Invalid)
	_, err = b.Unwrap(t.Context(), plugins.KeyRef{URI: "local:other", Version: "1"}, wrapped, binding)
	wantClass(t, "unwrap by another key", err, plugins.BadCiphertext)
	for what, damaged := range map[string][]byte{"nothing": nil, "one byte": {1}, "damaged": flip(wrapped)} {
		_, err = b.Unwrap(t.Context(), orders1, damaged, binding)
		wantClass(t, "unwrap "+what, err, plugins.BadCiphertext)
	}
}

func flip(b []byte) []byte {
	b = bytes.Clone(b)
	b[len(b)-1] ^= 1
	return b
}

func TestBindingIsBound(t *testing.T) {
	seal := keyFile(t)
	b := openBackend(t, newStore(t, seal, "orders").Path(), seal)
	wrapped := wrap(t, b, orders1)
	for what, change := range map[string]func(*plugins.Binding){
		"purpose":       func(b *plugins.Binding) { b.Purpose = "exported" },
		"provider info": func(b *plugins.Binding) { b.ProviderInfo = []byte("other") },
		"context":       func(b *plugins.Binding) { b.Context = map[string]string{"tenant": "b"} },
		"no context":    func(b *plugins.Binding) { b.ContextBound, b.Context = false, nil },
	} {
		other := binding
		change(&other)
		_, err := b.Unwrap(t.Context(), orders1, wrapped, other)
		wantClass(t, "other "+what, err, plugins.BadCiphertext)
	}
}

// A key made again under the same name does not open what the first wrapped.
func TestRecreatedKey(t *testing.T) {
	seal := keyFile(t)
	wrapped := wrap(t, openBackend(t, newStore(t, seal, "orders").Path(), seal), orders1)
	_, err := openBackend(t, newStore(t, seal, "orders").Path(), seal).Unwrap(t.Context(), orders1, wrapped, binding)
	wantClass(t, "recreated key", err, plugins.BadCiphertext, "key ID")
}

func TestDescribe(t *testing.T) {
	seal := keyFile(t)
	k := everyState(t, seal)
	must(t, k.Disable("orders", "4"))
	d, err := openBackend(t, k.Path(), seal).Describe(t.Context(), "local:orders")
	must(t, err)
	var got []plugins.KeyState
	for _, v := range d.Versions {
		got = append(got, v.State)
		if age := time.Since(v.Created); age < -time.Second || age > time.Minute {
			t.Errorf("version %s is %s old", v.Version, age)
		}
	}
	want := []plugins.KeyState{plugins.Destroyed, plugins.Disabled, plugins.Enabled, plugins.Disabled}
	if diff := cmp.Diff(want, got); diff != "" || d.Current != "4" {
		t.Errorf("current %q, states (-want +got):\n%s", d.Current, diff)
	}
}

func TestSettings(t *testing.T) {
	for _, bad := range []string{
		``, `null`, `[]`, `{}`, `{"keystore":"/k"}`, `{"keystore":"k","seal":{"key_file":"/s"}}`,
		`{"keystore":"/k","seal":{"key_file":"s"}}`, `{"keystore":"/k","seal":{}}`,
		`{"keystore":"/k","seal":{"key_file":"/s","credential":"c"}}`, `{"keystore":"/k","seal":{"credential":"a/b"}}`,
		`{"keystore":"/k","seal":{"key_file":"/s"},"extra":1}`, `{"keystore":"/k","seal":{"key_file":"/s"}} {}`,
		`{"keystore":"/k","seal":{"keyfile":"/s"}}`, `{"keystore":7,"seal":{"key_file":"/s"}}`,
	} {
		b := local.New()
		_, err := b.Open(t.Context(), json.RawMessage(bad))
		wantClass(t, bad, err, plugins.Invalid, "settings of the local backend")
		must(t, b.Close())
	}
}

func TestOpenOnceAndClose(t *testing.T) {
	seal := keyFile(t)
	path := newStore(t, seal, "orders").Path()
	b := local.New()
	_, err := b.Wrap(t.Context(), orders1, dataKey, binding)
	wantClass(t, "before Open", err, plugins.Internal, "Open")
	_, err = b.Open(t.Context(), config(t, path, seal))
	must(t, err)
	_, err = b.Open(t.Context(), config(t, path, seal))
	wantClass(t, "second Open", err, plugins.Invalid, "open already")
	if h, err := b.Check(t.Context()); err != nil || !strings.Contains(h.Detail, "1 keys") || h.UpstreamLatency <= 0 {
		t.Errorf("Check: got %+v, %v", h, err)
	}
	must(t, b.Close(), b.Close())
	_, err = b.Wrap(t.Context(), orders1, dataKey, binding)
	wantClass(t, "after Close", err, plugins.Unavailable)
	_, err = b.Open(t.Context(), config(t, path, seal))
	wantClass(t, "Open after Close", err, plugins.Unavailable)
	_, err = local.New().Open(t.Context(), config(t, path+"-missing", seal))
	wantClass(t, "no keystore", err, plugins.Unavailable, path+"-missing", "create it")
}

func fipsRoundTrip(path string, seal local.Seal) error {
	phrase := local.Seal{PassphraseFile: filepath.Join(filepath.Dir(path), "phrase")}
	if err := os.WriteFile(phrase.PassphraseFile, []byte("correct horse battery staple"), 0o600); err != nil {
		return err
	}
	for _, s := range []local.Seal{seal, phrase} {
		k, err := local.Create(path+s.String()[:3], s)
		if err != nil {
			return err
		}
		b := local.New()
		config, _ := json.Marshal(map[string]any{"keystore": k.Path(), "seal": s})
		info, err := b.Open(context.Background(), config)
		if err != nil {
			return err
		}
		if info.FIPS140 == "off" {
			return errors.New("the FIPS module is off")
		}
		if err := k.CreateKey("orders"); err != nil {
			return err
		}
		wrapped, err := b.Wrap(context.Background(), orders1, dataKey, binding)
		if err != nil {
			return err
		}
		if _, err := b.Unwrap(context.Background(), orders1, wrapped, binding); err != nil {
			return err
		}
	}
	return nil
}

// Everything works where only FIPS-approved use of cryptography is allowed.
func TestFIPSOnly(t *testing.T) {
	cmd := childCommand(t, "fips", filepath.Join(t.TempDir(), "keystore"), keyFile(t))
	cmd.Env = append(cmd.Env, "GODEBUG=fips140=only")
	runChild(t, cmd)
}

func BenchmarkWrap(b *testing.B) {
	seal := keyFile(b)
	backend := openBackend(b, newStore(b, seal, "orders").Path(), seal)
	for b.Loop() {
		wrap(b, backend, orders1)
	}
}
