// Package client calls a kms-agent on the same host.
//
//	c, err := client.Dial(ctx, client.Options{
//		Socket:      "/run/kms-agent/kms.sock",
//		WorkloadAPI: "unix:///run/spire/agent/sockets/api.sock",
//	})
//	...
//	defer c.Close()
//	answer, err := c.Encrypt(ctx, &kmsagentv1.EncryptRequest{Key: "orders", Plaintext: data})
//
// Requests and answers are those of the protocol, kmsagent.v1; errors of the
// agent are *Error. Every call takes its deadline from its context. There is no
// global state.
package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	kmsagentv1 "github.com/kms-agent/kms-agent/api/kmsagent/v1"
)

// DefaultWait bounds the wait for the first SVID where Options does not say.
const DefaultWait = 10 * time.Second

// maxMessage is the largest answer that is taken: a message of the largest
// payload that an agent can be configured for, with room for its header.
const maxMessage = 64 << 20

// Options say where the agent is and how to prove oneself to it.
type Options struct {
	// Socket is the absolute path of the agent's native socket.
	Socket string

	// WorkloadAPI is the address of the SPIFFE Workload API (unix:///path or
	// tcp://ip:port) that gives this process its X.509-SVID. Empty, and without a
	// Source: the connection is plaintext, and the agent takes the process for
	// the static peer that it is configured as, if any; the agent is then not
	// proven to the client, beyond that it may listen at Socket.
	WorkloadAPI string
	// Source is used instead of WorkloadAPI, and stays the caller's to close.
	Source *workloadapi.X509Source
	// AgentID decides whether the server is the agent; nil takes every member of
	// the caller's own trust domain, spiffeid.MatchID exactly one. Without an
	// X.509-SVID it must be nil: nothing could be matched.
	AgentID spiffeid.Matcher
	// JWTAudience makes the process prove itself by JWT-SVIDs for this audience,
	// which WorkloadAPI gives, instead of an X.509-SVID: the agent's SPIFFE ID, or
	// what the agent is configured to take (identity.jwt_audience). The connection
	// is plaintext, and the agent not proven: whoever listens at Socket gets
	// tokens that it can use itself until they end.
	JWTAudience string
	// Wait bounds the wait for the first SVID within Dial; 0 means DefaultWait.
	Wait time.Duration
}

// Client is a connection to one agent, made anew as often as it is lost. It is
// safe for concurrent use.
type Client struct {
	conn *grpc.ClientConn
	rpc  kmsagentv1.KMSClient
	// source and api are the client's own; nil when they are not, or none.
	source *workloadapi.X509Source
	api    *workloadapi.Client
	// tokens are nil unless the process proves itself by them.
	tokens *tokens
}

// Dial prepares a client. It waits for an X.509-SVID, where one is wanted, but
// not for the agent: that is reached by the first call.
func Dial(ctx context.Context, o Options) (*Client, error) {
	c, err := dial(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("connect to the agent: %w", err)
	}
	return c, nil
}

func dial(ctx context.Context, o Options) (_ *Client, err error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	c := &Client{}
	defer func() {
		if err != nil {
			_ = c.Close()
		}
	}()
	creds, err := c.credentials(ctx, o)
	if err != nil {
		return nil, err
	}
	var bearer []grpc.DialOption
	if c.tokens != nil {
		bearer = append(bearer, grpc.WithPerRPCCredentials(c.tokens))
	}
	// Not unix://: a path is no URL, and may hold what a URL cannot.
	c.conn, err = grpc.NewClient("passthrough:///localhost", append(bearer,
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", o.Socket)
		}),
		grpc.WithTransportCredentials(creds),
		grpc.WithNoProxy(),
		// The agent is on this host: it is there again soon or a long wait does not help.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
	)...)
	if err != nil {
		return nil, err
	}
	c.rpc = kmsagentv1.NewKMSClient(c.conn)
	return c, nil
}

func (o Options) check() error {
	switch {
	case !filepath.IsAbs(o.Socket):
		return fmt.Errorf("%q is no absolute path of a socket", o.Socket)
	case o.WorkloadAPI != "" && o.Source != nil:
		return errors.New("give a Workload API address or a source, not both")
	case o.JWTAudience != "" && (o.WorkloadAPI == "" || o.Source != nil):
		return errors.New("JWT-SVIDs come from the Workload API; give its address, and no source")
	case (o.WorkloadAPI == "" && o.Source == nil || o.JWTAudience != "") && o.AgentID != nil:
		return errors.New("the agent's SPIFFE ID cannot be checked on a plaintext connection; use an X.509-SVID")
	}
	return nil
}

func (c *Client) credentials(ctx context.Context, o Options) (credentials.TransportCredentials, error) {
	source := o.Source
	if o.JWTAudience != "" {
		return insecure.NewCredentials(), c.fetchToken(ctx, o)
	}
	if o.WorkloadAPI != "" {
		if err := c.fetch(ctx, o); err != nil {
			return nil, err
		}
		source = c.source
	}
	if source == nil {
		return insecure.NewCredentials(), nil
	}
	return credentials.NewTLS(clientTLS(source, source, o.AgentID)), nil
}

// clientTLS proves an X.509-SVID to the agent and has it prove its own.
func clientTLS(svid x509svid.Source, bundles x509bundle.Source, agent spiffeid.Matcher) *tls.Config {
	cfg := tlsconfig.MTLSClientConfig(svid, bundles, authorizer(svid, agent))
	cfg.MinVersion = tls.VersionTLS13
	return cfg
}

func authorizer(svid x509svid.Source, agent spiffeid.Matcher) tlsconfig.Authorizer {
	return func(id spiffeid.ID, chains [][]*x509.Certificate) error {
		if id.Path() == "" {
			return fmt.Errorf("the server at the agent's socket shows %s, which names a trust domain and no workload", id)
		}
		if chains[0][0].KeyUsage&x509.KeyUsageDigitalSignature == 0 {
			return fmt.Errorf("the certificate of %s lacks the key usage digitalSignature", id)
		}
		match := agent
		if match == nil {
			own, err := svid.GetX509SVID()
			if err != nil {
				return err
			}
			match = spiffeid.MatchMemberOf(own.ID.TrustDomain())
		}
		if err := match(id); err != nil {
			return fmt.Errorf("the server at the agent's socket is not the expected agent: %w", err)
		}
		return nil
	}
}

// Close releases the connection. It is idempotent; calls that are under way
// fail.
func (c *Client) Close() error {
	var errs []error
	if c.conn != nil {
		errs = append(errs, ignoreClosing(c.conn.Close()))
	}
	if c.source != nil {
		errs = append(errs, c.source.Close())
	}
	if c.api != nil {
		errs = append(errs, ignoreClosing(c.api.Close()))
	}
	return errors.Join(errs...)
}

func ignoreClosing(err error) error {
	if errors.Is(err, grpc.ErrClientConnClosing) { //nolint:staticcheck // what a second Close returns
		return nil
	}
	return err
}
