package policy_test

import (
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/identity"
)

// documented is a policy of docs/policy.md and the table of decisions below it.
type documented struct {
	policy *policy.Policy
	rows   [][]string
}

// The examples of docs/policy.md load and decide as their tables say.
func TestDocumentedPolicies(t *testing.T) {
	examples := documentedPolicies(t)
	if len(examples) < 4 {
		t.Fatalf("docs/policy.md has %d examples, want 4 at least", len(examples))
	}
	for _, example := range examples {
		if len(example.rows) < 3 {
			t.Errorf("an example has %d rows, want 3 at least", len(example.rows))
		}
		for _, row := range example.rows {
			d := example.policy.Decide(documentedRequest(t, row))
			if d.Allowed != (row[4] == "allowed") || d.Rule != row[5] {
				t.Errorf("%s: got %+v", strings.Join(row, " | "), d)
			}
		}
	}
}

func documentedPolicies(t *testing.T) []documented {
	t.Helper()
	text, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	var examples []documented
	row := regexp.MustCompile(`(?m)^\| (spiffe://\S+) \| (\S+) \| (\S*) ?\|(?: ([^|]*?) ?\|)? (allowed|denied) \| (\S*) ?\|$`)
	for _, part := range strings.Split(string(text), "```yaml\n")[1:] {
		block, rest, _ := strings.Cut(part, "```")
		if !strings.Contains(block, "policy:\n") {
			continue
		}
		var file struct {
			Roles  map[string][]policy.Operation `yaml:"roles"`
			Policy []policy.Rule                 `yaml:"policy"`
		}
		if err := yaml.UnmarshalWithOptions([]byte(block), &file, yaml.Strict()); err != nil {
			t.Fatal(err)
		}
		p, err := policy.Compile(policy.Config{
			TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Rules: file.Policy, Roles: file.Roles,
		})
		if err != nil {
			t.Fatal(err)
		}
		example := documented{policy: p}
		for _, match := range row.FindAllStringSubmatch(rest, -1) {
			example.rows = append(example.rows, match[1:])
		}
		examples = append(examples, example)
	}
	return examples
}

func documentedRequest(t *testing.T, row []string) policy.Request {
	t.Helper()
	r := policy.Request{
		Caller:    identity.Caller{ID: spiffeid.RequireFromString(row[0]), Proof: identity.ProofX509SVID},
		Operation: policy.Operation(row[1]), Key: row[2], PeerUnknown: true,
		Context: map[string]string{}, Labels: map[string]string{},
	}
	for _, more := range strings.Fields(row[3]) {
		name, value, _ := strings.Cut(more, "=")
		var err error
		switch {
		case strings.HasPrefix(name, "context."):
			r.Context[strings.TrimPrefix(name, "context.")] = value
		case strings.HasPrefix(name, "label."):
			r.Labels[strings.TrimPrefix(name, "label.")] = value
		case name == "time":
			r.Time, err = time.Parse(time.RFC3339, value)
		case name == "proof":
			r.Caller.Proof = identity.Proof(value)
		case name == "uid":
			var uid uint64
			uid, err = strconv.ParseUint(value, 10, 32)
			r.Caller.Peer.UID, r.PeerUnknown = uint32(uid), false
		default:
			t.Errorf("%q means nothing", more)
		}
		if err != nil {
			t.Error(err)
		}
	}
	return r
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
