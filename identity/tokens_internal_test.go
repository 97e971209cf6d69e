package identity

import (
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func numbered(n int) (h tokenHash) {
	binary.BigEndian.PutUint64(h[:], uint64(n))
	return h
}

func workloadID(n int) spiffeid.ID {
	return spiffeid.RequireFromString(fmt.Sprintf("spiffe://example.org/%d", n))
}

// consistent checks that the two maps tell the same, within bounds.
func (a *acceptedTokens) consistent(t *testing.T) {
	t.Helper()
	sum := 0
	for id, hashes := range a.of {
		if len(hashes) == 0 || len(hashes) > maxTokensPerCaller {
			t.Fatalf("%s has %d tokens", id, len(hashes))
		}
		for _, h := range hashes {
			if a.byHash[h].id != id {
				t.Fatalf("a token of %s is %s's", id, a.byHash[h].id)
			}
		}
		sum += len(hashes)
	}
	if sum != len(a.byHash) || sum > maxTokens {
		t.Fatalf("%d tokens by caller, %d by hash", sum, len(a.byHash))
	}
}

// However many tokens a caller has made, others keep theirs.
func TestTokensOfOneCallerDisplaceNoOthers(t *testing.T) {
	now := time.Now()
	a := newAcceptedTokens(nil, []string{"a"}, spiffeid.TrustDomain{})
	token := func(id int) acceptedToken {
		return acceptedToken{id: workloadID(id), expires: now.Add(time.Hour)}
	}
	a.add(numbered(1), token(1), now)
	for n := range 10 * maxTokens {
		a.add(numbered(100+n), token(2), now)
	}
	a.consistent(t)
	if _, ok := a.find(numbered(1), now); !ok {
		t.Error("one caller's tokens displaced another's")
	}
	if _, ok := a.find(numbered(100+10*maxTokens-1), now); !ok {
		t.Error("a caller's newest token is not remembered")
	}
	if got := len(a.byHash); got != 1+maxTokensPerCaller {
		t.Errorf("%d tokens are remembered, want %d", got, 1+maxTokensPerCaller)
	}
}

func TestTokensAreBounded(t *testing.T) {
	now := time.Now()
	a := newAcceptedTokens(nil, []string{"a"}, spiffeid.TrustDomain{})
	add := func(n int) {
		a.add(numbered(n), acceptedToken{id: workloadID(n), expires: now.Add(time.Hour)}, now)
	}
	for n := range maxTokens + 10 {
		add(n)
		if _, ok := a.find(numbered(n), now); !ok {
			t.Fatalf("token %d is not remembered", n)
		}
	}
	a.consistent(t)
	// What is over goes before what is not.
	now = now.Add(tokenAge)
	add(maxTokens + 20)
	a.consistent(t)
	if got := len(a.byHash); got != 1 {
		t.Errorf("%d tokens are remembered, want the one that is not over", got)
	}
}

func TestTokensAreVerifiedAgain(t *testing.T) {
	now := time.Now()
	a := newAcceptedTokens(nil, []string{"a"}, spiffeid.TrustDomain{})
	a.add(numbered(1), acceptedToken{id: workloadID(1), expires: now.Add(time.Hour)}, now)
	a.add(numbered(2), acceptedToken{id: workloadID(1), expires: now.Add(time.Second)}, now)
	for _, c := range []struct {
		after     time.Duration
		one, both bool
	}{{0, true, true}, {time.Second - 1, true, true}, {time.Second, true, false}, {tokenAge - 1, true, false}, {tokenAge, false, false}} {
		_, one := a.find(numbered(1), now.Add(c.after))
		_, two := a.find(numbered(2), now.Add(c.after))
		if one != c.one || two != c.both {
			t.Errorf("after %v: %v, %v; want %v, %v", c.after, one, two, c.one, c.both)
		}
	}
	later := now.Add(tokenAge)
	a.add(numbered(1), acceptedToken{id: workloadID(1), expires: now.Add(time.Hour)}, later)
	if _, ok := a.find(numbered(1), later.Add(tokenAge-1)); !ok {
		t.Error("a token that was verified again is not remembered")
	}
	a.consistent(t)
}
