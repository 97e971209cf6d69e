package plugins_test

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/json"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pluginv1 "github.com/kms-agent/kms-agent/api/plugin/v1"
	"github.com/kms-agent/kms-agent/plugins"
)

// liar answers every call with what it was given.
type liar struct {
	pluginv1.UnimplementedBackendServer

	open *pluginv1.OpenResponse
	// capabilities are what opened makes it name.
	capabilities []string
	wrap         *pluginv1.WrapResponse
	unwrap       *pluginv1.UnwrapResponse
	describe     *pluginv1.DescribeResponse
	check        *pluginv1.CheckResponse
	random       *pluginv1.RandomResponse // nil: a plugin from before the RPC
}

func (l *liar) Open(context.Context, *pluginv1.OpenRequest) (*pluginv1.OpenResponse, error) {
	return l.open, nil
}

func (l *liar) Wrap(context.Context, *pluginv1.WrapRequest) (*pluginv1.WrapResponse, error) {
	return l.wrap, nil
}

func (l *liar) Unwrap(context.Context, *pluginv1.UnwrapRequest) (*pluginv1.UnwrapResponse, error) {
	return l.unwrap, nil
}

func (l *liar) Describe(context.Context, *pluginv1.DescribeRequest) (*pluginv1.DescribeResponse, error) {
	return l.describe, nil
}

func (l *liar) Check(context.Context, *pluginv1.CheckRequest) (*pluginv1.CheckResponse, error) {
	return l.check, nil
}

func (l *liar) Random(ctx context.Context, q *pluginv1.RandomRequest) (*pluginv1.RandomResponse, error) {
	if l.random == nil {
		return l.UnimplementedBackendServer.Random(ctx, q)
	}
	return l.random, nil
}

func dial(t *testing.T, service pluginv1.BackendServer) *plugins.Remote {
	t.Helper()
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	pluginv1.RegisterBackendServer(server, service)
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:plugin", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
		if err := <-done; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Errorf("Serve: %v", err)
		}
	})
	return plugins.NewRemote(conn)
}

