package client_test

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
	"github.com/kms-agent/kms-agent/client"
)

// operations are all unary ones, each with a request of its own.
func operations(c *client.Client) map[string]struct {
	request proto.Message
	call    func(context.Context) (proto.Message, error)
} {
	type op = struct {
		request proto.Message
		call    func(context.Context) (proto.Message, error)
	}
	encrypt := &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: []byte("a"), Context: map[string]string{"a": "b"}, MaxStale: durationpb.New(0)}
	decrypt := &kmsagentv1.DecryptRequest{Message: []byte("b")}
	reencrypt := &kmsagentv1.ReEncryptRequest{Message: []byte("c"), DestinationKey: "new"}
	generate := &kmsagentv1.GenerateDataKeyRequest{Key: "d"}
	without := &kmsagentv1.GenerateDataKeyWithoutPlaintextRequest{Key: "e"}
	open := &kmsagentv1.DecryptDataKeyRequest{EncryptedDataKey: edk}
	wrap := &kmsagentv1.WrapRequest{Key: "f", Plaintext: []byte("g")}
	unwrap := &kmsagentv1.UnwrapRequest{Wrapped: edk}
	random := &kmsagentv1.GenerateRandomRequest{Length: 5}
	describe := &kmsagentv1.DescribeKeyRequest{Key: "h"}
	list := &kmsagentv1.ListKeysRequest{PageToken: "i"}
	return map[string]op{
		"Encrypt":         {encrypt, func(ctx context.Context) (proto.Message, error) { return c.Encrypt(ctx, encrypt) }},
		"Decrypt":         {decrypt, func(ctx context.Context) (proto.Message, error) { return c.Decrypt(ctx, decrypt) }},
		"ReEncrypt":       {reencrypt, func(ctx context.Context) (proto.Message, error) { return c.ReEncrypt(ctx, reencrypt) }},
		"GenerateDataKey": {generate, func(ctx context.Context) (proto.Message, error) { return c.GenerateDataKey(ctx, generate) }},
		"GenerateDataKeyWithoutPlaintext": {without, func(ctx context.Context) (proto.Message, error) {
			return c.GenerateDataKeyWithoutPlaintext(ctx, without)
		}},
		"DecryptDataKey": {open, func(ctx context.Context) (proto.Message, error) { return c.DecryptDataKey(ctx, open) }},
		"Wrap":           {wrap, func(ctx context.Context) (proto.Message, error) { return c.Wrap(ctx, wrap) }},
		"Unwrap":         {unwrap, func(ctx context.Context) (proto.Message, error) { return c.Unwrap(ctx, unwrap) }},
		"GenerateRandom": {random, func(ctx context.Context) (proto.Message, error) { return c.GenerateRandom(ctx, random) }},
		"DescribeKey":    {describe, func(ctx context.Context) (proto.Message, error) { return c.DescribeKey(ctx, describe) }},
		"ListKeys":       {list, func(ctx context.Context) (proto.Message, error) { return c.ListKeys(ctx, list) }},
		"WhoAmI":         {&kmsagentv1.WhoAmIRequest{}, func(ctx context.Context) (proto.Message, error) { return c.WhoAmI(ctx) }},
	}
}

func TestOperations(t *testing.T) {
	k := &kms{}
	all := operations(plain(t, k))
	// Every unary operation of the protocol, and the two streams, have a method.
	if got, want := len(all)+2, kmsagentv1.File_kmsagent_v1_kms_proto.Services().Get(0).Methods().Len(); got != want {
		t.Fatalf("%d operations are tested, the protocol has %d", got, want)
	}
	for name, op := range all {
		got, err := op.call(patiently(t))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if diff := cmp.Diff(op.request, k.lastAsked(), protocmp.Transform()); diff != "" {
			t.Errorf("%s: the agent was asked something else: %s", name, diff)
		}
		if want := "kmsagent.v1." + name + "Response"; string(got.ProtoReflect().Descriptor().FullName()) != want {
			t.Errorf("%s: answer is a %s", name, got.ProtoReflect().Descriptor().FullName())
		}
	}
}

func detailed(t testing.TB, code codes.Code, message string, details ...protoadapt.MessageV1) error {
	t.Helper()
	st, err := status.New(code, message).WithDetails(details...)
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}

