package identity_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/identity"
)

// jwtKey signs the tokens of a trust domain.
type jwtKey struct {
	id  string
	alg jose.SignatureAlgorithm
	key crypto.Signer
}

func newJWTKey(t testing.TB, id string, alg jose.SignatureAlgorithm) jwtKey {
	t.Helper()
	var key crypto.Signer
	var err error
	switch alg {
	case jose.ES256:
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case jose.ES384:
		key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case jose.ES512:
		key, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	default:
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		t.Fatal(err)
	}
	return jwtKey{id: id, alg: alg, key: key}
}

// bundle is the keys' public halves, as the Workload API gives them.
func bundle(t testing.TB, keys ...jwtKey) []byte {
	t.Helper()
	var set jose.JSONWebKeySet
	for _, k := range keys {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: k.key.Public(), KeyID: k.id})
	}
	return marshal(t, set)
}

func marshal(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// claims of a good token for the agent, with changes; nil takes a claim away.
func claims(changes map[string]any) map[string]any {
	now := time.Now()
	c := map[string]any{
		"sub": orders.String(), "aud": []string{agentID.String()}, "iat": now.Unix(), "exp": now.Add(5 * time.Minute).Unix(),
	}
	for name, value := range changes {
		if c[name] = value; value == nil {
			delete(c, name)
		}
	}
	return c
}

func (k jwtKey) token(t testing.TB, changes map[string]any) string {
	t.Helper()
	return k.sign(t, map[string]any{"typ": "JWT"}, marshal(t, claims(changes)))
}

// sign is a JWS of any payload, with more header; nil takes a field away.
func (k jwtKey) sign(t testing.TB, header map[string]any, payload []byte) string {
	t.Helper()
	options := &jose.SignerOptions{}
	id := k.id
	for name, value := range header {
		if name == "kid" {
			id, _ = value.(string)
			continue
		}
		options.WithHeader(jose.HeaderKey(name), value)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: k.alg, Key: jose.JSONWebKey{Key: k.key, KeyID: id}}, options)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// jwtWorld is a world whose Workload API gives JWT bundles too.
type jwtWorld struct {
	*world
	key, otherKey jwtKey
}

func newJWTWorld(t testing.TB, change func(*identity.Config)) *jwtWorld {
	t.Helper()
	w := &jwtWorld{
		world: &world{own: newAuthority(t, domain), other: newAuthority(t, foreign), api: newWorkloadAPI(t), clock: &clock{}},
		key:   newJWTKey(t, "first", jose.ES256), otherKey: newJWTKey(t, "theirs", jose.ES256),
	}
	w.api.set(w.own.update(t, w.other), nil)
	w.api.setJWT(w.bundles(t))
	w.api.start(t)
	w.source = startSource(t, identity.SourceConfig{Address: w.api.address, Now: w.clock.now, BundleMaxAge: time.Hour, JWTBundles: true})
	untilStatus(t, w.source, identity.SourceReady)
	untilJWT(t, w.source, identity.SourceReady)
	cfg := identity.Config{
		Source: w.source, Now: w.clock.now,
		// So that a fall-back would be seen.
		StaticPeers: []identity.StaticPeer{{UID: number(uid()), ID: billing}},
	}
	if change != nil {
		change(&cfg)
	}
	w.agent = startAgent(t, cfg)
	return w
}

func (w *jwtWorld) bundles(t testing.TB, more ...jwtKey) *workload.JWTBundlesResponse {
	return &workload.JWTBundlesResponse{Bundles: map[string][]byte{
		domain.IDString():  bundle(t, append([]jwtKey{w.key}, more...)...),
		foreign.IDString(): bundle(t, w.otherKey),
	}}
}

// setBundles returns when the source knows of them.
func (w *jwtWorld) setBundles(t testing.TB, bundles map[string][]byte) {
	t.Helper()
	before := w.source.State().JWT.Updated
	w.api.setJWT(&workload.JWTBundlesResponse{Bundles: bundles})
	until(t, w.source, "updated", func(s identity.State) bool { return s.JWT.Updated.After(before) })
}

func untilJWT(t testing.TB, s *identity.Source, want identity.SourceStatus) identity.JWTState {
	t.Helper()
	return *until(t, s, "with JWT bundles "+string(want), func(st identity.State) bool { return st.JWT.Status == want }).JWT
}

// bearing calls with a value of authorization metadata for each given.
func bearing(t testing.TB, conn *grpc.ClientConn, values ...string) (*kmsagentv1.WhoAmIResponse, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, v := range values {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", v)
	}
	return kmsagentv1.NewKMSClient(conn).WhoAmI(ctx, &kmsagentv1.WhoAmIRequest{})
}

func (w *jwtWorld) wantBearer(t testing.TB, conn *grpc.ClientConn, token string, id spiffeid.ID, proof identity.Proof) {
	t.Helper()
	who, err := bearing(t, conn, "Bearer "+token)
	if err != nil {
		t.Fatalf("WhoAmI: %v", err)
	}
	if who.GetSpiffeId() != id.String() || who.GetProof() != string(proof) {
		t.Fatalf("the agent takes the caller for %s by %s, want %s by %s", who.GetSpiffeId(), who.GetProof(), id, proof)
	}
}

// wantRefused is a refusal although the process is a static peer.
func (w *jwtWorld) wantRefused(t testing.TB, conn *grpc.ClientConn, want error, text string, values ...string) {
	t.Helper()
	who, err := bearing(t, conn, values...)
	if status.Code(err) != codes.Unauthenticated {
		t.Fatalf("WhoAmI: got %v, %v, want Unauthenticated", who, err)
	}
	got := w.agent.lastErr()
	if !errors.Is(got, want) || !strings.Contains(got.Error(), text) {
		t.Fatalf("refused with %q, want a kind of %q that says %q", got, want, text)
	}
	if len(got.Error()) > 1000 {
		t.Errorf("the refusal is %d bytes long, as an attacker wants it", len(got.Error()))
	}
	for _, v := range values {
		if token := strings.TrimPrefix(v, "Bearer "); len(token) > 40 && strings.Contains(got.Error(), token[len(token)-40:]) {
			t.Errorf("the refusal repeats the token: %q", got)
		}
	}
}

func TestJWTSVID(t *testing.T) {
	w := newJWTWorld(t, nil)
	conn := w.agent.dial(t, nil)
	// One connection carries requests of several callers, proven each by itself.
	wantCaller(t, conn, billing, identity.ProofStaticPeer)
	w.wantBearer(t, conn, w.key.token(t, nil), orders, identity.ProofJWTSVID)
	w.wantBearer(t, conn, w.key.token(t, map[string]any{"sub": agentID.String()}), agentID, identity.ProofJWTSVID)
	wantCaller(t, conn, billing, identity.ProofStaticPeer)
	// aud may be a text instead of a list (RFC 7519, section 4.1.3).
	w.wantBearer(t, conn, w.key.token(t, map[string]any{"aud": agentID.String()}), orders, identity.ProofJWTSVID)
}

func TestJWTAlgorithms(t *testing.T) {
	w := newJWTWorld(t, nil)
	var keys []jwtKey
	for _, alg := range []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512, jose.PS256, jose.PS384, jose.PS512} {
		keys = append(keys, newJWTKey(t, "key "+string(alg), alg))
	}
	w.setBundles(t, w.bundles(t, keys...).Bundles)
	conn := w.agent.dial(t, nil)
	for _, key := range keys {
		w.wantBearer(t, conn, key.token(t, nil), orders, identity.ProofJWTSVID)
	}
}

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

