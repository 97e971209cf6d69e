package client

import (
	"cmp"
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// tokens puts a JWT-SVID into every request. It is asked for anew when half of
// its life is over, by the request that comes by then. Safe for concurrent use.
type tokens struct {
	// ask gets a new token.
	ask     func(context.Context) (*token, error)
	current atomic.Pointer[token]
	// turn is held by the request that asks.
	turn chan struct{}
}

// While the token at hand is valid, a request waits for the next one this long,
// and after a failure none asks for a while.
const (
	renewalWait  = time.Second
	renewalPause = 5 * time.Second
)

// token is one JWT-SVID.
type token struct {
	header map[string]string
	// renewal is when to ask for the next, end when this one is over.
	renewal, end time.Time
}

// fetchToken waits for the first JWT-SVID of this process.
func (c *Client) fetchToken(ctx context.Context, o Options) error {
	wait := cmp.Or(o.Wait, DefaultWait)
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if err := c.connectAPI(ctx, o); err != nil {
		return err
	}
	t := &tokens{turn: make(chan struct{}, 1), ask: func(ctx context.Context) (*token, error) {
		return askToken(ctx, c.api, o.JWTAudience)
	}}
	if err := first(ctx, o.WorkloadAPI, "JWT-SVID", wait, func() error { return t.fetch(ctx) }); err != nil {
		return err
	}
	c.tokens = t
	return nil
}

func askToken(ctx context.Context, api *workloadapi.Client, audience string) (*token, error) {
	svid, err := api.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &token{
		header:  map[string]string{"authorization": "Bearer " + svid.Marshal()},
		renewal: now.Add(svid.Expiry.Sub(now) / 2), end: svid.Expiry,
	}, nil
}

func (t *tokens) fetch(ctx context.Context) error {
	next, err := t.ask(ctx)
	if err == nil {
		t.current.Store(next)
	}
	return err
}

// RequireTransportSecurity implements credentials.PerRPCCredentials: a Unix
// socket is private to its two ends (JWT-SVID, section 7.3).
func (t *tokens) RequireTransportSecurity() bool { return false }

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (t *tokens) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	now := time.Now()
	have := t.current.Load()
	if now.Before(have.renewal) {
		return have.header, nil
	}
	if now.Before(have.end) {
		select {
		case t.turn <- struct{}{}:
		default:
			return have.header, nil // another request is asking
		}
	} else {
		select {
		case t.turn <- struct{}{}:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	defer func() { <-t.turn }()
	latest := t.current.Load()
	if now = time.Now(); now.Before(latest.renewal) {
		return latest.header, nil
	}
	return t.renew(ctx, latest, now)
}

// renew asks for the next token; have is good for as long as there is none and
// it has not ended.
func (t *tokens) renew(ctx context.Context, have *token, now time.Time) (map[string]string, error) {
	valid := now.Before(have.end)
	if valid {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, min(renewalWait, have.end.Sub(now)))
		defer cancel()
	}
	err := t.fetch(ctx)
	switch {
	case err == nil:
	case time.Now().Before(have.end):
		pause := min(renewalPause, time.Until(have.end))
		t.current.Store(&token{header: have.header, renewal: time.Now().Add(pause), end: have.end})
	default:
		return nil, status.Error(codes.Unavailable, fmt.Sprintf("the JWT-SVID has expired and the Workload API gave no other: %v", err))
	}
	return t.current.Load().header, nil
}
