package identity_test

import (
	"context"
	"encoding/json"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kms-agent/kms-agent/identity"
)

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