func TestJWTConfiguredAudience(t *testing.T) {
	w := newJWTWorld(t, func(c *identity.Config) { c.Audience = []string{"kms", "kms-old"} })
	conn := w.agent.dial(t, nil)
	for _, audience := range []string{"kms", "kms-old"} {
		w.wantBearer(t, conn, w.key.token(t, map[string]any{"aud": audience}), orders, identity.ProofJWTSVID)
	}
	w.wantRefused(t, conn, identity.ErrUntrusted, "for 2 audiences", "Bearer "+w.key.token(t, map[string]any{"aud": []string{"kms", "kms-old"}}))
	w.wantRefused(t, conn, identity.ErrUntrusted, "expected audience", "Bearer "+w.key.token(t, nil))
	if _, err := identity.NewCredentials(identity.Config{Audience: []string{"kms", ""}}); err == nil {
		t.Error("an empty audience was taken")
	}
}

func TestJWTFederatedWhereConfigured(t *testing.T) {
	w := newJWTWorld(t, func(c *identity.Config) { c.FederatedTrustDomains = []spiffeid.TrustDomain{foreign} })
	partner := spiffeid.RequireFromString("spiffe://other.org/orders")
	conn := w.agent.dial(t, nil)
	w.wantBearer(t, conn, w.otherKey.token(t, map[string]any{"sub": partner.String()}), partner, identity.ProofJWTSVID)
	w.wantRefused(t, conn, identity.ErrUntrusted, "no JWT authority", "Bearer "+w.key.token(t, map[string]any{"sub": partner.String()}))
}