func TestErrors(t *testing.T) {
	info := &errdetails.ErrorInfo{Domain: "kms-agent", Reason: "BACKEND_DOWN", Metadata: map[string]string{"key": "orders", "request_id": "r-1"}}
	k := &kms{fail: detailed(t, codes.Unavailable, "the backend is down", info, &errdetails.RetryInfo{RetryDelay: durationpb.New(3 * time.Second)})}
	want := client.Error{
		Code: codes.Unavailable, Reason: "BACKEND_DOWN", Key: "orders", RequestID: "r-1",
		Message: "the backend is down", RetryAfter: 3 * time.Second,
	}
	for name, op := range operations(plain(t, k)) {
		answer, err := op.call(patiently(t))
		var e *client.Error
		if !errors.As(err, &e) {
			t.Errorf("%s: got %v (%T), want a *client.Error", name, err, err)
			continue
		}
		if e.Code != want.Code || e.Reason != want.Reason || e.Key != want.Key || e.RequestID != want.RequestID ||
			e.Message != want.Message || e.RetryAfter != want.RetryAfter {
			t.Errorf("%s: got %+v, want %+v", name, e, &want)
		}
		if got := e.Error(); got != "kms-agent: the backend is down (BACKEND_DOWN, request r-1)" {
			t.Errorf("%s: says %q", name, got)
		}
		if status.Code(err) != codes.Unavailable {
			t.Errorf("%s: status code %v", name, status.Code(err))
		}
		if answer.ProtoReflect().IsValid() {
			t.Errorf("%s: an answer beside an error: %v", name, answer)
		}
	}
}

func TestErrorsOfOthers(t *testing.T) {
	foreign := &errdetails.ErrorInfo{Domain: "example.org", Reason: "X", Metadata: map[string]string{"key": "y"}}
	negative := &errdetails.RetryInfo{RetryDelay: durationpb.New(-time.Second)}
	invalid := &errdetails.RetryInfo{RetryDelay: &durationpb.Duration{Seconds: 1, Nanos: -1}}
	c := plain(t, &kms{fail: detailed(t, codes.Internal, "odd", foreign, negative, invalid)})
	_, err := c.WhoAmI(patiently(t))
	var e *client.Error
	if !errors.As(err, &e) || e.Reason != "" || e.Key != "" || e.RetryAfter != 0 || e.Error() != "kms-agent: odd (Internal)" {
		t.Errorf("got %+v", err)
	}

	nobody := dial(t, client.Options{Socket: filepath.Join(tempDir(t), "s"), Retry: -1})
	if _, err := nobody.WhoAmI(patiently(t)); !errors.As(err, &e) || e.Code != codes.Unavailable || !strings.Contains(e.Message, "no such file") {
		t.Errorf("without an agent: got %+v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.WhoAmI(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cancelled: got %+v", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 0)
	defer cancel()
	if _, err := c.WhoAmI(ctx); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		t.Errorf("too late: got %+v", err)
	}
}

func TestProofs(t *testing.T) {
	elsewhere := spiffeid.RequireTrustDomainFromString("other.local")
	own := issue(t, domain, agentID, orders, spiffeid.RequireFromString("spiffe://dev.local/impostor"))
	foreign := issue(t, elsewhere, spiffeid.RequireFromString("spiffe://other.local/kms-agent"))
	agent, impostor, stranger := proven(t, &kms{}, own[0]), proven(t, &kms{}, own[2]), proven(t, &kms{}, foreign[0])
	unproven, _ := static(t, &kms{})

	cases := map[string]struct {
		options client.Options
		text    string // empty: served
	}{
		"own trust domain":                  {client.Options{Socket: agent, WorkloadAPI: own[1]}, ""},
		"exact ID":                          {client.Options{Socket: agent, WorkloadAPI: own[1], AgentID: spiffeid.MatchID(agentID)}, ""},
		"another of the own trust domain":   {client.Options{Socket: impostor, WorkloadAPI: own[1]}, ""},
		"another than the exact ID":         {client.Options{Socket: impostor, WorkloadAPI: own[1], AgentID: spiffeid.MatchID(agentID)}, "is not the expected agent"},
		"foreign server":                    {client.Options{Socket: stranger, WorkloadAPI: own[1]}, "could not get X509 bundle"},
		"server without proof":              {client.Options{Socket: unproven, WorkloadAPI: own[1]}, "tls: "},
		"plaintext to a server of no peers": {client.Options{Socket: agent}, "not identified"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			who, err := dial(t, c.options).WhoAmI(patiently(t))
			if c.text == "" {
				if err != nil || who.GetSpiffeId() != orders.String() || who.GetProof() != "x509-svid" {
					t.Fatalf("got %v, %v", who, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.text) {
				t.Fatalf("got %v, %v, want an error that says %q", who, err, c.text)
			}
		})
	}

	source, err := workloadapi.NewX509Source(patiently(t), workloadapi.WithClientOptions(workloadapi.WithAddr(own[1])))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = source.Close() }()
	c := dial(t, client.Options{Socket: agent, Source: source})
	if who, err := c.WhoAmI(patiently(t)); err != nil || who.GetSpiffeId() != orders.String() {
		t.Errorf("with a given source: %v, %v", who, err)
	}
	_ = c.Close()
	if _, err := source.GetX509SVID(); err != nil {
		t.Errorf("Close took the caller's source away: %v", err)
	}
	if who, err := dial(t, client.Options{Socket: unproven}).WhoAmI(patiently(t)); err != nil || who.GetProof() != "static-peer" {
		t.Errorf("in plain: %v, %v", who, err)
	}
}

