package identity

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const oneKey = `{"keys":[{"kty":"EC","crv":"P-256","kid":"KID","x":"WKn-ZIGevcwGIyyrzFoZNBdaq9_TsqzGl96oc0CWuis","y":"y77t-RvAHRKTsSGdIYUfweuOvwrvDD-Q3Hv5J0fSKbE"}]}`

// What was accepted stands when the Workload API says again what it said before,
// as after each reconnection, and falls when it says anything else.
func TestTheSameJWTBundlesAreTheSameBasis(t *testing.T) {
	source, err := NewSource(SourceConfig{Address: "unix:///api.sock", JWTBundles: true})
	if err != nil {
		t.Fatal(err)
	}
	basis := func(bundles map[string]string) *jwtTrust {
		update := &workload.JWTBundlesResponse{Bundles: map[string][]byte{}}
		for name, document := range bundles {
			update.Bundles[name] = []byte(document)
		}
		source.applyJWT(update)
		return source.jwt.Load().trust
	}
	first := basis(map[string]string{"spiffe://example.org": oneKey})
	if len(first.bundles) != 1 || len(first.bundles[spiffeid.RequireTrustDomainFromString("example.org")].JWTAuthorities()) != 1 {
		t.Fatalf("the bundle was not read: %+v", first)
	}
	if basis(map[string]string{"spiffe://example.org": oneKey}) != first {
		t.Error("the same bundles are another basis")
	}
	for name, bundles := range map[string]map[string]string{
		"none": {}, "empty": {"spiffe://example.org": `{"keys":[]}`}, "another domain": {"spiffe://other.org": oneKey},
		"one more": {"spiffe://example.org": oneKey, "spiffe://other.org": oneKey},
	} {
		if basis(bundles) == first {
			t.Errorf("%s is the same basis", name)
		}
		first = basis(map[string]string{"spiffe://example.org": oneKey})
	}
}