// Every proof that is offered must hold, and the strongest names the proof.
func TestJWTOnAConnectionWithX509SVID(t *testing.T) {
	w := newJWTWorld(t, nil)
	conn := w.agent.dial(t, tlsClient(w.own.leaf(t, orders.String(), nil)))
	w.wantBearer(t, conn, w.key.token(t, nil), orders, identity.ProofX509SVID)
	w.wantRefused(t, conn, identity.ErrUnidentified, "prove one identity", "Bearer "+w.key.token(t, map[string]any{"sub": billing.String()}))
	w.wantRefused(t, conn, identity.ErrExpired, "", "Bearer "+w.key.token(t, map[string]any{"exp": time.Now().Add(-time.Second).Unix()}))
	w.wantRefused(t, conn, identity.ErrUntrusted, "", "Bearer x")
	wantCaller(t, conn, orders, identity.ProofX509SVID)
	// A good token does not replace an X.509-SVID that is good no more.
	w.clock.forward(2 * time.Hour)
	w.agent.wantUnauthenticated(t, conn, identity.ErrExpired, "")
	w.wantRefused(t, conn, identity.ErrExpired, "connect again", "Bearer "+w.key.token(t, map[string]any{"exp": time.Now().Add(4 * time.Hour).Unix()}))
}

// What was accepted is not accepted for longer than it holds.
func TestJWTAcceptedTokenExpires(t *testing.T) {
	w := newJWTWorld(t, nil)
	conn, token := w.agent.dial(t, nil), w.key.token(t, nil)
	w.wantBearer(t, conn, token, orders, identity.ProofJWTSVID)
	w.clock.forward(4 * time.Minute)
	w.wantBearer(t, conn, token, orders, identity.ProofJWTSVID)
	w.clock.forward(time.Minute)
	w.wantRefused(t, conn, identity.ErrExpired, "", "Bearer "+token)
}

func TestJWTKeyRotation(t *testing.T) {
	w := newJWTWorld(t, nil)
	conn, token := w.agent.dial(t, nil), w.key.token(t, nil)
	set := func(bundles map[string][]byte) { t.Helper(); w.setBundles(t, bundles) }
	second := newJWTKey(t, "second", jose.ES256)
	w.wantBearer(t, conn, token, orders, identity.ProofJWTSVID)
	set(map[string][]byte{domain.IDString(): bundle(t, w.key, second)})
	w.wantBearer(t, conn, token, orders, identity.ProofJWTSVID)
	w.wantBearer(t, conn, second.token(t, nil), orders, identity.ProofJWTSVID)
	set(map[string][]byte{domain.IDString(): bundle(t, second)})
	w.wantRefused(t, conn, identity.ErrUntrusted, `no JWT authority "first"`, "Bearer "+token)
	// Its ID with another key behind it.
	set(map[string][]byte{domain.IDString(): bundle(t, newJWTKey(t, "first", jose.ES256))})
	w.wantRefused(t, conn, identity.ErrUntrusted, "unable to get claims", "Bearer "+token)
	set(map[string][]byte{domain.IDString(): bundle(t, w.key)})
	w.wantBearer(t, conn, token, orders, identity.ProofJWTSVID)
	// An empty bundle, one that cannot be read, and none at all vouch for nobody.
	for name, bundles := range map[string]map[string][]byte{
		"empty": {domain.IDString(): []byte(`{"keys":[]}`)}, "unreadable": {domain.IDString(): []byte("x")}, "none": {},
	} {
		t.Run(name, func(t *testing.T) {
			set(bundles)
			w.wantRefused(t, conn, identity.ErrUntrusted, "", "Bearer "+token)
			set(map[string][]byte{domain.IDString(): bundle(t, w.key)})
			w.wantBearer(t, conn, token, orders, identity.ProofJWTSVID)
		})
	}
}

