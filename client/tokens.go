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
	api      *workloadapi.Client
	audience string
	current  atomic.Pointer[token]
	// turn is held by the request that asks.
	turn chan struct{}
}

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
	t := &tokens{api: c.api, audience: o.JWTAudience, turn: make(chan struct{}, 1)}
	if err := first(ctx, o.WorkloadAPI, "JWT-SVID", wait, func() error { return t.fetch(ctx) }); err != nil {
		return err
	}
	c.tokens = t
	return nil
}

func (t *tokens) fetch(ctx context.Context) error {
	svid, err := t.api.FetchJWTSVID(ctx, jwtsvid.Params{Audience: t.audience})
	if err != nil {
		return err
	}
	now := time.Now()
	t.current.Store(&token{
		header:  map[string]string{"authorization": "Bearer " + svid.Marshal()},
		renewal: now.Add(svid.Expiry.Sub(now) / 2), end: svid.Expiry,
	})
	return nil
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
	if latest := t.current.Load(); now.Before(latest.renewal) {
		return latest.header, nil
	}
	err := t.fetch(ctx)
	if err != nil && !time.Now().Before(have.end) {
		return nil, status.Error(codes.Unavailable, fmt.Sprintf("the JWT-SVID has expired and the Workload API gave no other: %v", err))
	}
	return t.current.Load().header, nil
}
