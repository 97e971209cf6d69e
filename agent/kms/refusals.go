package kms

import (
	"errors"
	"sync"
	"time"

	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/plugins"
)

// refusals are what one of several backends has said no to, and not yes since. While it
// does not answer its no stands, whatever the others say: to cut it off from the host
// must not lift a revocation.
type refusals struct {
	mu sync.Mutex
	at map[refusal]time.Duration // when the no was heard; mu guards it
}

// refusal is what a no is about: a version in one direction, or with zero values the
// whole wrapping key.
type refusal struct {
	version   string
	direction cache.Direction
}

// heard takes what a call says that began then. That a backend does not have the key is
// no refusal: it is one of several.
func (r *refusals) heard(about refusal, err error, began, now time.Duration) {
	class := plugins.ClassOf(err)
	refused := class.Definite() && class != plugins.KeyNotFound
	if err != nil && !refused {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case refused && r.at == nil:
		r.at = map[refusal]time.Duration{about: now}
	case refused:
		r.at[about] = now
	default: // who uses the wrapping key may
		r.lift(about, began)
		r.lift(refusal{}, began)
	}
}

// lift ends a no that was heard before a call began: a yes from before it proves nothing.
func (r *refusals) lift(about refusal, began time.Duration) {
	if last, ok := r.at[about]; ok && began >= last {
		delete(r.at, about)
	}
}

func (r *refusals) stands(version string, d cache.Direction) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, one := r.at[refusal{version, d}]
	_, all := r.at[refusal{}]
	return one || all
}

// errWithheld is for a key that a backend has refused which does not answer now.
var errWithheld = errors.New("a backend that has refused the key does not answer")

// withheld is an error where the no of one of several parts stands.
func (g *group) withheld(v versions, d cache.Direction) error {
	if len(g.parts) == 1 {
		return nil // the cache knows
	}
	for part, version := range v {
		if w := g.parts[part]; version != "" && w.refusals.stands(version, d) {
			return &plugins.Error{Class: plugins.Unavailable, RetryAfter: time.Second, Err: errWithheld, Detail: w.id.uri + " version " + version}
		}
	}
	return nil
}
