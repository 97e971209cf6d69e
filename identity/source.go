package identity

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// What a Source does where SourceConfig does not say.
const (
	DefaultBundleMaxAge  = 24 * time.Hour
	DefaultBackoffMin    = 500 * time.Millisecond
	DefaultBackoffMax    = 30 * time.Second
	DefaultAnswerTimeout = 10 * time.Second
)

// SourceConfig says how to reach the Workload API. Zero durations mean the
// defaults.
type SourceConfig struct {
	// Address of the Workload API: unix:///path or tcp://ip:port.
	Address string
	// TrustDomain chooses among several SVIDs: the first that is of it is the
	// agent's own, else the first of all. Zero: the first of all.
	TrustDomain spiffeid.TrustDomain
	// JWTBundles follows the bundles that JWT-SVIDs are verified with, too.
	JWTBundles bool
	// BundleMaxAge is how long the bundles are trusted from the moment that the
	// Workload API was lost.
	BundleMaxAge time.Duration
	// BackoffMin and BackoffMax bound the time between two attempts, which
	// doubles and is jittered.
	BackoffMin, BackoffMax time.Duration
	// AnswerTimeout bounds the wait for the first update of an attempt.
	AnswerTimeout time.Duration
	// Now is the wall clock; nil means time.Now.
	Now func() time.Time
}

// SourceStatus says in a word how a Source is.
type SourceStatus string

// The states of a Source.
const (
	// SourceStarting: the Workload API has not given anything yet.
	SourceStarting SourceStatus = "starting"
	// SourceReady: the SVID and bundles are current.
	SourceReady SourceStatus = "ready"
	// SourceStale: the Workload API is lost; its last SVID and bundles serve.
	SourceStale SourceStatus = "stale"
	// SourceDenied: the Workload API says that this process has no identity, or
	// has none any more. The SVID has been dropped.
	SourceDenied SourceStatus = "denied"
	// SourceExpired: the SVID has expired or the bundles have outlived
	// BundleMaxAge. TLS clients are turned away.
	SourceExpired SourceStatus = "expired"
)

// State is what a Source knows at one moment.
type State struct {
	Status SourceStatus
	// ID and Expires are those of the agent's own SVID; zero without one.
	ID      spiffeid.ID
	Expires time.Time
	// Updated is when the last update came; zero before the first.
	Updated time.Time
	// BundlesEnd is when the bundles will be dropped; zero while the Workload
	// API is heard.
	BundlesEnd time.Time
	// TrustDomains are those with a bundle, sorted.
	TrustDomains []spiffeid.TrustDomain
	// LastError is why the last attempt failed; nil when the last succeeded.
	LastError error
	// JWT is nil where the JWT bundles are not followed.
	JWT *JWTState
}

// JWTState is what a Source knows of JWT bundles at one moment.
type JWTState struct {
	// Status is SourceStarting, SourceReady, SourceStale or SourceExpired. A
	// Workload API that has no JWT-SVIDs to give leaves it at SourceStarting.
	Status SourceStatus
	// Updated, BundlesEnd, TrustDomains and LastError as in State.
	Updated, BundlesEnd time.Time
	TrustDomains        []spiffeid.TrustDomain
	LastError           error
}

// Source follows the SPIFFE Workload API: the agent's own X.509-SVID and the
// bundles that callers' SVIDs are verified with. It outlives every outage of the
// Workload API and every answer that it gives, serves what it last heard within
// that one's own bounds, and never hands out an SVID that has expired.
//
// It implements x509svid.Source and x509bundle.Source and is safe for
// concurrent use.
type Source struct {
	cfg     SourceConfig
	target  string
	running atomic.Bool
	// current and jwt are each replaced by one goroutine of Run only.
	current atomic.Pointer[snapshot]
	jwt     atomic.Pointer[jwtSnapshot]

	mu      sync.Mutex
	changed chan struct{} // mu guards changed; closed and replaced at each change
}

var (
	_ x509svid.Source   = (*Source)(nil)
	_ x509bundle.Source = (*Source)(nil)
)

