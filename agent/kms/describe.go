package kms

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/kms-agent/kms-agent/agent/policy"
	"github.com/kms-agent/kms-agent/agent/random"
	"github.com/kms-agent/kms-agent/cache"
	"github.com/kms-agent/kms-agent/identity"
	"github.com/kms-agent/kms-agent/plugins"
)

// KeyDescription is what a caller may know of a key.
type KeyDescription struct {
	Name        string
	FormerNames []string
	Labels      map[string]string
	// Operations that policy gives this caller in some context.
	Operations []policy.Operation
	// CurrentVersion and Versions are empty while upstream has not said them.
	CurrentVersion string
	Versions       []plugins.KeyVersion
	BindContext    bool
	MaxAge         time.Duration
}

// DescribeKey describes one key.
func (s *Service) DescribeKey(ctx context.Context, call Call, name string) (KeyDescription, error) {
	return perform(ctx, s, call, policy.Describe, func(ctx context.Context, t *transaction) (KeyDescription, error) {
		k, err := t.authorise(ctx, name, policy.Describe, nil, 0)
		if err != nil {
			return KeyDescription{}, err
		}
		if _, err := t.current(ctx, k); err != nil {
			return KeyDescription{}, err
		}
		return t.description(k), nil
	})
}

// description tells what is known of a key without asking upstream.
func (t *transaction) description(k *key) KeyDescription {
	d := KeyDescription{
		Name: k.Name, FormerNames: k.FormerNames, Labels: k.Labels, BindContext: k.BindContext,
		MaxAge: k.Limits.MaxAge,
		Operations: t.state.Policy.Operations(policy.Request{
			Caller: t.call.Caller, Key: k.Name, Labels: k.Labels,
		}),
	}
	d.CurrentVersion, d.Versions = k.group.known()
	return d
}

// ListKeys returns the keys after the named one that the caller may describe,
// in order of their names: at most limit, 0 for 100. more tells whether there
// are others.
func (s *Service) ListKeys(ctx context.Context, call Call, after string, limit int) (keys []KeyDescription, more bool, err error) {
	if limit <= 0 {
		limit = 100
	}
	limit = min(limit, MaxPageSize)
	keys, err = perform(ctx, s, call, opListKeys, func(_ context.Context, t *transaction) ([]KeyDescription, error) {
		var visible []KeyDescription
		start, found := slices.BinarySearch(t.state.names, after)
		if found {
			start++
		}
		for _, name := range t.state.names[start:] {
			if !t.decide(t.state, t.state.keys[name], policy.Describe, nil).Allowed {
				continue
			}
			if len(visible) == limit {
				more = true
				break
			}
			visible = append(visible, t.description(t.state.keys[name]))
		}
		return visible, nil
	})
	return keys, more && err == nil, err
}

// The operations that need no permission of their own on a key, as they stand
// in the audit record.
const (
	opListKeys policy.Operation = "list-keys"
	opWhoAmI   policy.Operation = "whoami"
)

// WhoAmI returns the caller as the agent knows it.
func (s *Service) WhoAmI(ctx context.Context, call Call) (identity.Caller, error) {
	return perform(ctx, s, call, opWhoAmI, func(context.Context, *transaction) (identity.Caller, error) {
		return call.Caller, nil
	})
}

// GenerateRandom returns 1 to MaxRandomSize bytes of random. It needs
// generate-random on any key, since it concerns none.
func (s *Service) GenerateRandom(ctx context.Context, call Call, length int) ([]byte, error) {
	return perform(ctx, s, call, policy.GenerateRandom, func(ctx context.Context, t *transaction) ([]byte, error) {
		decision := t.decide(t.state, nil, policy.GenerateRandom, nil)
		t.decided(decision)
		if !decision.Allowed {
			return nil, denied("")
		}
		if length < 1 || length > MaxRandomSize {
			return nil, invalid("", "length must be 1 to %d bytes, not %d", MaxRandomSize, length)
		}
		if err := t.count(ctx, decision, "", uint64(length)); err != nil {
			return nil, err
		}
		out := make([]byte, length)
		s.random.Fill(out, random.GenerateRandom)
		t.record.BytesOut = uint64(length)
		return out, nil
	})
}

// warnVersionAge is the share of a version's age from which on it is a problem.
const warnVersionAge = 0.9