// A bundle's keys that are none for JWT-SVIDs are not used for them.
func TestJWTBundleKeys(t *testing.T) {
	w := newJWTWorld(t, nil)
	public := func(change func(map[string]any)) json.RawMessage {
		var fields map[string]any
		if err := json.Unmarshal(marshal(t, jose.JSONWebKey{Key: w.key.key.Public(), KeyID: "first"}), &fields); err != nil {
			t.Fatal(err)
		}
		change(fields)
		return marshal(t, fields)
	}
	for name, c := range map[string]struct {
		keys []json.RawMessage
		good bool
	}{
		"without use":       {[]json.RawMessage{public(func(map[string]any) {})}, true},
		"for JWT-SVIDs":     {[]json.RawMessage{public(func(k map[string]any) { k["use"] = "jwt-svid" })}, true},
		"for X.509-SVIDs":   {[]json.RawMessage{public(func(k map[string]any) { k["use"] = "x509-svid" })}, false},
		"without ID":        {[]json.RawMessage{public(func(k map[string]any) { delete(k, "kid") })}, false},
		"symmetric":         {[]json.RawMessage{json.RawMessage(`{"kty":"oct","kid":"first","k":"AAAA"}`)}, false},
		"unknown":           {[]json.RawMessage{json.RawMessage(`{"kty":"new","kid":"first"}`)}, false},
		"good among others": {[]json.RawMessage{json.RawMessage(`7`), public(func(map[string]any) {}), json.RawMessage(`{"kty":"new","kid":"x"}`)}, true},
	} {
		t.Run(name, func(t *testing.T) {
			w.setBundles(t, map[string][]byte{domain.IDString(): marshal(t, map[string]any{"keys": c.keys})})
			conn := w.agent.dial(t, nil)
			if c.good {
				w.wantBearer(t, conn, w.key.token(t, nil), orders, identity.ProofJWTSVID)
				return
			}
			w.wantRefused(t, conn, identity.ErrUntrusted, "no JWT authority", "Bearer "+w.key.token(t, nil))
		})
	}
}

func TestJWTOutageBeyondBundleMaxAge(t *testing.T) {
	api, own, clk := newWorkloadAPI(t), newAuthority(t, domain), &clock{}
	key := newJWTKey(t, "first", jose.ES256)
	bundles := &workload.JWTBundlesResponse{Bundles: map[string][]byte{domain.IDString(): bundle(t, key)}}
	api.set(own.update(t), nil)
	api.setJWT(bundles)
	stop := api.start(t)
	source := startSource(t, identity.SourceConfig{Address: api.address, Now: clk.now, BundleMaxAge: 10 * time.Minute, JWTBundles: true})
	untilStatus(t, source, identity.SourceReady)
	untilJWT(t, source, identity.SourceReady)
	w := &jwtWorld{world: &world{agent: startAgent(t, identity.Config{Source: source, Now: clk.now})}}
	conn := w.agent.dial(t, nil)
	lasting := func() string { return key.token(t, map[string]any{"exp": time.Now().Add(time.Hour).Unix()}) }
	old := lasting()
	w.wantBearer(t, conn, old, orders, identity.ProofJWTSVID)

	stop()
	untilJWT(t, source, identity.SourceStale)
	clk.forward(9 * time.Minute)
	w.wantBearer(t, conn, old, orders, identity.ProofJWTSVID)
	w.wantBearer(t, conn, lasting(), orders, identity.ProofJWTSVID)
	clk.forward(2 * time.Minute)
	if got := source.State().JWT.Status; got != identity.SourceExpired {
		t.Fatalf("after the bound the JWT bundles are %s", got)
	}
	// Neither a new token nor one that was accepted before.
	w.wantRefused(t, conn, identity.ErrUntrusted, "has not been heard", "Bearer "+old)
	w.wantRefused(t, conn, identity.ErrUntrusted, "has not been heard", "Bearer "+lasting())

	api.start(t)
	untilJWT(t, source, identity.SourceReady)
	w.wantBearer(t, conn, old, orders, identity.ProofJWTSVID)
}

