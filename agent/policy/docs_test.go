package policy_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/identity"
)

// The example of docs/policy.md loads and decides as its table says.
func TestDocumentedPolicy(t *testing.T) {
	text, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindSubmatch(text)
	if block == nil {
		t.Fatal("docs/policy.md has no YAML")
	}
	var file struct {
		Roles  map[string][]policy.Operation `yaml:"roles"`
		Policy []policy.Rule                 `yaml:"policy"`
	}
	if err := yaml.UnmarshalWithOptions(block[1], &file, yaml.Strict()); err != nil {
		t.Fatal(err)
	}
	p, err := policy.Compile(policy.Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Rules: file.Policy, Roles: file.Roles,
	})
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile(`(?m)^\| (spiffe://\S+) \| (\S+) \| (\S*) ?\| (allowed|denied) \| (\S*) ?\|$`).FindAllStringSubmatch(string(text), -1)
	if len(rows) != 11 {
		t.Fatalf("found %d rows in the table, want 11", len(rows))
	}
	for _, row := range rows {
		c := identity.Caller{ID: spiffeid.RequireFromString(row[1]), Proof: identity.ProofX509SVID}
		d := p.Decide(policy.Request{Caller: c, Operation: policy.Operation(row[2]), Key: row[3]})
		if d.Allowed != (row[4] == "allowed") || d.Rule != row[5] {
			t.Errorf("%s: got %+v", row[0], d)
		}
	}
}

func TestEveryOperationAndProofIsDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range policy.Operations() {
		if !strings.Contains(string(text), "\n| `"+string(o)+"` | ") {
			t.Errorf("operation %s is not in the table of docs/policy.md", o)
		}
	}
	for _, p := range []identity.Proof{identity.ProofX509SVID, identity.ProofJWTSVID, identity.ProofAttestedPeer, identity.ProofStaticPeer} {
		if !strings.Contains(string(text), "\n| `"+string(p)+"` | ") {
			t.Errorf("proof %s is not in the table of docs/policy.md", p)
		}
	}
}
