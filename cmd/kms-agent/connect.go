package main

import (
	"context"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kms-agent/kms-agent/client"
)

const (
	defaultSocket  = client.DefaultSocket
	defaultTimeout = 10 * time.Second
)

// How a command proves to the agent who it is.
const (
	identityX509 = "x509"
	identityJWT  = "jwt"
	identityPeer = "peer"
)

// connection is what a command needs to reach an agent.
type connection struct {
	socket, workloadAPI, identity, agentID, audience string
	timeout                                          time.Duration
}

func (a *app) connectionFlags(c *cobra.Command, f *connection) {
	flags := c.Flags()
	flags.StringVar(&f.socket, "socket", "", "the agent's socket (environment KMS_AGENT_SOCKET, else "+defaultSocket+")")
	flags.StringVar(&f.workloadAPI, "workload-api", "", "address of the SPIFFE Workload API (environment SPIFFE_ENDPOINT_SOCKET)")
	flags.StringVar(&f.identity, "identity", "", "how to prove who you are: x509 (an X.509-SVID of the Workload API; the default where its address is known), jwt (a JWT-SVID of it, for --audience) or peer (what the kernel says of this process)")
	flags.StringVar(&f.agentID, "agent-id", "", "SPIFFE ID that the agent must have; without it, any of your own trust domain")
	flags.StringVar(&f.audience, "audience", "", "with --identity jwt: whom the token is for, the agent's SPIFFE ID unless it is configured otherwise")
	flags.DurationVar(&f.timeout, "timeout", defaultTimeout, "how long to wait for an answer; of a stream, for the connection")
	_ = c.RegisterFlagCompletionFunc("identity", cobra.FixedCompletions([]string{identityX509, identityJWT, identityPeer}, cobra.ShellCompDirectiveNoFileComp))
	for _, name := range []string{"key", "to-key"} {
		if flags.Lookup(name) != nil {
			_ = c.RegisterFlagCompletionFunc(name, a.keyNames(f))
		}
	}
}

// completionTimeout is how long a shell waits for names.
const completionTimeout = 2 * time.Second

// keyNames completes names of keys: those that the caller may describe. Where no
// agent answers there are none.
func (a *app) keyNames(f *connection) cobra.CompletionFunc {
	return func(c *cobra.Command, _ []string, begun string) (names []string, _ cobra.ShellCompDirective) {
		asked := *f
		asked.timeout = completionTimeout
		_ = a.call(c.Context(), &asked, func(ctx context.Context, agent *client.Client) error {
			listed, err := agent.ListKeys(ctx, nil)
			for _, k := range listed.GetKeys() {
				if strings.HasPrefix(k.GetName(), begun) {
					names = append(names, k.GetName())
				}
			}
			return err
		})
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// options turns flags and environment into what the client needs.
func (a *app) options(f *connection) (client.Options, error) {
	socket := strings.TrimPrefix(strings.TrimPrefix(firstOf(f.socket, a.env("KMS_AGENT_SOCKET"), defaultSocket), "unix:"), "//")
	absolute, err := filepath.Abs(socket)
	if err != nil {
		return client.Options{}, err
	}
	if f.timeout <= 0 {
		return client.Options{}, usagef("--timeout must be more than zero")
	}
	// Whoever waits at a terminal hears at once what is wrong.
	o := client.Options{Socket: absolute, Wait: f.timeout, Retry: -1}
	api := firstOf(f.workloadAPI, a.env("SPIFFE_ENDPOINT_SOCKET"))
	switch {
	case f.identity != "" && f.identity != identityX509 && f.identity != identityJWT && f.identity != identityPeer:
		return o, usagef("--identity must be x509, jwt or peer, not %q", f.identity)
	case (f.identity == identityX509 || f.identity == identityJWT) && api == "":
		return o, usagef("--identity %s needs a Workload API: name it with --workload-api or SPIFFE_ENDPOINT_SOCKET", f.identity)
	case (f.identity == identityJWT) != (f.audience != ""):
		return o, usagef("--identity jwt and --audience belong together; the audience is the agent's SPIFFE ID unless it is configured otherwise")
	case f.identity == identityPeer && f.workloadAPI != "":
		return o, usagef("--identity peer uses no Workload API; leave --workload-api out")
	case f.identity != identityPeer:
		o.WorkloadAPI = api
	}
	if o.WorkloadAPI != "" && workloadapi.ValidateAddress(o.WorkloadAPI) != nil {
		return o, usagef("%q is no address of a Workload API; write it as unix:///run/spire/agent/sockets/api.sock", o.WorkloadAPI)
	}
	a.workloadAPI = o.WorkloadAPI
	o.JWTAudience = f.audience
	if f.agentID == "" {
		return o, nil
	}
	id, err := spiffeid.FromString(f.agentID)
	if err != nil || o.WorkloadAPI == "" || o.JWTAudience != "" {
		return o, usagef("--agent-id must be a SPIFFE ID, and can be checked with --identity x509 only")
	}
	o.AgentID = spiffeid.MatchID(id)
	return o, nil
}

func firstOf(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

// dial connects; the caller closes.
func (a *app) dial(ctx context.Context, f *connection) (*client.Client, error) {
	o, err := a.options(f)
	if err != nil {
		return nil, err
	}
	return client.Dial(ctx, o)
}

// call connects, does one thing within the timeout, and closes.
func (a *app) call(ctx context.Context, f *connection, do func(context.Context, *client.Client) error) error {
	c, err := a.dial(ctx, f)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	return do(ctx, c)
}

// pairs is the value of --context and the like.
type pairs struct{ values []string }

func (p *pairs) flag(c *cobra.Command, name, shorthand, usage string) {
	c.Flags().StringArrayVarP(&p.values, name, shorthand, nil, usage)
}

// parse reads NAME=VALUE, each name once.
func (p *pairs) parse() (map[string]string, error) {
	context := map[string]string{}
	for _, pair := range p.values {
		name, value, ok := strings.Cut(pair, "=")
		if !ok || name == "" {
			return nil, usagef("context %q is not NAME=VALUE", pair)
		}
		if _, twice := context[name]; twice {
			return nil, usagef("the context has %q twice", name)
		}
		context[name] = value
	}
	return context, nil
}

// staleness is the value of --max-stale; absent is no bound.
type staleness struct {
	age   time.Duration
	given func() bool
}

func (s *staleness) flag(c *cobra.Command) {
	c.Flags().DurationVar(&s.age, "max-stale", 0, "how old the key's last confirmation upstream may be; 0s demands a new one (without the flag: the key's own bound)")
	s.given = func() bool { return c.Flags().Changed("max-stale") }
}

func (s *staleness) value() (*durationpb.Duration, error) {
	if !s.given() {
		return nil, nil //nolint:nilnil // no bound is what the protocol says by an absent field
	}
	if s.age < 0 {
		return nil, usagef("--max-stale must not be negative")
	}
	return durationpb.New(s.age), nil
}