// A Workload API without JWT-SVIDs is one all the same.
func TestJWTWithoutBundles(t *testing.T) {
	own, api := newAuthority(t, domain), newWorkloadAPI(t)
	api.set(own.update(t), nil)
	api.start(t)
	source := startSource(t, identity.SourceConfig{Address: api.address, JWTBundles: true})
	untilStatus(t, source, identity.SourceReady)
	state := until(t, source, "told", func(s identity.State) bool { return s.JWT.LastError != nil })
	if state.Status != identity.SourceReady || state.JWT.Status != identity.SourceStarting || status.Code(state.JWT.LastError) != codes.Unimplemented {
		t.Fatalf("X.509 is %s, JWT %+v", state.Status, state.JWT)
	}
	w := &jwtWorld{world: &world{agent: startAgent(t, identity.Config{Source: source})}}
	token := newJWTKey(t, "first", jose.ES256).token(t, nil)
	w.wantRefused(t, w.agent.dial(t, nil), identity.ErrNotReady, "no JWT bundles", "Bearer "+token)
	wantCaller(t, w.agent.dial(t, tlsClient(own.leaf(t, orders.String(), nil))), orders, identity.ProofX509SVID)

	alone := &jwtWorld{world: &world{agent: startAgent(t, identity.Config{StaticPeers: []identity.StaticPeer{{UID: number(uid()), ID: billing}}})}}
	alone.wantRefused(t, alone.agent.dial(t, nil), identity.ErrNotReady, "no SPIFFE Workload API is configured", "Bearer "+token)
}

// The agent's own SPIFFE ID is the audience as long as it has one.
func TestJWTAudienceEndsWithTheAgentsIdentity(t *testing.T) {
	w := newJWTWorld(t, nil)
	conn, token := w.agent.dial(t, nil), w.key.token(t, nil)
	w.wantBearer(t, conn, token, orders, identity.ProofJWTSVID)
	// An SVID that has expired leaves the agent who it was.
	w.clock.forward(61 * time.Minute)
	if got := w.source.State().Status; got != identity.SourceExpired {
		t.Fatalf("the source is %s", got)
	}
	w.wantBearer(t, conn, w.key.token(t, map[string]any{"exp": time.Now().Add(2 * time.Hour).Unix()}), orders, identity.ProofJWTSVID)
	// Another one is another audience.
	updated := w.source.Updated()
	renamed := spiffeid.RequireFromString("spiffe://example.org/renamed")
	w.api.set(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{w.own.svid(t, renamed, nil)}}, nil)
	<-updated
	until(t, w.source, "renamed", func(s identity.State) bool { return s.ID == renamed })
	lasting := func(audience spiffeid.ID) string {
		return w.key.token(t, map[string]any{"aud": audience.String(), "exp": time.Now().Add(2 * time.Hour).Unix()})
	}
	w.wantRefused(t, conn, identity.ErrUntrusted, "expected audience", "Bearer "+lasting(agentID))
	w.wantBearer(t, conn, lasting(renamed), orders, identity.ProofJWTSVID)
	// And without an identity there is nobody whom a token could be for.
	w.api.set(nil, status.Error(codes.PermissionDenied, "no identity issued"))
	untilStatus(t, w.source, identity.SourceDenied)
	w.wantRefused(t, conn, identity.ErrNotReady, "configure an audience", "Bearer "+lasting(renamed))
}

