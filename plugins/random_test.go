package plugins

import (
	"bytes"
	"context"
	"encoding/json"
	"testing"

	pluginv1 "github.com/kms-agent/kms-agent/api/plugin/v1"
)

// giver keeps the memory that it has filled, as a careless backend would.
type giver struct {
	keeper

	given []byte
	fails error
}

func (g *giver) Open(context.Context, json.RawMessage) (Info, error) {
	return Info{Name: "giver", Capabilities: []string{CapabilityRandom}}, nil
}

func (g *giver) Random(_ context.Context, dst []byte) error {
	copy(dst, bytes.Repeat([]byte{7}, len(dst)))
	g.given = dst
	return g.fails
}

// openGiver returns a server with random and the host's end of its session.
func openGiver(t *testing.T, g *giver) (*server, *session) {
	t.Helper()
	s, own := &server{backend: g}, fixedKey(t, "host")
	answer, err := s.Open(t.Context(), &pluginv1.OpenRequest{HostPublicKey: own.PublicKey().Bytes()})
	if err != nil {
		t.Fatal(err)
	}
	host, err := newSession(own, answer.GetPluginPublicKey(), true)
	if err != nil {
		t.Fatal(err)
	}
	return s, host
}

// Random crosses sealed, bound to the one request that it answers, and is left nowhere.
func TestServerSealsRandom(t *testing.T) {
	g := &giver{}
	s, host := openGiver(t, g)
	nonce, want := []byte("0123456789abcdef"), bytes.Repeat([]byte{7}, 64)
	answer, err := s.Random(t.Context(), &pluginv1.RandomRequest{Length: 64, Nonce: nonce})
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(answer.GetRandom().GetCiphertext(), want[:16]) || !bytes.Equal(g.given, make([]byte, 64)) {
		t.Errorf("random in clear: in the answer %x, in memory %x", answer.GetRandom().GetCiphertext(), g.given)
	}
	if got, err := host.open(host.toHost, answer.GetRandom(), randomAAD(nonce)); err != nil || !bytes.Equal(got, want) {
		t.Errorf("got %x and %v, want %x", got, err, want)
	}
	for name, aad := range map[string][]byte{
		"another request": randomAAD([]byte("0123456789abcdeF")), "an unwrap": unwrapAAD(KeyRef{}, nonce, Binding{}),
	} {
		if got, err := host.open(host.toHost, answer.GetRandom(), aad); err == nil {
			t.Errorf("the answer opens as that of %s: %x", name, got)
		}
	}
}

func TestServerRefusesRandom(t *testing.T) {
	nonce := make([]byte, randomNonceSize)
	good, _ := openGiver(t, &giver{})
	failing, _ := openGiver(t, &giver{fails: Errorf(Unavailable, "away")})
	without, _ := openServer(t, &keeper{})
	for name, c := range map[string]struct {
		s      *server
		length uint32
		nonce  []byte
		want   Class
	}{
		"none":               {good, 0, nonce, Invalid},
		"too much":           {good, MaxRandomSize + 1, nonce, Invalid},
		"more than an int32": {good, 1 << 31, nonce, Invalid},
		"no nonce":           {good, 1, nil, Invalid},
		"a long nonce":       {good, 1, make([]byte, 17), Invalid},
		"no capability":      {without, 1, nonce, Invalid},
		"not open":           {&server{backend: &giver{}}, 1, nonce, Internal},
		"an outage":          {failing, 1, nonce, Unavailable},
	} {
		answer, err := c.s.Random(t.Context(), &pluginv1.RandomRequest{Length: c.length, Nonce: c.nonce})
		if got := classOf(t, err); got != c.want || answer != nil {
			t.Errorf("%s: got %v and %s, want nothing and %s", name, answer, got, c.want)
		}
	}
}

// pretender names the capability and does not have it.
type pretender struct{ keeper }

func (p *pretender) Open(context.Context, json.RawMessage) (Info, error) {
	return Info{Name: "pretender", Capabilities: []string{CapabilityRandom}}, nil
}

func TestServerRefusesACapabilityThatIsNone(t *testing.T) {
	s := &server{backend: &pretender{}}
	_, err := s.Open(t.Context(), &pluginv1.OpenRequest{HostPublicKey: fixedKey(t, "host").PublicKey().Bytes()})
	if got := classOf(t, err); got != Internal {
		t.Errorf("got %v, want Internal", err)
	}
}
