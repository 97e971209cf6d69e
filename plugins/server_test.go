package plugins

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"google.golang.org/grpc"

	pluginv1 "github.com/kms-agent/kms-agent/api/plugin/v1"
)

// keeper keeps what it was given, as a careless backend would.
type keeper struct {
	openErr            error
	wrapped, unwrapped []byte
}

func (k *keeper) Open(context.Context, json.RawMessage) (Info, error) {
	return Info{Name: "keeper"}, k.openErr
}

func (k *keeper) Wrap(_ context.Context, _ KeyRef, plaintext []byte, _ Binding) ([]byte, error) {
	k.wrapped = plaintext
	return bytes.Clone(plaintext), nil
}

func (k *keeper) Unwrap(_ context.Context, _ KeyRef, ciphertext []byte, _ Binding) ([]byte, error) {
	k.unwrapped = bytes.Clone(ciphertext)
	return k.unwrapped, nil
}

func (k *keeper) Describe(context.Context, string) (Description, error) { return Description{}, nil }
func (k *keeper) Check(context.Context) (Health, error)                 { return Health{}, nil }
func (k *keeper) Close() error                                          { return nil }

// openServer returns a server and the host's end of its session.
func openServer(t *testing.T, k *keeper) (*server, *session) {
	t.Helper()
	s, own := &server{backend: k}, fixedKey(t, "host")
	answer, err := s.Open(t.Context(), &pluginv1.OpenRequest{HostPublicKey: own.PublicKey().Bytes()})
	if err != nil {
		t.Fatal(err)
	}
	if answer.GetFips140() == "" {
		t.Error("Open tells no FIPS 140 module")
	}
	host, err := newSession(own, answer.GetPluginPublicKey(), true)
	if err != nil {
		t.Fatal(err)
	}
	return s, host
}

func classOf(t *testing.T, err error) Class {
	t.Helper()
	if err == nil {
		return 0
	}
	return fromStatus(t.Context(), err).Class
}

func TestServerIsOpenedOnce(t *testing.T) {
	s := &server{backend: &keeper{}}
	key := (&KeyRef{URI: "u", Version: "1"}).proto()
	_, wrapErr := s.Wrap(t.Context(), &pluginv1.WrapRequest{Key: key})
	_, unwrapErr := s.Unwrap(t.Context(), &pluginv1.UnwrapRequest{Key: key})
	_, describeErr := s.Describe(t.Context(), &pluginv1.DescribeRequest{Uri: "u"})
	_, checkErr := s.Check(t.Context(), &pluginv1.CheckRequest{})
	for method, err := range map[string]error{"Wrap": wrapErr, "Unwrap": unwrapErr, "Describe": describeErr, "Check": checkErr} {
		if got := classOf(t, err); got != Internal {
			t.Errorf("%s before Open: got %s, want Internal", method, got)
		}
	}
	s, _ = openServer(t, &keeper{})
	_, err := s.Open(t.Context(), &pluginv1.OpenRequest{HostPublicKey: fixedKey(t, "host").PublicKey().Bytes()})
	if got := classOf(t, err); got != Invalid {
		t.Errorf("Open twice: got %s, want Invalid", got)
	}
}

func TestServerRefusesToOpen(t *testing.T) {
	good := fixedKey(t, "host").PublicKey().Bytes()
	for name, c := range map[string]struct {
		backend Backend
		key     []byte
		want    Class
	}{
		"no public key":        {&keeper{}, nil, Invalid},
		"a bad public key":     {&keeper{}, make([]byte, 65), Invalid},
		"a backend that no":    {&keeper{openErr: Errorf(Denied, "no")}, good, Denied},
		"an error of no class": {&keeper{openErr: errors.New("plain")}, good, Internal},
	} {
		s := &server{backend: c.backend}
		if _, err := s.Open(t.Context(), &pluginv1.OpenRequest{HostPublicKey: c.key}); classOf(t, err) != c.want {
			t.Errorf("%s: got %v, want %s", name, err, c.want)
		}
		if _, err := s.Check(t.Context(), &pluginv1.CheckRequest{}); classOf(t, err) != Internal {
			t.Errorf("%s: Check afterwards: got %v, want Internal", name, err)
		}
	}
}

func TestServerClearsKeyMaterial(t *testing.T) {
	k := &keeper{}
	s, host := openServer(t, k)
	key, b, secret := KeyRef{URI: "u", Version: "1"}, testBinding(), []byte("0123456789abcdef0123456789abcdef")
	sealed, err := host.seal(host.toPlugin, secret, wrapAAD(key, b))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Wrap(t.Context(), &pluginv1.WrapRequest{Key: key.proto(), Plaintext: sealed, Binding: b.proto()}); err != nil {
		t.Fatal(err)
	}
	answer, err := s.Unwrap(t.Context(), &pluginv1.UnwrapRequest{Key: key.proto(), Ciphertext: secret, Binding: b.proto()})
	if err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, len(secret))
	if !bytes.Equal(k.wrapped, zeros) || !bytes.Equal(k.unwrapped, zeros) {
		t.Errorf("key material is left in memory: %q, %q", k.wrapped, k.unwrapped)
	}
	if got, err := host.open(host.toHost, answer.GetPlaintext(), unwrapAAD(key, secret, b)); err != nil || !bytes.Equal(got, secret) {
		t.Errorf("Unwrap: got %q and %v", got, err)
	}
	// What was sealed for one request is refused in another: the process is broken.
	other := KeyRef{URI: "u", Version: "2"}
	_, err = s.Wrap(t.Context(), &pluginv1.WrapRequest{Key: other.proto(), Plaintext: sealed, Binding: b.proto()})
	if got := classOf(t, err); got != Internal {
		t.Errorf("sealed for another request: got %s, want Internal", got)
	}
}

func TestAnswersComeInTime(t *testing.T) {
	for _, c := range []struct{ given, margin time.Duration }{{time.Second, 100 * time.Millisecond}, {time.Minute, answerMargin}} {
		ctx, cancel := context.WithTimeout(t.Context(), c.given)
		defer cancel()
		outer, _ := ctx.Deadline()
		_, _ = answerInTime(ctx, nil, nil, func(ctx context.Context, _ any) (any, error) {
			inner, _ := ctx.Deadline()
			if got := outer.Sub(inner); got < c.margin/2 || got > c.margin {
				t.Errorf("of %s the answer is left %s, want about %s", c.given, got, c.margin)
			}
			return nil, nil
		})
	}
}

func TestPanicsAreLoggedWithoutValues(t *testing.T) {
	var log bytes.Buffer
	info := &grpc.UnaryServerInfo{FullMethod: "/kmsagent.plugin.v1.Backend/Wrap"}
	answer, err := recoverPanics(&log)(t.Context(), "secret request", info, func(context.Context, any) (any, error) {
		panic("secret value")
	})
	if got := classOf(t, err); got != Internal || answer != nil {
		t.Errorf("got %v and %s, want nothing and Internal", answer, got)
	}
	var record struct {
		Level  string   `json:"@level"`
		Method string   `json:"method"`
		Stack  []string `json:"stack"`
	}
	if err := json.Unmarshal(log.Bytes(), &record); err != nil || record.Level != "error" || record.Method != "Wrap" ||
		len(record.Stack) == 0 || !bytes.Contains([]byte(record.Stack[0]), []byte("TestPanicsAreLoggedWithoutValues")) {
		t.Errorf("log: got %s and %v, want where it happened", log.String(), err)
	}
	if bytes.Contains(log.Bytes(), []byte("secret")) {
		t.Errorf("the log holds values: %s", log.String())
	}
}
