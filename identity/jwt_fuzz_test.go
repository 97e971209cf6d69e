package identity_test

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"google.golang.org/grpc/metadata"

	"github.com/kms-agent/kms-agent/identity"
)

// However many bad tokens come, the good ones stay known, and what is told about
// the bad does not grow.
func TestJWTFloodOfBadTokens(t *testing.T) {
	w := newJWTWorld(t, nil)
	good := w.tokenContext(t, w.key.token(t, nil))
	if _, err := identity.CallerFromContext(good); err != nil {
		t.Fatal(err)
	}
	stranger := newJWTKey(t, "first", jose.ES256)
	for n := range 200 {
		bad := w.tokenContext(t, stranger.token(t, map[string]any{"sub": fmt.Sprintf("%s/%d", orders, n)}))
		if caller, err := identity.CallerFromContext(bad); err == nil {
			t.Fatalf("taken for %+v", caller)
		}
	}
	// A verification makes hundreds of allocations, a memory of one hardly any.
	if n := testing.AllocsPerRun(100, func() { _, _ = identity.CallerFromContext(good) }); n > 1 {
		t.Errorf("a known token takes %v allocations: it is verified again", n)
	}
}

func BenchmarkJWT(b *testing.B) {
	w := newJWTWorld(b, func(c *identity.Config) { c.Now = nil })
	stranger := newJWTKey(b, "first", jose.ES256)
	for _, c := range []struct {
		name string
		next func(int) string
		good bool
	}{
		{"known", func(int) string { return "" }, true},
		{"bad signature", func(n int) string { return stranger.token(b, map[string]any{"jti": fmt.Sprint(n)}) }, false},
		{"wrong audience", func(n int) string { return w.key.token(b, map[string]any{"jti": fmt.Sprint(n), "aud": "another"}) }, false},
		{"rubbish", func(int) string { return "a.b.c" }, false},
	} {
		b.Run(c.name, func(b *testing.B) {
			token := c.next(0)
			if c.good {
				token = w.key.token(b, nil)
			}
			ctx := w.tokenContext(b, token)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := identity.CallerFromContext(ctx); (err == nil) != c.good {
					b.Fatal(err)
				}
			}
		})
	}
}

// FuzzJWT is authorization metadata that says anything. Only a token that the
// Workload API's key signed makes a caller.
func FuzzJWT(f *testing.F) {
	w := newJWTWorld(f, nil)
	good := w.key.token(f, map[string]any{"exp": time.Now().Add(time.Hour).Unix()})
	parts := strings.Split(good, ".")
	encode := base64.RawURLEncoding.EncodeToString
	for _, seed := range []string{
		"", "Bearer", "Bearer ", "Bearer ..", "Bearer a.b.c", "bearer " + good, "Bearer " + good, "Bearer  " + good,
		"Bearer " + parts[0] + ".." + parts[2], "Bearer " + good + "." + parts[0],
		"Bearer " + encode([]byte(`{"alg":"none"}`)) + "." + parts[1] + ".YQ",
		"Bearer " + encode([]byte(`{"alg":"HS256","kid":"first"}`)) + "." + parts[1] + "." + parts[2],
		"Bearer " + parts[0] + "." + encode([]byte(`{"sub":"spiffe://example.org/orders","aud":[],"exp":1e400}`)) + "." + parts[2],
		"Bearer " + parts[0] + "." + encode([]byte(`{"sub":{},"aud":{"a":1},"exp":[]}`)) + "." + parts[2],
		"Basic YTpi", strings.Repeat("Bearer ", 2000),
	} {
		f.Add(seed)
	}
	base, n := w.live(f, false), 0
	f.Fuzz(func(t *testing.T, value string) {
		// Slow enough for each signature to be verified, and never the token's end.
		w.clock.forward(100 * time.Millisecond)
		if n++; n%10_000 == 0 {
			w.clock.forward(-10_000 * 100 * time.Millisecond)
		}
		ctx := metadata.NewIncomingContext(base, metadata.MD{"authorization": {value}})
		caller, err := identity.CallerFromContext(ctx)
		switch {
		case err == nil && value != "Bearer "+good && !sameToken(value, good):
			t.Fatalf("%q made a caller: %+v", value, caller)
		case err == nil && (caller.ID != orders || caller.Proof != identity.ProofJWTSVID):
			t.Fatalf("taken for %+v", caller)
		case err != nil && (!errors.Is(err, identity.ErrUnidentified) || len(err.Error()) > 1000):
			t.Fatalf("refused with %q", err)
		}
	})
}

// sameToken says whether value is good but for bits of base64 that mean nothing.
func sameToken(value, good string) bool {
	decode := func(token string) string {
		var all []string
		for part := range strings.SplitSeq(strings.TrimPrefix(token, "Bearer "), ".") {
			b, err := base64.RawURLEncoding.DecodeString(part)
			if err != nil {
				return token
			}
			all = append(all, string(b))
		}
		return strings.Join(all, ".")
	}
	return decode(value) == decode(good)
}

// FuzzJWTBundle is a JWT bundle that says anything: nothing in it panics, and
// only its public keys with an ID count.
func FuzzJWTBundle(f *testing.F) {
	key := newJWTKey(f, "first", jose.ES256)
	for _, seed := range []string{
		"", "{}", `{"keys":null}`, `{"keys":[]}`, `{"keys":[null,7,{}]}`, string(bundle(f, key)),
		`{"keys":[{"kty":"oct","kid":"a","k":"AAAA"},{"kty":"EC","crv":"P-256","kid":"a","x":"AA","y":"AA"}]}`,
		`{"keys":[{"kty":"RSA","kid":"a","n":"AA","e":"AQAB"}]}`,
	} {
		f.Add([]byte(seed))
	}
	w := newJWTWorld(f, nil)
	conn := w.tokenContext(f, key.token(f, map[string]any{"exp": time.Now().Add(time.Hour).Unix()}))
	f.Fuzz(func(t *testing.T, document []byte) {
		if len(document) > 1<<20 {
			return
		}
		w.setBundles(t, map[string][]byte{domain.IDString(): document})
		if caller, err := identity.CallerFromContext(conn); err == nil && !strings.Contains(string(document), `"first"`) {
			t.Fatalf("%q made a caller: %+v", document, caller)
		}
	})
}
