package identity_test

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kms-agent/kms-agent/identity"
)

func TestSourceFollows(t *testing.T) {
	own, other, api := newAuthority(t, domain), newAuthority(t, foreign), newWorkloadAPI(t)
	source := startSource(t, identity.SourceConfig{Address: api.address})

	// The socket is not there yet.
	state := until(t, source, "aware of the missing socket", func(s identity.State) bool { return s.LastError != nil })
	if state.Status != identity.SourceStarting || !strings.Contains(state.LastError.Error(), "no such file") {
		t.Fatalf("without a socket: %+v", state)
	}
	if _, err := source.GetX509SVID(); !errors.Is(err, identity.ErrNotReady) || !strings.Contains(err.Error(), "no such file") {
		t.Fatalf("without a socket the SVID's error is %v", err)
	}

	api.set(own.update(t, other), nil)
	stop := api.start(t)
	state = untilStatus(t, source, identity.SourceReady)
	if state.ID != agentID || state.LastError != nil || !state.BundlesEnd.IsZero() || time.Until(state.Expires) < 50*time.Minute || state.Updated.IsZero() {
		t.Fatalf("when all is well: %+v", state)
	}
	if diff := cmp.Diff([]spiffeid.TrustDomain{domain, foreign}, state.TrustDomains, cmp.Comparer(sameDomain)); diff != "" {
		t.Fatalf("trust domains: %s", diff)
	}

	// A federated bundle is withdrawn.
	api.set(own.update(t), nil)
	until(t, source, "without the foreign bundle", func(s identity.State) bool { return len(s.TrustDomains) == 1 })
	if _, err := source.GetX509BundleForTrustDomain(foreign); err == nil {
		t.Fatal("the withdrawn bundle is still there")
	}

	// An outage: what was heard stays.
	stop()
	state = untilStatus(t, source, identity.SourceStale)
	if state.ID != agentID || state.LastError == nil || state.BundlesEnd.IsZero() {
		t.Fatalf("in an outage: %+v", state)
	}
	if _, err := source.GetX509SVID(); err != nil {
		t.Fatalf("in an outage: %v", err)
	}
	if _, err := source.GetX509BundleForTrustDomain(domain); err != nil {
		t.Fatalf("in an outage: %v", err)
	}
	api.start(t)
	untilStatus(t, source, identity.SourceReady)
}

func sameDomain(a, b spiffeid.TrustDomain) bool { return a == b }

// Whatever the Workload API answers, the source asks again and recovers.
func TestSourceSurvivesEveryCode(t *testing.T) {
	own, key := newAuthority(t, domain), newJWTKey(t, "first", jose.ES256)
	for code := codes.OK; code <= codes.Unauthenticated; code++ {
		t.Run(code.String(), func(t *testing.T) {
			t.Parallel()
			api := newWorkloadAPI(t)
			api.set(own.update(t), nil)
			api.setJWT(&workload.JWTBundlesResponse{Bundles: map[string][]byte{domain.IDString(): bundle(t, key)}})
			api.start(t)
			source := startSource(t, identity.SourceConfig{Address: api.address, JWTBundles: true})
			untilStatus(t, source, identity.SourceReady)
			untilJWT(t, source, identity.SourceReady)

			fail := status.Error(code, "as the test wants")
			if code == codes.OK {
				fail = endOfStream{}
			}
			before, beforeJWT := api.opened(), api.openedJWT()
			api.set(nil, fail)
			want := identity.SourceStale
			if code == codes.PermissionDenied {
				want = identity.SourceDenied
			}
			untilStatus(t, source, want)
			if state := untilJWT(t, source, identity.SourceStale); len(state.TrustDomains) != 1 || state.BundlesEnd.IsZero() {
				t.Errorf("while the Workload API answers %v, the JWT bundles are %+v", code, state)
			}
			until(t, source, "persistent", func(identity.State) bool { return api.opened() > before+3 && api.openedJWT() > beforeJWT+3 })
			if _, err := source.GetX509SVID(); (err != nil) != (code == codes.PermissionDenied) {
				t.Errorf("while the Workload API answers %v, the SVID's error is %v", code, err)
			}
			if _, err := source.GetX509BundleForTrustDomain(domain); err != nil {
				t.Errorf("while the Workload API answers %v: %v", code, err)
			}
			api.set(own.update(t), nil)
			untilStatus(t, source, identity.SourceReady)
			untilJWT(t, source, identity.SourceReady)
		})
	}
}

// endOfStream ends a stream with status OK: a server that just hangs up.
type endOfStream struct{}

func (endOfStream) Error() string              { return "end" }
func (endOfStream) GRPCStatus() *status.Status { return status.New(codes.OK, "") }