func publicKey(t *testing.T) []byte {
	t.Helper()
	key, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key.PublicKey().Bytes()
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

var key = plugins.KeyRef{URI: "local:orders", Version: "1"}

func TestOpenRefusesMalformedAnswers(t *testing.T) {
	good := publicKey(t)
	for name, answer := range map[string]*pluginv1.OpenResponse{
		"empty":                     {},
		"no name":                   {PluginPublicKey: good},
		"a name too long":           {Name: strings.Repeat("n", 2000), PluginPublicKey: good},
		"no public key":             {Name: "n"},
		"half a public key":         {Name: "n", PluginPublicKey: good[:32]},
		"a public key of zeros":     {Name: "n", PluginPublicKey: make([]byte, 65)},
		"too many capabilities":     {Name: "n", PluginPublicKey: good, Capabilities: make([]string, 65)},
		"a capability without name": {Name: "n", PluginPublicKey: good, Capabilities: []string{""}},
	} {
		r := dial(t, &liar{open: answer})
		if _, err := r.Open(bounded(t), nil); plugins.ClassOf(err) != plugins.Internal {
			t.Errorf("%s: got %v, want Internal", name, err)
		}
		if _, err := r.Wrap(bounded(t), key, []byte{1}, plugins.Binding{}); plugins.ClassOf(err) != plugins.Internal {
			t.Errorf("%s: Wrap without a session: got %v, want Internal", name, err)
		}
	}
}

func opened(t *testing.T, l *liar) *plugins.Remote {
	t.Helper()
	l.open = &pluginv1.OpenResponse{Name: "liar", PluginPublicKey: publicKey(t), Capabilities: l.capabilities}
	r := dial(t, l)
	if _, err := r.Open(bounded(t), nil); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestMaterialAnswersAreChecked(t *testing.T) {
	for name, l := range map[string]*liar{
		"empty":    {wrap: &pluginv1.WrapResponse{}, unwrap: &pluginv1.UnwrapResponse{}},
		"oversize": {wrap: &pluginv1.WrapResponse{Ciphertext: make([]byte, plugins.MaxCiphertextSize+1)}, unwrap: sealed(12, 5000)},
		// 32 bytes that were sealed under no key of the session, or in clear.
		"not sealed":    {wrap: &pluginv1.WrapResponse{}, unwrap: sealed(12, 48)},
		"a short nonce": {wrap: &pluginv1.WrapResponse{}, unwrap: sealed(11, 48)},
		"only a tag":    {wrap: &pluginv1.WrapResponse{}, unwrap: sealed(12, 16)},
		"beyond a message": {
			wrap:   &pluginv1.WrapResponse{Ciphertext: make([]byte, 5<<20)},
			unwrap: sealed(12, 5<<20),
		},
	} {
		r := opened(t, l)
		if got, err := r.Wrap(bounded(t), key, []byte{1}, plugins.Binding{}); plugins.ClassOf(err) != plugins.Internal || got != nil {
			t.Errorf("Wrap answered with %s: got %d bytes and %v, want Internal", name, len(got), err)
		}
		if got, err := r.Unwrap(bounded(t), key, []byte{1}, plugins.Binding{}); plugins.ClassOf(err) != plugins.Internal || got != nil {
			t.Errorf("Unwrap answered with %s: got %d bytes and %v, want Internal", name, len(got), err)
		}
	}
}

func sealed(nonce, ciphertext int) *pluginv1.UnwrapResponse {
	return &pluginv1.UnwrapResponse{Plaintext: &pluginv1.Sealed{Nonce: make([]byte, nonce), Ciphertext: make([]byte, ciphertext)}}
}

func TestDescriptionsAreChecked(t *testing.T) {
	version := func(name string, state pluginv1.KeyVersion_State) *pluginv1.KeyVersion {
		return &pluginv1.KeyVersion{Version: name, State: state}
	}
	one := version("1", pluginv1.KeyVersion_STATE_ENABLED)
	many := make([]*pluginv1.KeyVersion, plugins.MaxVersions+1)
	for i := range many {
		many[i] = version(strings.Repeat("v", i%9+1), pluginv1.KeyVersion_STATE_ENABLED)
	}
	for name, answer := range map[string]*pluginv1.DescribeResponse{
		"empty":                   {},
		"no versions":             {CurrentVersion: "1"},
		"no current version":      {Versions: []*pluginv1.KeyVersion{one}},
		"current is not listed":   {CurrentVersion: "2", Versions: []*pluginv1.KeyVersion{one}},
		"a version twice":         {CurrentVersion: "1", Versions: []*pluginv1.KeyVersion{one, one}},
		"a version without name":  {CurrentVersion: "1", Versions: []*pluginv1.KeyVersion{one, version("", 1)}},
		"a state not specified":   {CurrentVersion: "1", Versions: []*pluginv1.KeyVersion{version("1", 0)}},
		"a state unknown to us":   {CurrentVersion: "1", Versions: []*pluginv1.KeyVersion{version("1", 4)}},
		"a state that wraps to 1": {CurrentVersion: "1", Versions: []*pluginv1.KeyVersion{version("1", 257)}},
		"a negative state":        {CurrentVersion: "1", Versions: []*pluginv1.KeyVersion{version("1", -255)}},
		"too many versions":       {CurrentVersion: "v", Versions: many},
		"an impossible time": {CurrentVersion: "1", Versions: []*pluginv1.KeyVersion{
			{Version: "1", State: 1, Created: &timestamppb.Timestamp{Seconds: -1 << 60}},
		}},
	} {
		if d, err := opened(t, &liar{describe: answer}).Describe(bounded(t), "local:orders"); plugins.ClassOf(err) != plugins.Internal {
			t.Errorf("%s: got %+v and %v, want Internal", name, d, err)
		}
	}
}

func TestChecksAreChecked(t *testing.T) {
	r := opened(t, &liar{check: &pluginv1.CheckResponse{UpstreamLatency: durationpb.New(-time.Second)}})
	if _, err := r.Check(bounded(t)); plugins.ClassOf(err) != plugins.Internal {
		t.Errorf("negative latency: got %v, want Internal", err)
	}
	r = opened(t, &liar{check: &pluginv1.CheckResponse{Detail: "fine\x1b[2J" + strings.Repeat("x", 5000)}})
	h, err := r.Check(bounded(t))
	if err != nil || len(h.Detail) > 1100 || strings.Contains(h.Detail, "\x1b") {
		t.Errorf("a harmful detail: got %q and %v, want it bounded and printable", h.Detail, err)
	}
}

func TestRequestsAreCheckedBeforeTheyAreSent(t *testing.T) {
	r := opened(t, &liar{})
	long := plugins.KeyRef{URI: strings.Repeat("u", plugins.MaxNameSize+1), Version: "1"}
	for name, c := range map[string]struct {
		key       plugins.KeyRef
		plaintext []byte
	}{
		"no material":       {key, nil},
		"too much material": {key, make([]byte, plugins.MaxMaterialSize+1)},
		"no URI":            {plugins.KeyRef{Version: "1"}, []byte{1}},
		"no version":        {plugins.KeyRef{URI: "local:orders"}, []byte{1}},
		"a long URI":        {long, []byte{1}},
		"not UTF-8":         {plugins.KeyRef{URI: "\xff", Version: "1"}, []byte{1}},
	} {
		if _, err := r.Wrap(bounded(t), c.key, c.plaintext, plugins.Binding{}); plugins.ClassOf(err) != plugins.Invalid {
			t.Errorf("Wrap with %s: got %v, want Invalid", name, err)
		}
	}
	for _, ciphertext := range [][]byte{nil, make([]byte, plugins.MaxCiphertextSize+1)} {
		if _, err := r.Unwrap(bounded(t), key, ciphertext, plugins.Binding{}); plugins.ClassOf(err) != plugins.BadCiphertext {
			t.Errorf("Unwrap of %d bytes: got %v, want BadCiphertext", len(ciphertext), err)
		}
	}
	if _, err := r.Describe(bounded(t), ""); plugins.ClassOf(err) != plugins.Invalid {
		t.Errorf("Describe of nothing: got %v, want Invalid", err)
	}
}

func TestRemoteSealsMaterial(t *testing.T) {
	spy := &spy{liar: &liar{wrap: &pluginv1.WrapResponse{Ciphertext: []byte{1}}}}
	spy.open = &pluginv1.OpenResponse{Name: "spy", PluginPublicKey: publicKey(t)}
	r := dial(t, spy)
	if _, err := r.Open(bounded(t), json.RawMessage(`{}`)); err != nil {
		t.Fatal(err)
	}
	secret := bytes.Repeat([]byte("secret"), 8)
	if _, err := r.Wrap(bounded(t), key, secret, plugins.Binding{}); err != nil {
		t.Fatal(err)
	}
	if text := spy.request.String(); strings.Contains(text, "secret") {
		t.Errorf("key material crosses in clear: %s", text)
	}
	if got := len(spy.request.GetPlaintext().GetCiphertext()); got != len(secret)+16 {
		t.Errorf("sealed material: got %d bytes, want %d", got, len(secret)+16)
	}
}

type spy struct {
	*liar
	request *pluginv1.WrapRequest
}

func (s *spy) Wrap(_ context.Context, r *pluginv1.WrapRequest) (*pluginv1.WrapResponse, error) {
	s.request = r
	return s.wrap, nil
}

func TestServeByHand(t *testing.T) {
	if err := plugins.Serve(nil); !errors.Is(err, plugins.ErrByHand) {
		t.Errorf("got %v, want ErrByHand", err)
	}
}

// A plugin that does not have the capability is not asked, whatever its age; one that has
// it is not believed.
func TestRandomAnswersAreChecked(t *testing.T) {
	random := []string{plugins.CapabilityRandom}
	for name, c := range map[string]struct {
		l    *liar
		want plugins.Class
	}{
		"without the capability":    {&liar{random: &pluginv1.RandomResponse{}}, plugins.Invalid},
		"a plugin from before":      {&liar{}, plugins.Invalid},
		"a capability alone":        {&liar{capabilities: random}, plugins.Internal},
		"an empty answer":           {&liar{capabilities: random, random: &pluginv1.RandomResponse{}}, plugins.Internal},
		"an answer that is no seal": {&liar{capabilities: random, random: &pluginv1.RandomResponse{Random: sealed(12, 48).GetPlaintext()}}, plugins.Internal},
	} {
		dst := []byte("as it was")
		if err := opened(t, c.l).Random(bounded(t), dst); plugins.ClassOf(err) != c.want || string(dst) != "as it was" {
			t.Errorf("%s: got %q and %v, want %s", name, dst, err, c.want)
		}
	}
	for _, n := range []int{0, plugins.MaxRandomSize + 1} {
		if err := opened(t, &liar{capabilities: random}).Random(bounded(t), make([]byte, n)); plugins.ClassOf(err) != plugins.Invalid {
			t.Errorf("%d bytes: got %v, want Invalid", n, err)
		}
	}
	if err := dial(t, &liar{}).Random(bounded(t), make([]byte, 1)); plugins.ClassOf(err) != plugins.Internal {
		t.Errorf("before Open: got %v, want Internal", err)
	}
}