// denying is a Workload API that has one answer.
type denying struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	err error
}

func (d *denying) FetchX509SVID(_ *workload.X509SVIDRequest, s grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if d.err == nil {
		<-s.Context().Done()
		return s.Context().Err()
	}
	return d.err
}

func deny(t testing.TB, path string, err error) string {
	t.Helper()
	serveOn(t, path, func(s *grpc.Server) { workload.RegisterSpiffeWorkloadAPIServer(s, &denying{err: err}) })
	return "unix://" + path
}

func TestDialFaults(t *testing.T) {
	dir := tempDir(t)
	denied := deny(t, filepath.Join(dir, "denied"), status.Error(codes.PermissionDenied, "no identity issued"))
	invalid := deny(t, filepath.Join(dir, "invalid"), status.Error(codes.InvalidArgument, "no"))
	hung := deny(t, filepath.Join(dir, "hung"), nil)
	source := &workloadapi.X509Source{}
	soon := 50 * time.Millisecond
	cases := map[string]struct {
		options client.Options
		text    string
	}{
		"relative socket":    {client.Options{Socket: "kms.sock"}, "no absolute path"},
		"address and source": {client.Options{Socket: "/s", WorkloadAPI: denied, Source: source}, "not both"},
		"ID in plain":        {client.Options{Socket: "/s", AgentID: spiffeid.MatchAny()}, "cannot be checked"},
		"rubbish address":    {client.Options{Socket: "/s", WorkloadAPI: "/run/api.sock"}, "write it as unix:///path"},
		"denied":             {client.Options{Socket: "/s", WorkloadAPI: denied}, "register it as a workload"},
		"invalid":            {client.Options{Socket: "/s", WorkloadAPI: invalid}, "gave no X.509-SVID"},
		"hung":               {client.Options{Socket: "/s", WorkloadAPI: hung, Wait: soon}, "is it running?"},
		"not there":          {client.Options{Socket: "/s", WorkloadAPI: "unix://" + filepath.Join(dir, "missing"), Wait: soon}, "is it running?"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			got, err := client.Dial(patiently(t), c.options)
			if err == nil {
				_ = got.Close()
				t.Fatal("it went well")
			}
			if !strings.Contains(err.Error(), c.text) || !strings.HasPrefix(err.Error(), "connect to the agent: ") {
				t.Fatalf("got %q, want it to say %q", err, c.text)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := client.Dial(ctx, client.Options{Socket: "/s", WorkloadAPI: hung}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: got %v", err)
	}
}

// The agent's socket may appear after the client.
func TestClientBeforeAgent(t *testing.T) {
	k := &kms{}
	path, stop := static(t, k)
	c := dial(t, client.Options{Socket: path, Retry: -1})
	if _, err := c.WhoAmI(patiently(t)); err != nil {
		t.Fatal(err)
	}
	stop()
	if _, err := c.WhoAmI(patiently(t)); status.Code(err) != codes.Unavailable {
		t.Fatalf("without an agent: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatalf("second Close: %v", err)
	}
	if _, err := c.WhoAmI(patiently(t)); err == nil {
		t.Fatal("a closed client calls")
	}
}