func TestSourceDropsTheSVIDWhenDenied(t *testing.T) {
	own, api := newAuthority(t, domain), newWorkloadAPI(t)
	api.set(own.update(t), nil)
	api.start(t)
	source := startSource(t, identity.SourceConfig{Address: api.address})
	untilStatus(t, source, identity.SourceReady)
	a := startAgent(t, identity.Config{Source: source})

	api.set(nil, status.Error(codes.PermissionDenied, "no identity issued"))
	state := untilStatus(t, source, identity.SourceDenied)
	if !state.ID.IsZero() || !state.Expires.IsZero() {
		t.Errorf("the SVID is still there: %+v", state)
	}
	_, err := source.GetX509SVID()
	if !errors.Is(err, identity.ErrNotReady) || !strings.Contains(err.Error(), "register the agent") {
		t.Errorf("got %v, want an error that names the cure", err)
	}
	a.wantHandshakeRefusal(t, a.dial(t, tlsClient(own.leaf(t, orders.String(), nil))), identity.ErrNotReady, "gives this process no identity")
}

// An update is the whole truth, also when it says nothing.
func TestSourceEmptyUpdateWithdrawsAll(t *testing.T) {
	own, api := newAuthority(t, domain), newWorkloadAPI(t)
	api.set(own.update(t), nil)
	api.start(t)
	source := startSource(t, identity.SourceConfig{Address: api.address})
	untilStatus(t, source, identity.SourceReady)
	api.set(&workload.X509SVIDResponse{}, nil)
	state := untilStatus(t, source, identity.SourceDenied)
	if len(state.TrustDomains) != 0 || state.LastError == nil {
		t.Errorf("after an empty update: %+v", state)
	}
}

func TestSourceUnreadableUpdates(t *testing.T) {
	own, other := newAuthority(t, domain), newAuthority(t, foreign)
	rubbish := []byte("rubbish")
	cases := map[string]func(*workload.X509SVIDResponse){
		"certificate":    func(u *workload.X509SVIDResponse) { u.Svids[0].X509Svid = rubbish },
		"no certificate": func(u *workload.X509SVIDResponse) { u.Svids[0].X509Svid = nil },
		"key":            func(u *workload.X509SVIDResponse) { u.Svids[0].X509SvidKey = rubbish },
		"no key":         func(u *workload.X509SVIDResponse) { u.Svids[0].X509SvidKey = nil },
		"another's key":  func(u *workload.X509SVIDResponse) { u.Svids[0].X509SvidKey = own.svid(t, agentID, nil).X509SvidKey },
		"own bundle":     func(u *workload.X509SVIDResponse) { u.Svids[0].Bundle = rubbish },
		"no digitalSignature": func(u *workload.X509SVIDResponse) {
			u.Svids[0] = own.svid(t, agentID, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement })
		},
		"root-path ID": func(u *workload.X509SVIDResponse) { u.Svids[0] = own.svid(t, domain.ID(), nil) },
		"empty SVID":   func(u *workload.X509SVIDResponse) { u.Svids[0] = &workload.X509SVID{} },
	}
	for name, spoil := range cases {
		t.Run(name, func(t *testing.T) {
			api := newWorkloadAPI(t)
			api.set(own.update(t, other), nil)
			api.start(t)
			source := startSource(t, identity.SourceConfig{Address: api.address})
			good := untilStatus(t, source, identity.SourceReady)

			bad := own.update(t)
			spoil(bad)
			api.set(bad, nil)
			state := untilStatus(t, source, identity.SourceStale)
			if state.ID != good.ID || !state.Expires.Equal(good.Expires) || len(state.TrustDomains) != 2 {
				t.Errorf("an unreadable update changed what the source knows: %+v, before %+v", state, good)
			}
			if !strings.Contains(state.LastError.Error(), "cannot be used") {
				t.Errorf("the state says %v", state.LastError)
			}
			api.set(own.update(t), nil)
			untilStatus(t, source, identity.SourceReady)
		})
	}
}

// A partner's rubbish must not keep us from renewing our own SVID.
func TestSourceUnreadableForeignBundle(t *testing.T) {
	own, api := newAuthority(t, domain), newWorkloadAPI(t)
	update := own.update(t)
	update.FederatedBundles["spiffe://other.org"] = []byte("rubbish")
	update.FederatedBundles["no trust domain!"] = own.cert.Raw
	update.FederatedBundles["spiffe://empty.org"] = nil
	// Nor may it replace our own bundle.
	update.FederatedBundles[domain.IDString()] = newAuthority(t, domain).cert.Raw
	api.set(update, nil)
	api.start(t)
	source := startSource(t, identity.SourceConfig{Address: api.address})
	state := untilStatus(t, source, identity.SourceReady)
	if diff := cmp.Diff([]spiffeid.TrustDomain{domain}, state.TrustDomains, cmp.Comparer(sameDomain)); diff != "" {
		t.Fatalf("trust domains: %s", diff)
	}
	bundle, err := source.GetX509BundleForTrustDomain(domain)
	if err != nil || !bundle.HasX509Authority(own.cert) || len(bundle.X509Authorities()) != 1 {
		t.Fatalf("own bundle %+v (%v)", bundle, err)
	}
}

