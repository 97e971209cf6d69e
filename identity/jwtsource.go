package identity

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// askAnewAfter bounds how long a stream of JWT bundles is believed to stand
// without a word: unlike that of X.509, nothing in it has to be renewed.
const askAnewAfter = time.Hour

// jwtSnapshot is what a Source knows of JWT bundles at one moment. It is
// immutable.
type jwtSnapshot struct {
	hearing
	trust *jwtTrust
}

// jwtTrust is the JWT bundles of one update, or of several that said the same.
// Its address is the basis of accepted tokens.
type jwtTrust struct {
	bundles map[spiffeid.TrustDomain]*jwtbundle.Bundle
}

func (t *jwtTrust) equal(other *jwtTrust) bool {
	return maps.EqualFunc(t.bundles, other.bundles, (*jwtbundle.Bundle).Equal)
}

// usable fails when there are no bundles, or none that may still be trusted.
func (s *jwtSnapshot) usable(now time.Time) error {
	if s.updated.IsZero() {
		return fmt.Errorf("%w: the Workload API has given no JWT bundles%s", ErrNotReady, s.because())
	}
	return s.bundlesUsable(now)
}

func (s *jwtSnapshot) state(now time.Time) *JWTState {
	state := &JWTState{
		Status: SourceReady, Updated: s.updated, BundlesEnd: s.bundlesEnd, LastError: s.lastErr,
		TrustDomains: slices.SortedFunc(maps.Keys(s.trust.bundles), spiffeid.TrustDomain.Compare),
	}
	switch {
	case s.updated.IsZero():
		state.Status = SourceStarting
	case s.bundlesUsable(now) != nil:
		state.Status = SourceExpired
	case !s.connected:
		state.Status = SourceStale
	}
	return state
}

// jwtStream is that of the JWT bundles.
func (s *Source) jwtStream() stream {
	return stream{
		open: func(ctx context.Context, api workload.SpiffeWorkloadAPIClient) (func() error, error) {
			from, err := api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
			return func() error {
				update, err := from.Recv()
				if err == nil {
					s.applyJWT(update)
				}
				return err
			}, err
		},
		overdue: func() (time.Duration, error) {
			return max(min(s.cfg.BundleMaxAge/2, askAnewAfter), s.cfg.BackoffMax), errAskAnew
		},
		lost: func(err error) {
			next := *s.jwt.Load()
			next.hearing = next.ended(err, s.cfg.Now(), s.cfg.BundleMaxAge)
			s.jwt.Store(&next)
			s.tell()
		},
	}
}

// applyJWT makes an update current. Each is the whole truth: a bundle that is
// not in it, or that cannot be read, vouches for nobody.
func (s *Source) applyJWT(update *workload.JWTBundlesResponse) {
	trusted := &jwtTrust{bundles: make(map[spiffeid.TrustDomain]*jwtbundle.Bundle)}
	var faults []error
	for name, document := range update.GetBundles() {
		domain, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			faults = append(faults, fmt.Errorf("the Workload API sent a JWT bundle of %q: %w", name, err))
			continue
		}
		bundle, err := readJWTBundle(domain, document)
		if err != nil {
			faults = append(faults, fmt.Errorf("the Workload API sent a JWT bundle of %s that cannot be read: %w", name, err))
			continue
		}
		trusted.bundles[domain] = bundle
	}
	if now := s.jwt.Load().trust; now.equal(trusted) {
		trusted = now // what was accepted by it stands
	}
	s.jwt.Store(&jwtSnapshot{
		hearing: hearing{connected: true, updated: s.cfg.Now(), lastErr: errors.Join(faults...)}, trust: trusted,
	})
	s.tell()
}

// readJWTBundle reads a JWK set (RFC 7517). Keys that are no public ECDSA or RSA
// keys, have no ID or are meant for something else (use is neither absent nor
// jwt-svid) are left out: they verify no JWT-SVID.
func readJWTBundle(domain spiffeid.TrustDomain, document []byte) (*jwtbundle.Bundle, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(document, &set); err != nil {
		return nil, err
	}
	keys := make(map[string]crypto.PublicKey)
	for _, raw := range set.Keys {
		var key jose.JSONWebKey
		if err := key.UnmarshalJSON(raw); err != nil || key.KeyID == "" || (key.Use != "" && key.Use != "jwt-svid") {
			continue
		}
		switch key.Key.(type) {
		case *ecdsa.PublicKey, *rsa.PublicKey:
			keys[key.KeyID] = key.Key
		}
	}
	return jwtbundle.FromJWTAuthorities(domain, keys), nil
}
