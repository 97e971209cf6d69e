package client

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// The time between two attempts while the agent cannot be reached.
const (
	firstPause = 50 * time.Millisecond
	lastPause  = time.Second
)

// retried calls until call succeeds, fails for good, or the time for retries is
// over. It returns the last error of call.
func (c *Client) retried(ctx context.Context, call func() error) error {
	began := time.Now()
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		err := decodeError(call())
		wait, again := c.again(err, pause)
		if !again || c.retry-time.Since(began) < wait {
			return err
		}
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= wait {
			return err
		}
		if !sleep(ctx, wait) {
			return ended(ctx)
		}
	}
}

// again decides whether to repeat a call, and when. The agent says so itself, or
// it was not reached: then nobody said anything.
func (c *Client) again(err error, pause time.Duration) (time.Duration, bool) {
	var e *Error
	switch {
	case !errors.As(err, &e) || e.Code != codes.Unavailable:
		return 0, false
	case e.RetryAfter > 0:
		return e.RetryAfter + rand.N(e.RetryAfter/8+1), true //nolint:gosec // jitter
	case e.Reason == "" && !c.refused.Load():
		return pause/2 + rand.N(pause/2), true //nolint:gosec // jitter
	}
	return 0, false
}

// sleep waits, unless ctx ends before.
func sleep(ctx context.Context, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// connected waits until there is a connection, for as long as calls are retried.
// Why there is none, the call that follows tells.
func (c *Client) connected(ctx context.Context) {
	if c.retry <= 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, c.retry)
	defer cancel()
	for {
		state := c.conn.GetState()
		if state == connectivity.Ready || state == connectivity.Shutdown || c.refused.Load() {
			return
		}
		if state == connectivity.Idle {
			c.conn.Connect()
		}
		if !c.conn.WaitForStateChange(ctx, state) {
			return
		}
	}
}

// watched notes whether the last handshake ended in a refusal: a server that is
// not the agent, or no SVID to show. Trying again at once changes nothing.
type watched struct {
	credentials.TransportCredentials
	refused *atomic.Bool
}

// ClientHandshake implements credentials.TransportCredentials.
func (w watched) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := w.TransportCredentials.ClientHandshake(ctx, authority, raw)
	w.refused.Store(err != nil && ctx.Err() == nil && !broken(err))
	return conn, info, err
}

// Clone implements credentials.TransportCredentials.
func (w watched) Clone() credentials.TransportCredentials {
	return watched{TransportCredentials: w.TransportCredentials.Clone(), refused: w.refused}
}

// broken tells whether the connection ended, as when the agent did, or an
// authority is new and has not reached both ends yet.
func broken(err error) bool {
	var network *net.OpError
	var authority x509.UnknownAuthorityError
	return errors.As(err, &authority) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &network) && (network.Op == "read" || network.Op == "write")
}

// ended is the error of a context that is over, as a call would return it.
func ended(ctx context.Context) error {
	return decodeError(status.FromContextError(ctx.Err()).Err())
}
