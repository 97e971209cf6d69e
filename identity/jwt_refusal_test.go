package identity_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/kms-agent/kms-agent/identity"
)

// forged is a token that encodes header and claims and signs them with sign.
func forged(t testing.TB, header map[string]any, payload []byte, sign func(input string) []byte) string {
	t.Helper()
	encode := base64.RawURLEncoding.EncodeToString
	input := encode(marshal(t, header)) + "." + encode(payload)
	return input + "." + encode(sign(input))
}

func hs256(secret []byte) func(string) []byte {
	return func(input string) []byte {
		mac := hmac.New(sha256.New, secret)
		mac.Write([]byte(input))
		return mac.Sum(nil)
	}
}

// Every way in which a token fails. In none the caller becomes the static peer
// that the process is without one.
func TestJWTRefusals(t *testing.T) {
	w := newJWTWorld(t, nil)
	stranger := newJWTKey(t, "first", jose.ES256)
	der, err := x509.MarshalPKIXPublicKey(w.key.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	good := w.key.token(t, nil)
	parts := strings.Split(good, ".")
	with := func(name string, value any) string { return w.key.token(t, map[string]any{name: value}) }
	payload := marshal(t, claims(nil))
	now := time.Now()
	cases := map[string]struct{ token, text string }{
		"wrong audience":               {with("aud", []string{"spiffe://example.org/another"}), "expected audience in"},
		"audience of a prefix":         {with("aud", []string{agentID.String() + "/x"}), "expected audience in"},
		"audience in upper case":       {with("aud", []string{strings.ToUpper(agentID.String())}), "expected audience in"},
		"several audiences":            {with("aud", []string{agentID.String(), "spiffe://example.org/another"}), "for 2 audiences"},
		"the same audience twice":      {with("aud", []string{agentID.String(), agentID.String()}), "for 2 audiences"},
		"no audience":                  {with("aud", nil), "expected audience in"},
		"empty list of audiences":      {with("aud", []string{}), "expected audience in"},
		"empty audience":               {with("aud", ""), "expected audience in"},
		"audience no text":             {with("aud", 7), "unable to get claims"},
		"no expiry":                    {with("exp", nil), "missing exp"},
		"expiry no number":             {with("exp", "soon"), "unable to get claims"},
		"not valid yet":                {with("nbf", now.Add(2*time.Minute).Unix()), "not valid yet"},
		"issued in the future":         {with("iat", now.Add(2*time.Minute).Unix()), "future"},
		"no subject":                   {with("sub", nil), "missing subject"},
		"subject no SPIFFE ID":         {with("sub", "orders"), "invalid subject"},
		"subject a URL":                {with("sub", "https://example.org/orders"), "invalid subject"},
		"subject with a dot segment":   {with("sub", "spiffe://example.org/a/../orders"), "invalid subject"},
		"subject a trust domain":       {with("sub", domain.IDString()), "names a trust domain, not a workload"},
		"foreign, with a bundle":       {w.otherKey.token(t, map[string]any{"sub": "spiffe://other.org/orders"}), "does not serve"},
		"foreign, without":             {with("sub", "spiffe://unknown.org/orders"), "does not serve"},
		"own ID by a foreign key":      {w.otherKey.token(t, nil), `no JWT authority "theirs"`},
		"own ID by a foreign, own kid": {w.otherKey.sign(t, map[string]any{"kid": "first"}, payload), "unable to get claims"},
		"own kid by a stranger":        {stranger.token(t, nil), "unable to get claims"},
		"unknown kid":                  {newJWTKey(t, "unknown", jose.ES256).token(t, nil), `no JWT authority "unknown"`},
		"no kid":                       {w.key.sign(t, map[string]any{"kid": ""}, payload), "missing key id"},
		"key in the header": {forged(t, map[string]any{
			"alg": "ES256", "kid": "first", "jwk": json.RawMessage(marshal(t, jose.JSONWebKey{Key: stranger.key.Public(), KeyID: "first"})),
		}, payload, func(string) []byte { return make([]byte, 64) }), "unable to get claims"},
		"critical extension": {forged(t, map[string]any{
			"alg": "ES256", "kid": "first", "crit": []string{"exp"}, "exp": 1,
		}, payload, func(string) []byte { return make([]byte, 64) }), "unable to get claims"},
		"type at+jwt":             {w.key.sign(t, map[string]any{"typ": "at+jwt"}, payload), "type"},
		"alg none":                {forged(t, map[string]any{"alg": "none", "kid": "first"}, payload, func(string) []byte { return []byte{0} }), "unable to parse"},
		"alg none, no signature":  {strings.TrimSuffix(forged(t, map[string]any{"alg": "none", "kid": "first"}, payload, func(string) []byte { return nil }), "."), "no JWS"},
		"alg None":                {forged(t, map[string]any{"alg": "None", "kid": "first"}, payload, func(string) []byte { return []byte{0} }), "unable to parse"},
		"no alg":                  {forged(t, map[string]any{"kid": "first"}, payload, func(string) []byte { return []byte{0} }), "unable to parse"},
		"HS256, the key as DER":   {forged(t, map[string]any{"alg": "HS256", "kid": "first"}, payload, hs256(der)), "unable to parse"},
		"HS256, the key as PEM":   {forged(t, map[string]any{"alg": "HS256", "kid": "first"}, payload, hs256(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))), "unable to parse"},
		"another algorithm's key": {forged(t, map[string]any{"alg": "RS256", "kid": "first"}, payload, func(string) []byte { return make([]byte, 256) }), "unable to get claims"},
		"zero signature":          {forged(t, map[string]any{"alg": "ES256", "kid": "first"}, payload, func(string) []byte { return make([]byte, 64) }), "unable to get claims"},
		"claims exchanged":        {parts[0] + "." + strings.Split(with("sub", billing.String()), ".")[1] + "." + parts[2], "unable to get claims"},
		"signature cut":           {good[:len(good)-4], "unable to get claims"},
		"subject twice": {w.key.sign(t, nil, []byte(fmt.Sprintf(`{"sub":%q,"sub":%q,"aud":%q,"exp":%d}`,
			billing, orders, agentID, now.Add(time.Minute).Unix()))), "unable to get claims"},
		"claims no object":     {w.key.sign(t, nil, []byte(`[]`)), "unable to get claims"},
		"claims no JSON":       {w.key.sign(t, nil, []byte(`x`)), "unable to get claims"},
		"nothing":              {"", "no JWS"},
		"one part":             {parts[0], "no JWS"},
		"two parts":            {parts[0] + "." + parts[1], "no JWS"},
		"four parts":           {good + "." + parts[0], "no JWS"},
		"empty part":           {parts[0] + ".." + parts[2], "no JWS"},
		"padded base64":        {good + "=", "no JWS"},
		"standard base64":      {parts[0] + ".+/" + parts[1] + "." + parts[2], "no JWS"},
		"space behind":         {good + " ", "no JWS"},
		"two spaces before":    {" " + good, "no JWS"},
		"two tokens":           {good + ", Bearer " + good, "no JWS"},
		"JSON serialisation":   {`{"payload":"","signatures":[]}`, "no JWS"},
		"longer than is read":  {strings.Repeat("a", identity.MaxToken-len(good)+1) + good, "8192 at most"},
		"long rubbish":         {strings.Repeat("a", 4000) + ".b.c", "unable to parse"},
		"long foreign subject": {with("sub", "spiffe://unknown.org/"+strings.Repeat("a", 1900)), "spiffe://unknown.org/"},
		"long audience":        {with("aud", strings.Repeat("a", 4000)), "expected audience in"},
	}
	conn := w.agent.dial(t, nil)
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			w.wantRefused(t, conn, identity.ErrUntrusted, c.text, "Bearer "+c.token)
		})
	}
	for name, ago := range map[string]time.Duration{"just now": time.Second, "within go-jose's leeway": 30 * time.Second, "beyond it": 2 * time.Minute} {
		t.Run("expired "+name, func(t *testing.T) {
			want, text := identity.ErrExpired, "ask the Workload API for another"
			if ago > time.Minute {
				want, text = identity.ErrUntrusted, "expired"
			}
			w.wantRefused(t, conn, want, text, "Bearer "+with("exp", now.Add(-ago).Unix()))
		})
	}
	t.Run("none of them, as a check of this test", func(t *testing.T) {
		w.wantBearer(t, conn, good, orders, identity.ProofJWTSVID)
		wantCaller(t, conn, billing, identity.ProofStaticPeer)
	})
}