func TestSourceChoosesTheSVIDOfItsTrustDomain(t *testing.T) {
	own, other, api := newAuthority(t, domain), newAuthority(t, foreign), newWorkloadAPI(t)
	theirs := spiffeid.RequireFromString("spiffe://other.org/kms-agent")
	api.set(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{
		other.svid(t, theirs, nil), own.svid(t, agentID, nil), own.svid(t, orders, nil),
	}}, nil)
	api.start(t)
	for want, cfg := range map[spiffeid.ID]spiffeid.TrustDomain{agentID: domain, theirs: {}} {
		source := startSource(t, identity.SourceConfig{Address: api.address, TrustDomain: cfg})
		if state := untilStatus(t, source, identity.SourceReady); state.ID != want {
			t.Errorf("for trust domain %q the source chose %s, want %s", cfg.Name(), state.ID, want)
		}
	}
}

func TestSourceNeverHandsOutAnExpiredSVID(t *testing.T) {
	own, api, clk := newAuthority(t, domain), newWorkloadAPI(t), &clock{}
	api.set(own.update(t), nil)
	api.start(t)
	source := startSource(t, identity.SourceConfig{Address: api.address, Now: clk.now})
	untilStatus(t, source, identity.SourceReady)
	clk.forward(2 * time.Hour)
	if got := source.State().Status; got != identity.SourceExpired {
		t.Errorf("status %s, want %s", got, identity.SourceExpired)
	}
	_, err := source.GetX509SVID()
	if !errors.Is(err, identity.ErrNotReady) || !strings.Contains(err.Error(), "expired at") {
		t.Errorf("got %v, want an error that says it expired", err)
	}
}

func TestSourceDoesNotWaitForAHungWorkloadAPI(t *testing.T) {
	own, api := newAuthority(t, domain), newWorkloadAPI(t)
	api.start(t) // and says nothing
	source := startSource(t, identity.SourceConfig{Address: api.address, AnswerTimeout: 20 * time.Millisecond})
	state := until(t, source, "impatient", func(s identity.State) bool { return s.LastError != nil })
	if state.Status != identity.SourceStarting || !strings.Contains(state.LastError.Error(), "did not answer within 20ms") {
		t.Fatalf("while it hangs: %+v", state)
	}
	until(t, source, "persistent", func(identity.State) bool { return api.opened() > 3 })
	// The answer comes at once or the stream has ended: set it for all.
	api.set(own.update(t), nil)
	untilStatus(t, source, identity.SourceReady)
}

// A stream that stands is no proof that somebody still renews.
func TestSourceAsksAnewWhenRenewalIsOverdue(t *testing.T) {
	own, api := newAuthority(t, domain), newWorkloadAPI(t)
	nearlyOver := own.svid(t, agentID, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(-100 * time.Hour) })
	api.set(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{nearlyOver}}, nil)
	api.start(t)
	source := startSource(t, identity.SourceConfig{Address: api.address})
	untilStatus(t, source, identity.SourceReady)
	until(t, source, "impatient", func(identity.State) bool { return api.opened() > 2 })
}

func TestSourceWaitReady(t *testing.T) {
	own, api := newAuthority(t, domain), newWorkloadAPI(t)
	source := startSource(t, identity.SourceConfig{Address: api.address})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err := source.WaitReady(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, identity.ErrNotReady) {
		t.Fatalf("got %v, want the deadline and the reason", err)
	}
	api.set(own.update(t), nil)
	api.start(t)
	ctx, cancel = context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := source.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestSourceRunsOnce(t *testing.T) {
	api := newWorkloadAPI(t)
	source := startSource(t, identity.SourceConfig{Address: api.address})
	until(t, source, "running", func(s identity.State) bool { return s.LastError != nil })
	if err := source.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "running already") {
		t.Fatalf("second Run: %v", err)
	}
}

func TestNewSourceFaults(t *testing.T) {
	for _, address := range []string{"", "/run/api.sock", "tcp://localhost:80", "http://x", "unix:///x?y"} {
		if _, err := identity.NewSource(identity.SourceConfig{Address: address}); err == nil {
			t.Errorf("address %q was taken", address)
		}
	}
	if _, err := identity.NewSource(identity.SourceConfig{Address: "unix:///x", BundleMaxAge: -1}); err == nil {
		t.Error("a negative duration was taken")
	}
}
