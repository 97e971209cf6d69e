package identity

import (
	"crypto/sha256"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bounds of what is remembered of tokens. Only tokens that were verified count:
// nobody without an identity takes room here, and no caller takes that of others.
const (
	maxTokens          = 4096
	maxTokensPerCaller = 64
	// tokenAge is the longest that a verification is believed, while the bundles
	// that it was made with stay the same.
	tokenAge = time.Minute
)

// tokenHash stands for a token, which itself is not kept.
type tokenHash [sha256.Size]byte

func hashOf(token string) tokenHash {
	var room [1024]byte // of most tokens, which then take no allocation
	return sha256.Sum256(append(room[:0], token...))
}

// acceptedToken is what a token that was verified says.
type acceptedToken struct {
	id      spiffeid.ID
	expires time.Time
	// until is when it is to be verified again.
	until time.Time
}

// acceptedTokens are the tokens that were accepted on one basis. Safe for
// concurrent use.
type acceptedTokens struct {
	trust    *jwtTrust
	audience []string
	own      spiffeid.TrustDomain

	mu     sync.RWMutex // guards the rest
	byHash map[tokenHash]acceptedToken
	// of has each caller's tokens, the oldest first.
	of map[spiffeid.ID][]tokenHash
}

func newAcceptedTokens(trust *jwtTrust, audience []string, own spiffeid.TrustDomain) *acceptedTokens {
	return &acceptedTokens{
		trust: trust, audience: audience, own: own,
		byHash: make(map[tokenHash]acceptedToken), of: make(map[spiffeid.ID][]tokenHash),
	}
}

func (a *acceptedTokens) find(hash tokenHash, now time.Time) (acceptedToken, bool) {
	a.mu.RLock()
	found, ok := a.byHash[hash]
	a.mu.RUnlock()
	return found, ok && now.Before(found.until) && now.Before(found.expires)
}

// add remembers a token. Where there is no room, the caller's own oldest goes
// first, then what is over, then any.
func (a *acceptedTokens) add(hash tokenHash, token acceptedToken, now time.Time) {
	token.until = now.Add(tokenAge)
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, ok := a.byHash[hash]; ok {
		a.byHash[hash] = token
		return
	}
	if own := a.of[token.id]; len(own) >= maxTokensPerCaller {
		a.drop(own[0])
	}
	if len(a.byHash) >= maxTokens {
		a.makeRoom(now)
	}
	a.byHash[hash] = token
	a.of[token.id] = append(a.of[token.id], hash)
}

func (a *acceptedTokens) makeRoom(now time.Time) {
	for hash, token := range a.byHash {
		if !now.Before(token.until) {
			a.drop(hash)
		}
	}
	if len(a.byHash) < maxTokens {
		return
	}
	for hash := range maps.Keys(a.byHash) {
		a.drop(hash)
		return
	}
}

func (a *acceptedTokens) drop(hash tokenHash) {
	id := a.byHash[hash].id
	delete(a.byHash, hash)
	rest := slices.DeleteFunc(a.of[id], func(h tokenHash) bool { return h == hash })
	if len(rest) == 0 {
		delete(a.of, id)
		return
	}
	a.of[id] = rest
}
