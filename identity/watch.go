package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
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
	delay := s.cfg.BackoffMin
	for {
		heard, err := s.watch(ctx)
		if ctx.Err() != nil {
			s.lost(errors.New("the agent no longer follows the Workload API"))
			return nil
		}
		s.lost(err)
		if heard {
			delay = s.cfg.BackoffMin
		}
		if !sleep(ctx, jitter(delay)) {
			return nil
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
func (s *Source) watch(ctx context.Context) (heard bool, err error) {
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
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(
		metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true"), &workload.X509SVIDRequest{})
	for err == nil {
		var update *workload.X509SVIDResponse
		if update, err = stream.Recv(); err != nil {
			break
		}
		watchdog.Stop()
		if err = s.apply(update); err != nil {
			break
		}
		heard = true
		watchdog = time.AfterFunc(s.renewalDue(), func() {
			cancel(errors.New("the Workload API did not renew the SVID in time"))
		})
	}
	if cause := context.Cause(ctx); cause != nil {
		return heard, cause
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("the Workload API ended the stream")
	}
	return heard, err
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

// lost records that the stream ended. The bundles' time runs from the first
// loss; PermissionDenied withdraws the SVID at once (Workload API, section 6.1:
// the client should cease using it).
func (s *Source) lost(err error) {
	next := *s.current.Load()
	next.connected, next.lastErr = false, err
	if next.bundlesEnd.IsZero() && !next.updated.IsZero() {
		next.bundlesEnd = s.cfg.Now().Add(s.cfg.BundleMaxAge)
	}
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
		svid: svid, own: s.current.Load().own, trust: trusted,
		connected: true, denied: svid == nil, updated: s.cfg.Now(),
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
