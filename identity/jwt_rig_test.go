package identity_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"strings"
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

// tokenContext is a request with a token on a plaintext connection.
func (w *jwtWorld) tokenContext(t testing.TB, token string) context.Context {
	return metadata.NewIncomingContext(w.live(t, false), metadata.MD{
		":authority": {"localhost"}, "content-type": {"application/grpc"}, "user-agent": {"test"}, "authorization": {"Bearer " + token},
	})
}