func TestJWTMetadata(t *testing.T) {
	w := newJWTWorld(t, nil)
	conn := w.agent.dial(t, nil)
	good := w.key.token(t, nil)
	form := `not "Bearer ", with one space`
	for name, c := range map[string]struct {
		text   string
		values []string
	}{
		"two values":        {"2 values", []string{"Bearer " + good, "Bearer " + good}},
		"a good and a bad":  {"2 values", []string{"Bearer " + good, "x"}},
		"empty":             {form, []string{""}},
		"no scheme":         {form, []string{good}},
		"Basic":             {form, []string{"Basic b3JkZXJzOnNlY3JldA=="}},
		"lower case":        {form, []string{"bearer " + good}},
		"upper case":        {form, []string{"BEARER " + good}},
		"no space":          {form, []string{"Bearer" + good}},
		"a comma":           {"no JWS", []string{"Bearer " + good + ",Bearer " + good}},
		"no token":          {form, []string{"Bearer"}},
		"a space, no token": {"", []string{"Bearer "}},
	} {
		t.Run(name, func(t *testing.T) {
			w.wantRefused(t, conn, identity.ErrUntrusted, c.text, c.values...)
		})
	}
	// gRPC does not let so much through; what is closer is refused above.
	t.Run("one megabyte", func(t *testing.T) {
		if who, err := bearing(t, conn, "Bearer "+strings.Repeat("a", 1<<20)); err == nil {
			t.Fatalf("the agent takes the caller for %v", who)
		}
	})
	w.wantBearer(t, w.agent.dial(t, nil), good, orders, identity.ProofJWTSVID)
}