func TestProofs(t *testing.T) {
	x509, jwt, static := identity.ProofX509SVID, identity.ProofJWTSVID, identity.ProofStaticPeer
	for _, accepted := range [][]identity.Proof{nil, {x509}, {jwt}, {static}, {x509, jwt}, {x509, static}, {jwt, static}, {x509, jwt, static}} {
		t.Run(fmt.Sprint(accepted), func(t *testing.T) {
			w := newJWTWorld(t, func(c *identity.Config) { c.Proofs = accepted })
			takes := map[identity.Proof]bool{}
			for _, p := range accepted {
				takes[p] = true
			}
			if accepted == nil {
				maps.Copy(takes, map[identity.Proof]bool{x509: true, jwt: true, static: true})
			}
			token := w.key.token(t, nil)
			plain := w.agent.dial(t, nil)
			if takes[static] {
				wantCaller(t, plain, billing, static)
			} else {
				w.agent.wantUnauthenticated(t, plain, identity.ErrUnidentified, "static-peer is not accepted on this listener")
			}
			if takes[jwt] {
				w.wantBearer(t, plain, token, orders, jwt)
			} else {
				w.wantRefused(t, plain, identity.ErrUnidentified, "jwt-svid is not accepted on this listener", "Bearer "+token)
			}
			secure := w.agent.dial(t, tlsClient(w.own.leaf(t, orders.String(), nil)))
			if !takes[x509] {
				w.agent.wantHandshakeRefusal(t, secure, identity.ErrUnidentified, "x509-svid is not accepted on this listener")
				return
			}
			wantCaller(t, secure, orders, x509)
			if !takes[jwt] {
				w.wantRefused(t, secure, identity.ErrUnidentified, "jwt-svid is not accepted on this listener", "Bearer "+token)
			}
		})
	}
	for _, p := range []identity.Proof{"", "x509", identity.ProofAttestedPeer} {
		if _, err := identity.NewCredentials(identity.Config{Proofs: []identity.Proof{p}}); err == nil {
			t.Errorf("proof %q was taken", p)
		}
	}
}

// The Workload API is asked anew now and then, since a stream that stands is no
// proof that somebody still tells of changes. That is no loss.
func TestJWTBundlesAreAskedForAnew(t *testing.T) {
	own, api, key := newAuthority(t, domain), newWorkloadAPI(t), newJWTKey(t, "first", jose.ES256)
	api.set(own.update(t), nil)
	api.setJWT(&workload.JWTBundlesResponse{Bundles: map[string][]byte{domain.IDString(): bundle(t, key)}})
	api.start(t)
	source := startSource(t, identity.SourceConfig{Address: api.address, BundleMaxAge: 20 * time.Millisecond, JWTBundles: true})
	untilJWT(t, source, identity.SourceReady)
	until(t, source, "impatient", func(s identity.State) bool {
		if s.JWT.Status != identity.SourceReady {
			t.Fatalf("the JWT bundles are %+v", s.JWT)
		}
		return api.openedJWT() > 3
	})
}

// While requests and rotations race, no token outlives its key.
func TestJWTRace(t *testing.T) {
	w := newJWTWorld(t, nil)
	second := newJWTKey(t, "second", jose.ES256)
	tokens := []string{w.key.token(t, nil), second.token(t, nil)}
	bundles := []map[string][]byte{{domain.IDString(): bundle(t, w.key)}, {domain.IDString(): bundle(t, second)}}
	contexts := []context.Context{w.tokenContext(t, tokens[0]), w.tokenContext(t, tokens[1])}
	stop := make(chan struct{})
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				if caller, err := identity.CallerFromContext(contexts[n%2]); err == nil && caller.ID != orders {
					t.Errorf("taken for %+v", caller)
				}
			}
		})
	}
	for n := range 40 {
		w.setBundles(t, bundles[n%2])
		if _, err := identity.CallerFromContext(contexts[n%2]); err != nil {
			t.Errorf("the present key's token: %v", err)
		}
		if caller, err := identity.CallerFromContext(contexts[1-n%2]); err == nil {
			t.Errorf("the former key's token makes %+v", caller)
		}
	}
	close(stop)
	callers.Wait()
}

// tokenContext is a request with a token on a plaintext connection.
func (w *jwtWorld) tokenContext(t testing.TB, token string) context.Context {
	return metadata.NewIncomingContext(w.live(t, false), metadata.MD{
		":authority": {"localhost"}, "content-type": {"application/grpc"}, "user-agent": {"test"}, "authorization": {"Bearer " + token},
	})
}

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
	base := w.live(f, false)
	f.Fuzz(func(t *testing.T, value string) {
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
