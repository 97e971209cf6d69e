package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// errNoIdentity is an update without SVIDs: all that was given is withdrawn.
var errNoIdentity = errors.New("the Workload API sent an update without any SVID")

// Run follows the Workload API until ctx ends, and then returns nil. It fails
// only when the Source runs already.
//
// go-spiffe's own watch ends for good at some codes (InvalidArgument, Canceled)
// and rejects a whole update for one bundle that it cannot read; here every end
// of the stream is tried again, and a bundle that cannot be read is dropped.
func (s *Source) Run(ctx context.Context) error {
	if !s.running.CompareAndSwap(false, true) {
		return errors.New("identity: the source is running already")
	}
	defer s.running.Store(false)
	var streams sync.WaitGroup
	streams.Go(func() { s.follow(ctx, s.x509Stream()) })
	if s.cfg.JWTBundles {
		streams.Go(func() { s.follow(ctx, s.jwtStream()) })
	}
	streams.Wait()
	return nil
}

// stream is one of the Workload API's streams of updates.
type stream struct {
	// open begins it; receive waits for an update and makes it current.
	open func(ctx context.Context, api workload.SpiffeWorkloadAPIClient) (receive func() error, err error)
	// overdue is when to ask anew although the stream stands, counted from the
	// last update, and why.
	overdue func() (time.Duration, error)
	// lost is told why the stream ended.
	lost func(error)
}

// errAskAnew ends a stream that stands, which is no loss.
var errAskAnew = errors.New("the Workload API is asked anew")

// follow keeps a stream open until ctx ends.
func (s *Source) follow(ctx context.Context, of stream) {
	delay := s.cfg.BackoffMin
	for {
		heard, err := s.watch(ctx, of)
		if ctx.Err() != nil {
			of.lost(errors.New("the agent no longer follows the Workload API"))
			return
		}
		if heard {
			delay = s.cfg.BackoffMin
		}
		if heard && errors.Is(err, errAskAnew) {
			continue
		}
		of.lost(err)
		if !sleep(ctx, jitter(delay)) {
			return
		}
		delay = min(2*delay, s.cfg.BackoffMax)
	}
}

// sleep reports false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// jitter returns between one half and all of d, so that agents that lost the
// same server do not return to it as one.
func jitter(d time.Duration) time.Duration {
	return d/2 + rand.N(d/2+1) //nolint:gosec // spreads load, guards nothing
}

// watch follows one stream until it ends, which it always does with an error.
// heard says whether it brought an update.
func (s *Source) watch(ctx context.Context, of stream) (heard bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Its own connection each time: no backoff of gRPC's stands in between.
	conn, err := grpc.NewClient(s.target, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return false, err
	}
	defer func() { _ = conn.Close() }()

	// A Workload API that hangs must not be waited for in silence.
	watchdog := time.AfterFunc(s.cfg.AnswerTimeout, func() {
		cancel(fmt.Errorf("the Workload API did not answer within %v", s.cfg.AnswerTimeout))
	})
	defer func() { watchdog.Stop() }()
	receive, err := of.open(metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true"), workload.NewSpiffeWorkloadAPIClient(conn))
	for err == nil {
		if err = receive(); err != nil {
			break
		}
		heard = true
		watchdog.Stop()
		overdue, why := of.overdue()
		watchdog = time.AfterFunc(overdue, func() { cancel(why) })
	}
	if cause := context.Cause(ctx); cause != nil {
		return heard, cause
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("the Workload API ended the stream")
	}
	return heard, err
}

// x509Stream is that of the agent's own SVID and the X.509 bundles.
func (s *Source) x509Stream() stream {
	return stream{
		open: func(ctx context.Context, api workload.SpiffeWorkloadAPIClient) (func() error, error) {
			from, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			return func() error {
				update, err := from.Recv()
				if err != nil {
					return err
				}
				return s.apply(update)
			}, err
		},
		overdue: func() (time.Duration, error) {
			return s.renewalDue(), errors.New("the Workload API did not renew the SVID in time")
		},
		lost: s.lost,
	}
}

// renewalDue is when to ask anew although the stream stands: a tenth of the
// SVID's life before its end, by when a healthy server has renewed it long ago.
func (s *Source) renewalDue() time.Duration {
	svid := s.current.Load().svid
	if svid == nil {
		return s.cfg.BackoffMax
	}
	leaf := svid.Certificates[0]
	due := leaf.NotAfter.Add(-leaf.NotAfter.Sub(leaf.NotBefore) / 10)
	return max(due.Sub(s.cfg.Now()), s.cfg.BackoffMax)
}

// lost records that the stream ended. PermissionDenied withdraws the SVID at once (Workload API, section 6.1:
// the client should cease using it).
func (s *Source) lost(err error) {
	next := *s.current.Load()
	next.hearing = next.ended(err, s.cfg.Now(), s.cfg.BundleMaxAge)
	if status.Code(err) == codes.PermissionDenied {
		next.svid, next.denied = nil, true
	}
	s.publish(&next)
}

// apply makes an update current. Each is the whole truth: what is not in it is
// withdrawn. An update that cannot be read changes nothing and is an error.
func (s *Source) apply(update *workload.X509SVIDResponse) error {
	svid, trusted, err := s.read(update)
	if err != nil {
		return fmt.Errorf("the Workload API sent an update that cannot be used: %w", err)
	}
	next := &snapshot{
		hearing: hearing{connected: true, updated: s.cfg.Now()},
		svid:    svid, own: s.current.Load().own, trust: trusted, denied: svid == nil,
	}
	if svid != nil {
		next.own = svid.ID.TrustDomain()
	} else {
		next.lastErr = errNoIdentity
	}
	s.publish(next)
	return nil
}

func (s *Source) read(update *workload.X509SVIDResponse) (*x509svid.SVID, *trust, error) {
	trusted := &trust{bundles: make(map[spiffeid.TrustDomain]*x509bundle.Bundle)}
	var chosen *x509svid.SVID
	for _, message := range update.GetSvids() {
		svid, err := x509svid.ParseRaw(message.GetX509Svid(), message.GetX509SvidKey())
		if err != nil {
			return nil, nil, err
		}
		domain := svid.ID.TrustDomain()
		if err := trusted.add(domain.Name(), message.GetBundle()); err != nil {
			return nil, nil, err
		}
		if chosen == nil || (domain == s.cfg.TrustDomain && !chosen.ID.MemberOf(s.cfg.TrustDomain)) {
			chosen = svid
		}
	}
	for domain, bundle := range update.GetFederatedBundles() {
		// A foreign domain's bundle that cannot be read is as if it were not
		// there; it must not stop our own from being renewed.
		_ = trusted.add(domain, bundle)
	}
	return chosen, trusted, nil
}

func (t *trust) add(name string, der []byte) error {
	domain, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return err
	}
	if _, ok := t.bundles[domain]; ok {
		return nil // the SVIDs' own come first and are not replaced
	}
	certs, err := x509.ParseCertificates(der)
	switch {
	case err != nil:
		return fmt.Errorf("bundle of %s: %w", domain.Name(), err)
	case len(certs) == 0:
		return nil // an empty bundle vouches for nobody
	}
	t.bundles[domain] = x509bundle.FromX509Authorities(domain, certs)
	return nil
}
