package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// retryFetch is the time between two attempts to reach the Workload API.
const retryFetch = 100 * time.Millisecond

// fetch waits for the X.509-SVID of this process and keeps it current from then
// on. An answer that will not change by waiting ends the wait.
func (c *Client) fetch(ctx context.Context, o Options) error {
	wait := cmp.Or(o.Wait, DefaultWait)
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	err := c.connectAPI(ctx, o)
	if err != nil {
		return err
	}
	if err := first(ctx, o.WorkloadAPI, "X.509-SVID", wait, func() error {
		_, err := c.api.FetchX509SVID(ctx)
		return err
	}); err != nil {
		return err
	}
	c.source, err = workloadapi.NewX509Source(ctx, workloadapi.WithClient(c.api))
	if err != nil {
		return fmt.Errorf("the Workload API at %s gave an X.509-SVID and then failed: %w", o.WorkloadAPI, err)
	}
	return nil
}

func (c *Client) connectAPI(ctx context.Context, o Options) (err error) {
	c.api, err = workloadapi.New(ctx, workloadapi.WithAddr(o.WorkloadAPI),
		workloadapi.WithDialOptions(grpc.WithNoProxy(), grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: retryFetch, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
		})))
	if err != nil {
		return fmt.Errorf("workload API address %q: %w; write it as unix:///path", o.WorkloadAPI, err)
	}
	return nil
}

// first asks until there is an answer: workloadapi.NewX509Source alone would
// wait in silence and then say no more than that the time is over.
func first(ctx context.Context, address, what string, wait time.Duration, ask func() error) error {
	for {
		err := ask()
		switch status.Code(err) {
		case codes.OK:
			return nil
		case codes.PermissionDenied:
			return fmt.Errorf("the Workload API at %s knows no identity for this process; register it as a workload: %w", address, err)
		case codes.InvalidArgument, codes.Unimplemented, codes.Unknown:
			return fmt.Errorf("the Workload API at %s gave no %s: %w", address, what, err)
		default: // it may be there soon
		}
		timer := time.NewTimer(retryFetch)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return fmt.Errorf("the Workload API at %s gave no %s in time (waited up to %v); is it running? %w", address, what, wait, err)
			}
			return ctx.Err()
		}
	}
}
