// Package client calls a kms-agent on the same host.
//
//	c, err := client.Dial(ctx, client.FromEnvironment())
//	...
//	defer c.Close()
//	sealed, err := c.Encrypt(ctx, &client.EncryptRequest{
//		Key: "orders", Plaintext: data, Context: map[string]string{"tenant": "acme"},
//	})
//	...
//	opened, err := c.Decrypt(ctx, &client.DecryptRequest{Message: sealed.GetMessage()})
//
// Client has every operation of the agent, one method each; InProcess encrypts
// and decrypts in this process, with data keys of the agent, and has the same
// methods for that. Errors of both are *Error; errors.Is finds the reasons, such
// as ErrAccessDenied. Every call takes its deadline from its context. There is
// no global state.
package client

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
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

// maxMessage is the largest answer that is taken: a message of the largest
// payload that an agent can be configured for, with room for its header.
const maxMessage = 64 << 20

// Client is a connection to one agent, made anew as often as it is lost. It is
// safe for concurrent use.
type Client struct {
	conn *grpc.ClientConn
	rpc  kmsagentv1.KMSClient
	// source and api are the client's own; nil when they are not, or none.
	source  *workloadapi.X509Source
	api     *workloadapi.Client
	retry   time.Duration
	refused atomic.Bool // the last handshake was
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
	c := &Client{retry: cmp.Or(o.Retry, DefaultRetry)}
	socket := o.path()
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
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}),
		grpc.WithTransportCredentials(watched{TransportCredentials: creds, refused: &c.refused}),
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