// NewSource checks cfg. Nothing is reached for until Run.
func NewSource(cfg SourceConfig) (*Source, error) {
	target, err := workloadapi.TargetFromAddress(cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("identity: Workload API address %q: %w; write it as unix:///path", cfg.Address, err)
	}
	for _, d := range []time.Duration{cfg.BundleMaxAge, cfg.BackoffMin, cfg.BackoffMax, cfg.AnswerTimeout} {
		if d < 0 {
			return nil, fmt.Errorf("identity: Workload API: %v is a negative duration", d)
		}
	}
	cfg.BundleMaxAge = cmp.Or(cfg.BundleMaxAge, DefaultBundleMaxAge)
	cfg.BackoffMin = cmp.Or(cfg.BackoffMin, DefaultBackoffMin)
	cfg.BackoffMax = max(cmp.Or(cfg.BackoffMax, DefaultBackoffMax), cfg.BackoffMin)
	cfg.AnswerTimeout = cmp.Or(cfg.AnswerTimeout, DefaultAnswerTimeout)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Source{cfg: cfg, target: target, changed: make(chan struct{})}
	s.current.Store(&snapshot{trust: &trust{}})
	s.jwt.Store(&jwtSnapshot{trust: &jwtTrust{}})
	return s, nil
}

// GetX509SVID returns the agent's own SVID, or an error when it has none that
// is valid now.
func (s *Source) GetX509SVID() (*x509svid.SVID, error) { return s.svidAt(s.cfg.Now()) }

func (s *Source) svidAt(now time.Time) (*x509svid.SVID, error) { return s.current.Load().svidAt(now) }

// GetX509BundleForTrustDomain returns the bundle of a trust domain, or an error
// when there is none, or none that may still be trusted.
func (s *Source) GetX509BundleForTrustDomain(domain spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	snap := s.current.Load()
	if err := snap.bundlesUsable(s.cfg.Now()); err != nil {
		return nil, err
	}
	return snap.trust.GetX509BundleForTrustDomain(domain)
}

// State says how the Source is.
func (s *Source) State() State {
	snap, now := s.current.Load(), s.cfg.Now()
	state := State{
		Status: snap.status(now), Updated: snap.updated,
		BundlesEnd: snap.bundlesEnd, LastError: snap.lastErr,
	}
	if snap.svid != nil {
		state.ID, state.Expires = snap.svid.ID, snap.svid.Certificates[0].NotAfter
	}
	state.TrustDomains = slices.SortedFunc(maps.Keys(snap.trust.bundles), spiffeid.TrustDomain.Compare)
	if s.cfg.JWTBundles {
		state.JWT = s.jwt.Load().state(now)
	}
	return state
}

func (s *snapshot) status(now time.Time) SourceStatus {
	switch {
	case s.svid == nil && s.denied:
		return SourceDenied
	case s.svid == nil:
		return SourceStarting
	case !now.Before(s.svid.Certificates[0].NotAfter) || s.bundlesUsable(now) != nil:
		return SourceExpired
	case !s.connected:
		return SourceStale
	default:
		return SourceReady
	}
}

// Updated returns a channel that is closed at the next change of State that the
// Workload API brings about. Take it before State, so that no change is missed;
// expiry alone is not told.
func (s *Source) Updated() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// WaitReady returns when the Source has an SVID that is valid now. When ctx ends
// before that, the error says what stood in the way.
func (s *Source) WaitReady(ctx context.Context) error {
	return s.wait(ctx, func() error {
		_, err := s.GetX509SVID()
		return err
	})
}

// WaitJWTBundles returns when the Source has JWT bundles that may be trusted now,
// which it follows by configuration only. When ctx ends before that, the error
// says what stood in the way.
func (s *Source) WaitJWTBundles(ctx context.Context) error {
	return s.wait(ctx, func() error { return s.jwt.Load().usable(s.cfg.Now()) })
}

// wait returns when ok has no error any more.
func (s *Source) wait(ctx context.Context, ok func() error) error {
	for {
		updated := s.Updated()
		err := ok()
		if err == nil {
			return nil
		}
		select {
		case <-updated:
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		}
	}
}

// publish makes next the current snapshot.
func (s *Source) publish(next *snapshot) {
	s.current.Store(next)
	s.tell()
}

// tell wakes who waits for a change.
func (s *Source) tell() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.changed)
	s.changed = make(chan struct{})
}