// KeyHealth is what an operator sees of a key.
type KeyHealth struct {
	Name, Backend, WrappingKey, CurrentVersion string
	// EncryptConfirmed and DecryptConfirmed are how long ago upstream said yes
	// for the current version; negative: not yet.
	EncryptConfirmed, DecryptConfirmed time.Duration
	// Problem says what is wrong; empty where nothing is known to be.
	Problem string
	// Encrypt and Decrypt tell how long the current version serves in an outage.
	Encrypt, Decrypt Endurance
	// Spares are ready, of SparesWanted.
	Spares, SparesWanted int
	// askable: the backend may say by now that the problem is none any more, which nobody
	// hears who does not ask.
	askable bool
}

// Endurance is how long a key lasts in one direction without its backend.
type Endurance struct {
	// Down tells that the backend does not answer for the key, since so long ago.
	Down  bool
	Since time.Duration
	// Left is how long the key still serves if it does not answer from now on.
	Left time.Duration
}

// maxProblem bounds what is told of a backend's own words, in bytes.
const maxProblem = 1024

// Health tells of every key without asking upstream.
func (s *Service) Health() []KeyHealth {
	st := s.state.Load()
	keys := make([]KeyHealth, 0, len(st.names))
	for _, name := range st.names {
		keys = append(keys, s.health(st.keys[name]))
	}
	return keys
}

func (s *Service) health(k *key) KeyHealth {
	g := k.group
	h := KeyHealth{Name: k.Name, Backend: g.id.backend, WrappingKey: g.id.uri, EncryptConfirmed: -1, DecryptConfirmed: -1}
	current := make(versions, len(g.parts))
	for part, w := range g.parts {
		known := w.described.Load()
		if why := w.refused.Load(); known == nil && why != nil && h.Problem == "" {
			h.Problem = "its backend refused it when it was asked last: " + plugins.Printable(why.why, maxProblem)
			h.askable = true
		}
		if known == nil {
			continue
		}
		current[part] = known.Current
		if old := k.tooOld(known, warnVersionAge); old != "" {
			h.Problem, h.askable = cmp.Or(h.Problem, old), true
		}
	}
	if !slices.ContainsFunc(current, func(v string) bool { return v != "" }) {
		return h
	}
	h.CurrentVersion = current.String()
	if g.lacking.Load() && h.Problem == "" {
		h.Problem = "not all of its backends have wrapped the data keys in use: messages made meanwhile can be opened by those alone that have, which `kms-agent keys health` tells; new data keys are made when all answer again"
	}
	h.Spares, h.SparesWanted = s.cache.SparesOf(k.Name)
	refused := cmp.Or(s.stands(&h, k, current, cache.Encrypt), s.stands(&h, k, current, cache.Decrypt))
	if refused != nil {
		h.Problem, h.askable = plugins.Printable(refused.Error(), maxProblem), true
	}
	return h
}

// stands adds what is known of the current versions in one direction. It returns why they
// are refused, nil where they are not.
func (s *Service) stands(h *KeyHealth, k *key, current versions, d cache.Direction) error {
	standing := s.cache.Standing(k.group.authority(current, d), k.limits(d))
	if standing.Refused != nil {
		return standing.Refused
	}
	confirmed, endures := &h.EncryptConfirmed, &h.Encrypt
	if d == cache.Decrypt {
		confirmed, endures = &h.DecryptConfirmed, &h.Decrypt
	}
	if standing.Confirmed {
		*confirmed = standing.Age
	}
	if standing.DataKeys == 0 && (d == cache.Encrypt || s.away(k, current)) {
		standing.GraceLeft = 0 // there is nothing that could serve
	}
	*endures = Endurance{Down: standing.Down, Since: standing.Since, Left: standing.GraceLeft}
	if standing.Down && standing.Age > k.Limits.MaxAge {
		h.Problem = cmp.Or(h.Problem, outageProblem(d, standing))
		h.askable = h.askable || standing.GraceLeft <= 0 // else its own refresh will tell
	}
	return nil
}

// away tells whether a key's backend does not answer, in either direction.
func (s *Service) away(k *key, current versions) bool {
	return s.cache.Standing(k.group.authority(current, cache.Encrypt), k.Limits).Down ||
		s.cache.Standing(k.group.authority(current, cache.Decrypt), k.Limits).Down
}

func outageProblem(d cache.Direction, s cache.Standing) string {
	if s.GraceLeft <= 0 {
		return fmt.Sprintf("its backend has not answered for %s: %ss are not served any more", s.Since.Round(time.Second), d)
	}
	return fmt.Sprintf("its backend has not answered for %s: %ss are served in grace for %s more", s.Since.Round(time.Second), d, s.GraceLeft.Round(time.Second))
}
