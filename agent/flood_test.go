package agent_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

func (r *rig) token(workload string) string {
	r.t.Helper()
	svid, err := workloadapi.FetchJWTSVID(r.t.Context(), jwtsvid.Params{Audience: ownAudience}, workloadapi.WithAddr("unix://"+r.path("api/"+workload+".sock")))
	if err != nil {
		r.t.Fatal(err)
	}
	return svid.Marshal()
}

// A local user who sends bad tokens without end is turned away unheard, on record
// as a count, and told when to come back.
func TestBadTokensWithoutEnd(t *testing.T) {
	r := newRig(t, configText())
	r.start()
	r.awaitJWTBundles()
	c := kmsagentv1.NewKMSClient(r.plain())
	who := func(token string) error {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token)
		_, err := c.WhoAmI(ctx, &kmsagentv1.WhoAmIRequest{})
		return err
	}
	known := r.token("orders")
	if err := who(known); err != nil {
		t.Fatal(err)
	}
	signed := strings.LastIndexByte(known, '.') + 1
	bad := known[:signed] + strings.Repeat("A", len(known)-signed)
	err := who(bad)
	for n := 0; status.Code(err) == codes.Unauthenticated; n++ {
		if n > 10_000 {
			t.Fatal("any number of bad tokens is looked at")
		}
		err = who(bad)
	}
	if st := status.Convert(err); st.Code() != codes.ResourceExhausted || !strings.Contains(fmt.Sprint(st.Details()), "retry_delay") {
		t.Errorf("error = %v with %v, want RESOURCE_EXHAUSTED that says when to retry", err, st.Details())
	}
	if err := who(known); err != nil {
		t.Errorf("a token that is known: %v", err)
	}
	if _, err := r.as("orders").WhoAmI(t.Context()); err != nil {
		t.Errorf("an X.509-SVID: %v", err)
	}
	for range 10 {
		_ = who(bad)
	}
	if log := r.auditText(); strings.Count(log, "\n") > 50 || !strings.Contains(log, `"outcome":"denied","reason":"TOO_MANY_REQUESTS"`) {
		t.Errorf("want each kind of denial once, and a count of the rest:\n%s", log)
	}
}
