package identity

import (
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
)

// MaxToken is the longest JWT-SVID in bytes that is looked at.
const MaxToken = 8 << 10

// authorization is the metadata that carries a JWT-SVID (JWT-SVID, section 5).
const authorization = "authorization"

// jwtVerifier takes the callers of a request for whom the JWT-SVID in it names.
type jwtVerifier struct {
	source *Source // nil: no Workload API
	served servedDomains
	// audience is not empty, or means the agent's own SPIFFE ID.
	audience []string
	now      func() time.Time
	// accepted is replaced when what it was accepted by changes.
	accepted atomic.Pointer[acceptedTokens]
	failures tokenFailures
}

// verify judges the values of a request's authorization metadata. An accepted
// token is remembered by its hash; a refused one leaves no trace but a count of its
// user's, and costs one signature's verification at most.
func (v *jwtVerifier) verify(values []string, peer Peer) (Caller, error) {
	token, err := bearer(values)
	if err != nil {
		return Caller{}, fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	if v.source == nil {
		return Caller{}, fmt.Errorf("%w: no SPIFFE Workload API is configured to verify JWT-SVIDs with; configure one, or send no %s metadata", ErrNotReady, authorization)
	}
	now, own, snap := v.now(), v.source.current.Load(), v.source.jwt.Load()
	audience := v.audienceOf(own)
	if audience == "" {
		return Caller{}, fmt.Errorf("%w: JWT-SVIDs are taken for its SPIFFE ID as audience, which it does not know%s; register it, or configure an audience", ErrNotReady, own.because())
	}
	if err := snap.usable(now); err != nil {
		return Caller{}, err
	}
	known := v.knownBy(snap.trust, audience, own.own)
	hash := hashOf(token)
	found, ok := known.find(hash, now)
	if !ok {
		// One that was accepted on this basis before is no guess.
		if found.id.IsZero() && !v.failures.allow(peer.UID, now) {
			return Caller{}, fmt.Errorf("%w: processes of uid %d sent too many tokens whose signatures do not hold; retry in a moment, and see in the audit log who sends them", ErrThrottled, peer.UID)
		}
		if found, err = v.judge(token, known, peer.UID, now); err != nil {
			return Caller{}, err
		}
		known.add(hash, found, now)
	}
	return Caller{ID: found.id, Proof: ProofJWTSVID, Expires: found.expires, Peer: peer}, nil
}

// audienceOf returns the first audience that is taken; empty: none is known.
func (v *jwtVerifier) audienceOf(s *snapshot) string {
	switch {
	case len(v.audience) > 0:
		return v.audience[0]
	case s.svid == nil:
		return ""
	default:
		return s.svid.ID.String()
	}
}

// knownBy returns the tokens that were accepted on the present basis.
func (v *jwtVerifier) knownBy(trust *jwtTrust, audience string, own spiffeid.TrustDomain) *acceptedTokens {
	known := v.accepted.Load()
	if known != nil && known.trust == trust && known.audience[0] == audience && known.own == own {
		return known
	}
	accepts := v.audience
	if len(accepts) == 0 {
		accepts = []string{audience}
	}
	// Of two that replace it at once, one is used for this request alone.
	next := newAcceptedTokens(trust, accepts, own)
	v.accepted.CompareAndSwap(known, next)
	return next
}

// judge verifies a token that a user's process sent. What can be seen without its signature is looked at
// first: a token that is refused for it costs no public-key operation.
func (v *jwtVerifier) judge(token string, by *acceptedTokens, uid uint32, now time.Time) (acceptedToken, error) {
	if !isCompactJWS(token) {
		return acceptedToken{}, fmt.Errorf("%w: the token is no JWS in compact serialisation, as a JWT-SVID is: three parts of base64url with dots between", ErrUntrusted)
	}
	claimed, err := jwtsvid.ParseInsecure(token, by.audience)
	if err != nil {
		return acceptedToken{}, untrustedToken(err)
	}
	if err := v.checkClaims(claimed, by, now); err != nil {
		return acceptedToken{}, err
	}
	svid, err := jwtsvid.ParseAndValidate(token, by.trust, by.audience)
	if err != nil {
		if !keyMissing(err) {
			v.failures.note(uid, now)
		}
		return acceptedToken{}, untrustedToken(err)
	}
	if err := v.checkClaims(svid, by, now); err != nil {
		return acceptedToken{}, err
	}
	return acceptedToken{id: svid.ID, expires: svid.Expiry}, nil
}

// keyMissing says whether a token was refused before its signature was looked at,
// since the bundles have no key of its name: so are honest ones after a rotation.
// go-spiffe tells by its text only; what it does not tell is no reason to think so.
func keyMissing(err error) bool {
	return strings.HasPrefix(err.Error(), "jwtsvid: no JWT authority ") || strings.HasPrefix(err.Error(), "jwtsvid: no bundle ")
}

// checkClaims holds what go-spiffe does not: exactly one audience, since a token
// for others too can be used here by each of them; a path; a trust domain that
// this agent serves; and the end, which go-spiffe lets pass by a minute.
func (v *jwtVerifier) checkClaims(svid *jwtsvid.SVID, by *acceptedTokens, now time.Time) error {
	switch {
	case len(svid.Audience) != 1:
		return fmt.Errorf("%w: its JWT-SVID is for %d audiences; ask for one that is for this agent alone", ErrUntrusted, len(svid.Audience))
	case svid.ID.Path() == "":
		return fmt.Errorf("%w: %s names a trust domain, not a workload", ErrUntrusted, svid.ID)
	}
	if err := v.served.check(svid.ID, by.own); err != nil {
		return untrustedToken(err)
	}
	if !now.Before(svid.Expiry) {
		return fmt.Errorf("%w: the JWT-SVID ended at %s; ask the Workload API for another", ErrExpired, svid.Expiry.UTC().Format(time.RFC3339))
	}
	return nil
}

// GetJWTBundleForTrustDomain implements jwtbundle.Source.
func (t *jwtTrust) GetJWTBundleForTrustDomain(domain spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	b, ok := t.bundles[domain]
	if !ok {
		return nil, fmt.Errorf("the Workload API gives no JWT bundle for trust domain %q", domain.Name())
	}
	return b, nil
}

// maxFault bounds what an error repeats of a token, whose text is anybody's.
const maxFault = 300

func untrustedToken(err error) error {
	text := err.Error()
	if len(text) > maxFault {
		text = strings.ToValidUTF8(text[:maxFault], "") + "..."
	}
	return fmt.Errorf("%w: %s", ErrUntrusted, text)
}

// bearer takes the token out of authorization metadata, of which there is one
// form: the word Bearer, one space, and the token, whose own form is not looked
// at yet.
func bearer(values []string) (string, error) {
	if len(values) != 1 {
		return "", fmt.Errorf("the request has %d values of %s metadata; send one", len(values), authorization)
	}
	token, ok := strings.CutPrefix(values[0], "Bearer ")
	switch {
	case !ok:
		return "", fmt.Errorf(`the %s metadata is not "Bearer ", with one space, and a JWT-SVID`, authorization)
	case len(token) > MaxToken:
		return "", fmt.Errorf("the JWT-SVID is %d bytes long; %d at most are looked at", len(token), MaxToken)
	}
	return token, nil
}

// isCompactJWS says whether token has the form of one (RFC 7515, section 7.1).
func isCompactJWS(token string) bool {
	dots, last := 0, byte('.')
	for i := range len(token) {
		c := token[i]
		switch {
		case c == '.' && last == '.':
			return false
		case c == '.':
			dots++
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
		default:
			return false
		}
		last = c
	}
	return dots == 2 && last != '.'
}
