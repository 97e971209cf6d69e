package client_test

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kms-agent/kms-agent/client"
	"github.com/kms-agent/kms-agent/identity"
	"github.com/kms-agent/kms-agent/identity/issuer"
)

// bearers is an agent that takes JWT-SVIDs which last a second, and the address
// where the workload gets its own; stop ends the Workload API.
func bearers(t testing.TB) (socket, api string, stop func()) {
	t.Helper()
	dir := tempDir(t)
	own, theirs := filepath.Join(dir, "agent.sock"), filepath.Join(dir, "orders.sock")
	i, err := issuer.New(issuer.Config{
		TrustDomain: domain, JWTTTL: time.Second, Sockets: map[string]spiffeid.ID{own: agentID, theirs: orders},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- i.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("issuer: %v", err)
		}
	})
	t.Cleanup(stop)
	source, err := identity.NewSource(identity.SourceConfig{Address: issuer.AddressOf(own), JWTBundles: true})
	if err != nil {
		t.Fatal(err)
	}
	run(t, source.Run)
	if err := errors.Join(source.WaitReady(patiently(t)), source.WaitJWTBundles(patiently(t))); err != nil {
		t.Fatal(err)
	}
	socket, _ = serve(t, &kms{}, identity.Config{Source: source})
	return socket, issuer.AddressOf(theirs), stop
}

// Calls go on although each token lasts for seconds only, until there is no new.
func TestJWTSVID(t *testing.T) {
	socket, api, stop := bearers(t)
	c := dial(t, client.Options{Socket: socket, WorkloadAPI: api, JWTAudience: agentID.String(), Retry: -1})
	for began := time.Now(); time.Since(began) < 2500*time.Millisecond; {
		who, err := c.WhoAmI(patiently(t))
		if err != nil || who.GetSpiffeId() != orders.String() || who.GetProof() != "jwt-svid" {
			t.Fatalf("got %v, %v", who, err)
		}
		<-tick()
	}
	stop()
	for began := time.Now(); ; {
		if time.Since(began) > 20*time.Second {
			t.Fatal("it goes on without a token")
		}
		_, err := c.WhoAmI(patiently(t))
		if err == nil || strings.Contains(err.Error(), "its SVID has expired") { // on its way
			<-tick()
			continue
		}
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "the Workload API gave no other") {
			t.Fatalf("got %v, want Unavailable and why", err)
		}
		return
	}
}

func TestJWTSVIDFaults(t *testing.T) {
	socket, api, _ := bearers(t)
	c := dial(t, client.Options{Socket: socket, WorkloadAPI: api, JWTAudience: "spiffe://dev.local/another"})
	if who, err := c.WhoAmI(patiently(t)); err == nil || !strings.Contains(err.Error(), "expected audience") {
		t.Errorf("for another audience: got %v, %v", who, err)
	}
	denied := deny(t, filepath.Join(tempDir(t), "denied"), status.Error(codes.PermissionDenied, "no identity issued"))
	for name, c := range map[string]struct {
		options client.Options
		text    string
	}{
		"no Workload API":      {client.Options{Socket: "/s", JWTAudience: "a"}, "give its address"},
		"a source":             {client.Options{Socket: "/s", JWTAudience: "a", Source: &workloadapi.X509Source{}}, "give its address"},
		"an ID to check":       {client.Options{Socket: "/s", JWTAudience: "a", WorkloadAPI: api, AgentID: spiffeid.MatchAny()}, "cannot be checked"},
		"denied":               {client.Options{Socket: "/s", JWTAudience: "a", WorkloadAPI: denied}, "register it as a workload"},
		"no Workload API here": {client.Options{Socket: "/s", JWTAudience: "a", WorkloadAPI: "unix:///missing/s", Wait: time.Millisecond}, "gave no JWT-SVID in time"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := client.Dial(patiently(t), c.options)
			if err == nil {
				_ = got.Close()
				t.Fatal("it went well")
			}
			if !strings.Contains(err.Error(), c.text) {
				t.Fatalf("got %q, want it to say %q", err, c.text)
			}
		})
	}
}

// FetchJWTSVID implements the Workload API.
func (d *denying) FetchJWTSVID(context.Context, *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	return nil, d.err
}
